"""Image records from directories and metadata files: what is found, what is reported, how often it counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data.discovery import (
    Surroundings,
    balance_regularization,
    discover,
    discover_all,
    discover_parts,
    split_validation,
    tag_frequency,
)
from library.data.image_files import BadImagesError
from library.data.metadata_file import MetadataEntry, read_metadata_file
from library.data.records import ImageRecord, LatentSpec
from library.options.errors import UserError

SPEC = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd.npz")
BUCKETS = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text(encoding="utf-8"))


def draw(path: Path, size: tuple[int, int] = (8, 6), **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **save)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def dataset_of(*subsets: SubsetConfig, **values: Any) -> DatasetConfig:
    return DatasetConfig(resolution=(64, 64), subsets=subsets, kind=subsets[0].kind, **values)


def found_in(folder: Path, **values: Any) -> list[ImageRecord]:
    return discover(dataset_of(SubsetConfig(image_dir=str(folder), **values)), 0)


def names(records: list[ImageRecord]) -> list[str]:
    return [record.path.name for record in records if record.path is not None]


# --- files ----------------------------------------------------------------------------------------------------


def test_images_of_every_format_and_name_are_found_in_string_order(tmp_path: Path) -> None:
    wanted = ["B.PNG", "[x]{y}.png", "a b.jpg", "c.JPEG", "d.Webp", "e.bmp", "ä猫😀.png"]
    for name in wanted:
        draw(tmp_path / name, format={"JPG": "JPEG"}.get(name.rsplit(".")[-1].upper()))
    for other in ("f.gif", "g.tiff"):
        draw(tmp_path / other)
    draw(tmp_path / "deep" / "h.png")
    (tmp_path / "i.txt").touch()
    (tmp_path / "folder.png").mkdir()
    assert names(found_in(tmp_path)) == sorted(wanted)


def test_records_hold_everything_about_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "dir [1]" / "a.png", (30, 20))
    path.with_suffix(".txt").write_text("a cat\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    dataset = dataset_of(
        SubsetConfig(image_dir="dir [1]", num_repeats=0),
        SubsetConfig(image_dir="dir [1]", num_repeats=3, caption_extension=".txt"),
    )
    assert discover(dataset, 0) == [ImageRecord(str(path), path, "a cat", 1, num_repeats=3, image_size=(30, 20))]


@pytest.mark.parametrize(("orientation", "size"), [(1, (30, 20)), (3, (30, 20)), (6, (20, 30)), (8, (20, 30))])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_sizes_are_those_after_exif_orientation(
    tmp_path: Path, name: str, orientation: int, size: tuple[int, int]
) -> None:
    draw(tmp_path / name, (30, 20), exif=turned(orientation))
    assert found_in(tmp_path)[0].image_size == size


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    early = draw(tmp_path / "a.png", (30, 20), exif=turned(6)).read_bytes()
    start = early.index(b"eXIf") - 4
    length = int.from_bytes(early[start : start + 4], "big") + 12
    end = early.index(b"IEND") - 4
    late = early[:start] + early[start + length : end] + early[start : start + length] + early[end:]
    (tmp_path / "a.png").write_bytes(late)
    assert found_in(tmp_path)[0].image_size == (20, 30)


def test_every_unreadable_file_is_named_in_one_report(tmp_path: Path) -> None:
    good = draw(tmp_path / "good.png").read_bytes()
    draw(tmp_path / "tiny.png", (1, 1))
    draw(tmp_path / "is_a_jpeg.png", format="JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "short.png").write_bytes(good[:12])
    (tmp_path / "text.jpg").write_text("not an image", encoding="utf-8")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "good.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "tiny.txt").touch()
    with pytest.raises(BadImagesError) as caught:
        found_in(tmp_path, caption_extension=".txt")
    wanted = {"empty.png", "short.png", "text.jpg", "dangling.png", "good.txt", "tiny.txt"}
    assert {os.path.basename(path) for path in caught.value.files} == wanted
    assert all(str(tmp_path / name) in str(caught.value) for name in wanted)
    assert "empty (0 bytes)" in caught.value.files[str(tmp_path / "empty.png")]


def test_bad_files_of_all_datasets_are_reported_together(tmp_path: Path) -> None:
    datasets = []
    for name in ("a", "b"):
        draw(tmp_path / name / "good.png")
        (tmp_path / name / "bad.png").touch()
        datasets.append(dataset_of(SubsetConfig(image_dir=str(tmp_path / name))))
    with pytest.raises(BadImagesError) as caught:
        discover_all(DataConfig(tuple(datasets), "data.toml", from_file=True))
    assert set(caught.value.files) == {str(tmp_path / name / "bad.png") for name in ("a", "b")}


def test_empty_subset_warns_and_empty_dataset_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "full" / "a.png")
    empty, full = (SubsetConfig(image_dir=str(tmp_path / name), class_tokens="x") for name in ("empty", "full"))
    assert len(discover(dataset_of(empty, full), 0)) == 1
    assert "no images in" in caplog.messages[0]
    with pytest.raises(UserError, match=r"No data found: datasets\[3\]"):
        discover(dataset_of(empty), 3)


def test_one_directory_twice_in_a_dataset_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path / "a" / "a.png")
    subsets = [SubsetConfig(image_dir=f"{tmp_path}/{name}", class_tokens="x", num_repeats=2) for name in ("a", "a/")]
    assert [record.subset_index for record in discover(dataset_of(*subsets), 0)] == [0]
    assert "ignored because" in caplog.text


# --- cache_info -----------------------------------------------------------------------------------------------


def test_info_cache_keeps_captions_until_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("a/猫.png"), (30, 20))
    caption = Path("a/猫.caption")
    caption.write_text("one", encoding="utf-8")
    first = found_in(Path("a"), cache_info=True)
    content = Path("a/metadata_cache.json").read_text(encoding="utf-8")
    assert json.loads(content) == {"a/猫.png": {"caption": "one", "resolution": [30, 20]}}
    assert "猫" in content
    assert content.startswith('{\n  "')
    caption.write_text("two", encoding="utf-8")
    draw(Path("a/new.png"))
    assert found_in(Path("a"), cache_info=True) == first
    assert "lists 1 images, but the directory holds 2" in caplog.text
    assert [record.caption for record in found_in(Path("a"))] == ["", "two"]
    monkeypatch.chdir("/")
    moved = tmp_path / "moved"
    (tmp_path / "a").rename(moved)
    assert [(record.path, record.caption) for record in found_in(moved, cache_info=True)] == [
        (moved / "猫.png", "one")
    ]


def test_info_cache_holds_all_images_despite_a_validation_split(tmp_path: Path) -> None:
    for number in range(10):
        draw(tmp_path / f"{number}.png", (8 + number, 8))
        (tmp_path / f"{number}.caption").write_text(str(number), encoding="utf-8")
    dataset = dataset_of(SubsetConfig(image_dir=str(tmp_path), cache_info=True, validation_split=0.3))
    parts = [discover_parts(dataset, 0) for _ in range(2)]
    assert parts[0] == parts[1]
    assert len(json.loads((tmp_path / "metadata_cache.json").read_text(encoding="utf-8"))) == 10
    for record in parts[1].training + parts[1].validation:
        assert record.path is not None
        assert record.path.stem == record.caption
        assert record.image_size == (8 + int(record.caption), 8)


def test_only_the_main_process_writes_the_info_cache(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    dataset = dataset_of(SubsetConfig(image_dir=str(tmp_path), cache_info=True))
    discover(dataset, 0, Surroundings(is_main_process=False))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_stale_size_and_missing_file_of_the_info_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = draw(tmp_path / "a.png", (30, 20))
    cache = tmp_path / "metadata_cache.json"
    cache.write_text(json.dumps({str(path): {"caption": "x", "resolution": [1, 2]}}), encoding="utf-8")
    assert found_in(tmp_path, cache_info=True)[0].image_size == (30, 20)
    assert "another size" in caplog.text
    path.unlink()
    with pytest.raises(BadImagesError, match="a.png"):
        found_in(tmp_path, cache_info=True)
    cache.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="metadata_cache.json: not a file"):
        found_in(tmp_path, cache_info=True)


# --- regularisation, validation, statistics -------------------------------------------------------------------


@pytest.mark.parametrize("case", BUCKETS["regularisation_balancing"]["cases"])
def test_regularization_case(case: dict[str, Any]) -> None:
    wanted = case["train_images_with_repeats"]
    training = [ImageRecord("t", None, "", 0, num_repeats=wanted)] if wanted else []
    reg = [
        ImageRecord(image["key"], None, "", 1, num_repeats=image["num_repeats"], is_reg=True)
        for image in case["reg_images"]
    ]
    balanced = balance_regularization([*reg, *training])
    assert balanced[: len(training)] == training
    assert {record.key: record.num_repeats for record in balanced if record.is_reg} == case["effective_repeats"]


def test_discover_balances_regularization(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a", "train/b", "reg/r0", "reg/r1", "reg/r2"):
        draw(tmp_path / f"{name}.png")
    train = SubsetConfig(image_dir=str(tmp_path / "train"), class_tokens="x", num_repeats=2)
    reg = SubsetConfig(image_dir=str(tmp_path / "reg"), class_tokens="y", is_reg=True)
    records = discover(dataset_of(train, reg), 0)
    assert [(name, r.num_repeats) for name, r in zip(names(records), records, strict=True)] == [
        ("a.png", 2), ("b.png", 2), ("r0.png", 2), ("r1.png", 1), ("r2.png", 1),
    ]
    assert not caplog.messages
    once = SubsetConfig(image_dir=str(tmp_path / "train"), class_tokens="x")
    assert names(discover(dataset_of(once, reg), 0)) == ["a.png", "b.png", "r0.png", "r1.png"]
    assert "1 of 3 regularisation images are not used" in caplog.text


@pytest.mark.parametrize("case", [case for case in BUCKETS["validation_split"]["cases"] if "train" in case])
def test_validation_split_case(case: dict[str, Any]) -> None:
    records = [ImageRecord(f"img{n:03}", None, "", 0, num_repeats=4) for n in range(case["n_images"])]
    subset = SubsetConfig(validation_split=case["validation_split"], validation_seed=case["validation_seed"])
    training, validation = split_validation(dataset_of(subset), records)
    assert [record.key for record in training] == case["train"]
    assert [record.key for record in validation] == case["wanted_validation"]
    assert {record.num_repeats for record in training} <= {4}
    assert {record.num_repeats for record in validation} <= {1}


def test_validation_split_is_complete_and_leaves_regularization_alone() -> None:
    subsets = (SubsetConfig(validation_split=0.5), SubsetConfig(validation_split=0.5, is_reg=True))
    records = [ImageRecord(f"{n}", None, "", n % 2, is_reg=n % 2 == 1) for n in range(20)]
    training, validation = split_validation(dataset_of(*subsets), records)
    assert sorted(record.key for record in training + validation) == sorted(record.key for record in records)
    assert (len(training), len(validation)) == (15, 5)
    assert not any(record.is_reg for record in validation)


def test_a_split_without_training_images_is_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    dataset = dataset_of(SubsetConfig(image_dir=str(tmp_path), class_tokens="x", validation_split=1.0))
    with pytest.raises(UserError, match="validation_split leaves no image"):
        discover_all(DataConfig((dataset,), "data.toml", from_file=True))


def test_tag_frequency_counts_lower_cased_tags_without_repeats(tmp_path: Path) -> None:
    for folder, captions in (("x/dog", ["Dog, Grass,, dog", "dog;sky"]), ("y/dog", ["grass"]), ("cat", ["a"])):
        for number, caption in enumerate(captions):
            draw(tmp_path / folder / f"{number}.png").with_suffix(".caption").write_text(caption, encoding="utf-8")
    dataset = dataset_of(
        *(
            SubsetConfig(image_dir=f"{tmp_path}/{folder}", num_repeats=5, caption_separator=";")
            for folder in ("x/dog/", "y/dog", "cat")
        )
    )
    assert tag_frequency(dataset, discover(dataset, 0)) == {
        "dog": {"dog": 2, "grass": 2, "dog;sky": 1}, "cat": {"a": 1},
    }


# --- metadata files -------------------------------------------------------------------------------------------


def metadata(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def tuned(image_dir: Path | None, file: str, **values: Any) -> SubsetConfig:
    folder = None if image_dir is None else str(image_dir)
    return SubsetConfig(kind="fine_tuning", image_dir=folder, metadata_file=file, **values)


def test_metadata_keys_are_paths_names_or_stems(tmp_path: Path) -> None:
    images = tmp_path / "im[1]"
    absolute = draw(tmp_path / "elsewhere" / "abs.png", (10, 20))
    for name in ("name.jpg", "stem.JPG", "sub/deep.webp", "two.jpg", "two.png"):
        draw(images / name)
    file = metadata(
        tmp_path / "meta.json",
        {
            "stem": {"caption": "c", "tags": "t"}, str(absolute): {"tags": "t", "image_size": [20, 10]},
            "name.jpg": {}, "sub/deep": {"caption": None}, "two": {},
        },
    )
    records = discover(dataset_of(tuned(images, file, num_repeats=2)), 0)
    assert [(record.key, record.path, record.caption, record.image_size) for record in records] == [
        (str(absolute), absolute, "t", (10, 20)),
        ("name.jpg", images / "name.jpg", "", (8, 6)),
        ("sub/deep", images / "sub" / "deep.webp", "", (8, 6)),
        ("stem", images / "stem.JPG", "c,t", (8, 6)),
        ("two", images / "two.png", "", (8, 6)),
    ]
    assert {record.num_repeats for record in records} == {2}


def test_jsonl_metadata_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "meta.jsonl"
    path.write_text('{"image_path": "a", "caption": "x", "image_size": [3, 4]}\n\n{"image_path": "b"}\n', "utf-8")
    assert read_metadata_file(str(path)) == [MetadataEntry("a", "x", None, (3, 4)), MetadataEntry("b")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.json", "{", "m.json: not valid JSON"),
        ("m.json", "[]", "one object"),
        ("m.json", '{"a": 1}', "m.json: a: "),
        ("m.json", '{"a": {"caption": 1}}', "`caption` must be a text"),
        ("m.json", '{"a": {"image_size": [1]}}', "`image_size` must be"),
        ("m.jsonl", '{"image_path": "a"}\n{', "line 2: not valid JSON"), ("m.jsonl", '{"caption": "a"}', "line 1: "),
    ],
)
def test_malformed_metadata_is_named(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_metadata_file(str(tmp_path / name))
    assert expected in str(caught.value)


def test_metadata_keys_without_an_image_are_reported_with_bad_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    file = metadata(tmp_path / "meta.json", {"gone": {}, "empty": {}})
    with pytest.raises(BadImagesError) as caught:
        discover(dataset_of(tuned(tmp_path, file)), 0)
    assert set(caught.value.files) == {"gone", str(tmp_path / "empty.png")}
    with pytest.raises(BadImagesError, match="give image_dir"):
        discover(dataset_of(tuned(None, file)), 0)


def test_latents_cache_replaces_a_missing_image_only_by_its_exact_stem(tmp_path: Path) -> None:
    for name in ("0_a_0100x0200_sd.npz", "ab_0100x0200_sd.npz", "a_0030x0040_sd.npz", "a_0030x0040_flux.npz"):
        (tmp_path / name).touch()
    file = metadata(tmp_path / "meta.json", {"a.png": {}})
    record = discover(dataset_of(tuned(tmp_path, file)), 0, Surroundings(SPEC))[0]
    assert record.path == tmp_path / "a.png"
    assert record.latents_path == tmp_path / "a_0030x0040_sd.npz"
    assert record.image_size == (30, 40)
    draw(tmp_path / "a.png", (30, 40))
    record = discover(dataset_of(tuned(tmp_path, file)), 0, Surroundings(SPEC))[0]
    assert (record.path, record.latents_path) == (tmp_path / "a.png", None)


def test_equal_keys_of_two_metadata_files_stay_apart(tmp_path: Path) -> None:
    subsets = []
    for name in ("x", "y"):
        draw(tmp_path / name / "a.png")
        subsets.append(tuned(tmp_path / name, metadata(tmp_path / f"{name}.json", {"a": {"tags": f"{name}, 1GIRL"}})))
    dataset = dataset_of(*subsets)
    records = discover(dataset, 0)
    assert len({record.key for record in records}) == 2
    assert [record.path for record in records] == [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    assert tag_frequency(dataset, records) == {"x.json": {"x": 1, "1girl": 1}, "y.json": {"y": 1, "1girl": 1}}


def test_metadata_datasets_are_split_for_validation(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / f"{number}.png")
    file = metadata(tmp_path / "meta.json", {str(number): {} for number in range(4)})
    parts = discover_parts(dataset_of(tuned(tmp_path, file, validation_split=0.5, validation_seed=1)), 0)
    assert len(parts.training) == len(parts.validation) == 2
    assert len({record.key for record in parts.training + parts.validation}) == 4


# --- conditioning images --------------------------------------------------------------------------------------


def conditioned(tmp_path: Path, **values: Any) -> SubsetConfig:
    return SubsetConfig(
        kind="controlnet", image_dir=str(tmp_path / "images"), conditioning_data_dir=str(tmp_path / "masks"), **values
    )


def test_conditioning_images_are_paired_by_stem_before_the_split(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        draw(tmp_path / "images" / name)
        draw(tmp_path / "masks" / name.replace(".jpg", ".webp"))
    parts = discover_parts(dataset_of(conditioned(tmp_path, validation_split=0.5, validation_seed=0)), 0)
    pairs = {
        record.path.name: record.conditioning_path.name
        for record in parts.training + parts.validation
        if record.path is not None and record.conditioning_path is not None
    }
    assert pairs == {"a.png": "a.png", "b.jpg": "b.webp"}
    assert len(parts.validation) == 1


def test_unpaired_images_are_listed_on_both_sides(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/b.png", "masks/a.png", "masks/c.png"):
        draw(tmp_path / name)
    with pytest.raises(UserError) as caught:
        discover(dataset_of(conditioned(tmp_path)), 0)
    text = str(caught.value)
    assert "b.png: no conditioning image" in text
    assert "c.png: no training image" in text
    assert "a.png" not in text


def test_conditioning_images_of_another_size_are_refused_with_buckets(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png", (8, 6))
    draw(tmp_path / "masks" / "a.png", (9, 6))
    assert len(discover(dataset_of(conditioned(tmp_path)), 0)) == 1
    with pytest.raises(UserError, match="size of conditioning image is not match: 9x6"):
        discover(dataset_of(conditioned(tmp_path), enable_bucket=True), 0)


def test_unreadable_conditioning_images_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").touch()
    with pytest.raises(BadImagesError, match="masks.a.png"):
        discover(dataset_of(conditioned(tmp_path)), 0)
