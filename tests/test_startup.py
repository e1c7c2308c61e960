"""What a second start leaves out: files that have not changed are neither opened nor decoded again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data import image_files
from library.data.dataset import build_group
from library.data.decode_check import check_images
from library.data.discovery import discover_all
from library.data.image_files import BadImagesError, read_image_sizes
from library.data.image_memory import Facts, ImageMemory, Stamp, default_root, stamp_of
from library.data.info_cache import read_info_cache, write_info_cache
from tests.picture_folder import SPEC, save_pictures, tokenize


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known at the start of a test; returns the folder of the memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    return tmp_path / "user cache" / "sd-scripts" / "images"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return save_pictures(tmp_path / "pictures [1] 日本 😀")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose header was read ("size ...") or whose content was decoded ("all ...")."""
    names: list[str] = []

    def watch(function, word):
        def watched(path):
            names.append(f"{word} {Path(path).name}")
            return function(path)

        return watched

    monkeypatch.setattr(image_files, "image_size", watch(image_files.image_size, "size"))
    monkeypatch.setattr(image_files, "check_decodes", watch(image_files.check_decodes, "all"))
    return names


def start(*pictures: Path, masks: Path | None = None) -> list[tuple[str, tuple[int, int]]]:
    """Everything from a configuration to the first batch; returns (name, size) of the images."""
    subset = SubsetConfig(
        image_dir=str(pictures[0].parent), kind="controlnet" if masks else "dreambooth",
        conditioning_data_dir=str(masks) if masks else None,
    )
    dataset = DatasetConfig((128, 128), (subset,), kind=subset.kind, enable_bucket=True, min_bucket_reso=64)
    config = DataConfig((dataset,), "test.toml", from_file=True)
    records = [parts.training for parts in discover_all(config)]
    group = build_group(config, records, spec=SPEC, tokenize=tokenize, seed=1)
    check_images(group)
    return [(Path(record.key).name, record.image_size) for record in records[0]]


def test_a_second_start_opens_no_image(pictures, opened):
    first = start(*pictures)
    assert sorted(opened) == sorted([f"{word} {path.name}" for word in ("size", "all") for path in pictures])
    opened.clear()
    assert start(*pictures) == first
    assert opened == []


def test_conditioning_images_are_remembered_too(pictures, opened, tmp_path):
    masks = tmp_path / "masks"
    shutil.copytree(pictures[0].parent, masks)
    start(*pictures, masks=masks)
    assert opened.count("size a0.png") == opened.count("all a0.png") == 2
    opened.clear()
    start(*pictures, masks=masks)
    assert opened == []


@pytest.mark.parametrize("change", ["content", "time", "new name"])
def test_only_what_changed_is_opened_again(pictures, opened, change):
    start(*pictures)
    opened.clear()
    name = pictures[1].name
    if change == "content":
        Image.new("RGB", (77, 99)).save(pictures[1])
    elif change == "time":
        status = pictures[1].stat()
        os.utime(pictures[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        name = "z.png"
        pictures[1].rename(pictures[1].with_name(name))
    found = dict(start(*pictures))
    assert sorted(opened) == [f"all {name}", f"size {name}"]
    assert found[name] == ((77, 99) if change == "content" else (160, 150))


def test_a_broken_file_is_reported_at_every_start(pictures, opened):
    start(*pictures)
    pictures[2].write_bytes(pictures[2].read_bytes()[:2000])
    for _ in range(2):
        opened.clear()
        with pytest.raises(BadImagesError, match=r"1 file\(s\).*\n.*a2\.png: the image cannot be read"):
            start(*pictures)
        assert "all a2.png" in opened and len(opened) <= 2


def test_the_memory_forgets_files_that_are_gone_and_folders_stay_apart(pictures, own_memory, tmp_path):
    other = save_pictures(tmp_path / "other", [(64, 64)])
    start(*pictures)
    start(*other)
    assert len(list(own_memory.iterdir())) == 2
    pictures[0].unlink()
    Image.new("RGB", (50, 50)).save(pictures[1])
    start(*pictures)
    files = {json.loads(path.read_bytes())["directory"]: json.loads(path.read_bytes()) for path in own_memory.iterdir()}
    assert sorted(files[str(pictures[0].parent)]["files"]) == ["a1.png", "a2.png", "a3.png", "a4.png"]
    assert sorted(files[str(other[0].parent)]["files"]) == ["a0.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"directory": 3}', b'{"directory": "/elsewhere", "files": {}}',
        "list", "short", "texts", "negative",
    ],
)
def test_a_damaged_memory_is_made_anew(pictures, opened, own_memory, content):
    expected = start(*pictures)
    (file,) = own_memory.iterdir()
    known = json.loads(file.read_bytes())
    broken = {
        "list": [], "short": {"a0.png": known["files"]["a0.png"][:3]},
        "texts": {"a0.png": [*known["files"]["a0.png"][:2], "128", "128", 1]},
        "negative": {"a0.png": [*known["files"]["a0.png"][:2], -128, 0, 1]},
    }  # fmt: skip
    if isinstance(content, str):
        content = json.dumps({"directory": known["directory"], "files": broken[content]}).encode()
    file.write_bytes(content)
    opened.clear()
    assert start(*pictures) == expected
    assert opened.count("size a0.png") == opened.count("all a0.png") == 1
    assert json.loads(file.read_bytes()) == known


def test_a_folder_that_cannot_be_written_costs_only_time(pictures, opened, own_memory, caplog):
    own_memory.parent.mkdir(parents=True)
    own_memory.write_text("a file where the folder should be", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        first = start(*pictures)
    assert "cannot be written" in caplog.text and str(pictures[0].parent) in caplog.text
    opened.clear()
    assert start(*pictures) == first
    assert len(opened) == 2 * len(pictures)


def test_several_runs_at_once_never_leave_a_mixture(tmp_path):
    for name in range(50):
        (tmp_path / f"{name}.png").touch()

    def run(number: int) -> None:
        for turn in range(10):
            memory = ImageMemory(tmp_path / "memory")
            for name in range(50):
                facts = Facts((number, turn + 1), is_decoded=True)
                memory.remember(str(tmp_path / f"{name}.png"), Stamp(number, turn), facts)
            memory.save()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(1, 5)))
    (file,) = (tmp_path / "memory").iterdir()  # no scratch files either
    entries = json.loads(file.read_bytes())["files"]
    assert len(entries) == 50 and len({tuple(entry) for entry in entries.values()}) == 1


def test_facts_are_given_only_for_the_same_stamp(tmp_path):
    (tmp_path / "a.png").write_bytes(b"123")
    path, memory = str(tmp_path / "a.png"), ImageMemory(tmp_path / "memory")
    stamp = stamp_of(path)
    assert stamp is not None and stamp.bytes == 3
    memory.remember(path, stamp, Facts((3, 4), is_decoded=False))
    memory.save()
    again = ImageMemory(tmp_path / "memory")
    assert again.recall(path, stamp) == Facts((3, 4), is_decoded=False)
    assert again.recall(path, Stamp(4, stamp.modified)) is None and again.recall(path, None) is None
    assert stamp_of(str(tmp_path / "gone.png")) is None


def test_the_memory_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_root() == Path("/somewhere/sd-scripts/images")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "sd-scripts" / "images"


def test_names_that_are_no_text_are_remembered(tmp_path, opened):
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    name = os.fsdecode(folder + b"/\xff\xfe.png")
    try:
        Image.new("RGB", (8, 9)).save(name)
    except (OSError, UnicodeError):  # file systems whose names are text
        return
    assert read_image_sizes([name]) == ({name: (8, 9)}, {})
    opened.clear()
    assert read_image_sizes([name]) == ({name: (8, 9)}, {})
    assert opened == []
    write_info_cache(os.fsdecode(folder), {name: ("caption ü", (8, 9))})
    assert read_info_cache(os.fsdecode(folder)) == {name: ("caption ü", (8, 9))}
