"""`--debug_dataset` on a machine without a screen: the contact sheet, the text beside it, in every training script."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config_schema import SubsetConfig
from library.data import preview
from library.data.preview import GAP, LINE, TILE, open_window, show_dataset
from library.data.records import BatchRequest
from tests.picture_folder import dataset_config, group_of, records_of
from tests.test_every_script_learns import CASES, SDXL
from tests.training import TOKENIZERS, run_script

NAMES = ("wide one", "tall_2", "日本語 [3] 😀")
SIZES = ((256, 64), (64, 256), (128, 128))


def pixels_of(sheet: Path, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The part of the sheet that shows a picture of `size` which fills the tile at (left, top) in the middle."""
    with Image.open(sheet) as image:
        x, y = left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2
        return np.asarray(image.convert("RGB"))[y : y + size[1], x : x + size[0]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of three shapes with captions, hints and metadata, and a dataset file for each kind of data."""
    folder = tmp_path_factory.mktemp("debug")
    pictures, hints = folder / "pictures", folder / "hints"
    pictures.mkdir()
    hints.mkdir()
    metadata = {}
    for name, size, colour in zip(NAMES, SIZES, ("red", "green", "blue"), strict=True):
        Image.new("RGB", size, colour).save(pictures / f"{name}.png")
        Image.new("RGB", size, "white").save(hints / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"{colour} picture, tag one, tag two", encoding="utf-8")
        metadata[f"{name}.png"] = {"caption": f"{colour} picture", "tags": "tag one, tag two"}
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    subsets = {
        "folder": 'caption_extension = ".txt"', "metadata": f"metadata_file = {str(folder / 'metadata.json')!r}",
        "hints": f'caption_extension = ".txt"\nconditioning_data_dir = {str(hints)!r}',
    }
    for name, subset in subsets.items():
        (folder / f"{name}.toml").write_text(
            "[[datasets]]\nresolution = 128\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
            f"max_bucket_reso = 256\n[[datasets.subsets]]\nimage_dir = {str(pictures)!r}\nnum_repeats = 3\n{subset}\n",
            encoding="utf-8",
        )
    return folder


def debug(script: str, data: Path, output: Path, *further: str) -> str:
    """Run a script with `--debug_dataset`; returns `samples.txt`."""
    case = CASES[script]
    tokenizers = () if "--tokenizer_cache_dir" in case.words else ("--tokenizer_cache_dir", TOKENIZERS)
    run_script(
        script, *map(str, (
            *case.words, *tokenizers, "--dataset_config", data / f"{case.data}.toml", "--debug_dataset", "--seed", 1,
            "--output_dir", output, "--max_data_loader_n_workers", 0, *further,
        )),
    )  # fmt: skip
    return (output / "debug_dataset" / "samples.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", CASES)
def test_every_script_shows_its_data_and_stops(script, data, tmp_path, capsys):
    text = debug(script, data, tmp_path, "--cache_latents")
    printed = capsys.readouterr().out
    folder = tmp_path / "debug_dataset"
    assert f"dataset shown in {folder / 'samples.txt'}, {folder / 'contact_sheet.png'}; no training" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["debug_dataset"]
    assert text.startswith("6 batches per epoch, 9 training images (with repeats), 0 regularisation images")
    assert text.count("\n  key: ") == 9
    for name in NAMES:
        assert text.count(f"{name}.png\n  caption: ") == 3
    assert "  bucket 128x128: 3 samples" in text and "repeats: 3" in text
    assert "tokens: {" in text
    pictures_per_sample = 2 if CASES[script].data == "hints" else 1
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width % (pictures_per_sample * TILE + GAP) == 0
        assert sheet.width * sheet.height >= 9 * pictures_per_sample * TILE * TILE
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colours
    assert ("conditioning image: [3, " in text) == (CASES[script].data == "hints")


def test_captions_of_a_text_cache_are_shown_as_they_would_be_cached(data, tmp_path):
    text = debug("sdxl_train", data, tmp_path, "--cache_text_encoder_outputs", "--caption_prefix", "new")
    assert text.count("caption: new red picture, tag one, tag two") == 3


def test_options_that_exclude_each_other_are_refused_here_too(data, tmp_path, capfd):
    path = tmp_path / "random.toml"
    path.write_text((data / "folder.toml").read_text(encoding="utf-8") + "color_aug = true\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run_script(
            "sdxl_train", *map(str, SDXL), "--tokenizer_cache_dir", TOKENIZERS, "--dataset_config", path,
            "--debug_dataset", "--cache_latents", "--output_dir", tmp_path / "out",
        )  # fmt: skip
    assert stopped.value.code == 2
    assert "--cache_latents cannot be combined with color_aug" in capfd.readouterr().err


# --- the sheet ------------------------------------------------------------------------------------------------
def test_a_sample_is_shown_as_it_is_trained(tmp_path):
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (128, 128, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / "hint.png")
    records = records_of([tmp_path / "a.png"], conditioning_path=tmp_path / "hint.png", num_repeats=8)
    group = group_of((dataset_config(SubsetConfig(flip_aug=True, alpha_mask=True), batch_size=1), records))
    _, sheet = show_dataset(group, tmp_path / "out")
    flips = set()
    for number in range(8):
        batch = group[BatchRequest(1, number, 0)]
        column, row = number % 2, number // 2
        left, top = column * (3 * TILE + GAP), row * (TILE + 6 * LINE + GAP)
        for place, tensor in enumerate(
            (batch.images[0], batch.alpha_masks[0].expand(3, -1, -1) * 2 - 1, batch.conditioning_images[0])
        ):
            expected = ((tensor.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
            shown = pixels_of(sheet, left + place * TILE, top, (128, 128))
            assert np.array_equal(shown, expected)
        flips |= set(batch.flippeds)
    assert flips == {True, False}


def test_the_text_says_everything_about_a_sample(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    Image.new("RGB", (300, 300)).save(tmp_path / "b.png")
    record = records_of([tmp_path / "a.png"], num_repeats=2)
    regularization = records_of([tmp_path / "b.png"], subset_index=1, is_reg=True)
    config = dataset_config(resolution=(128, 128), network_multiplier=0.5)
    subsets = SubsetConfig(image_dir="pictures", random_crop=True), SubsetConfig(image_dir="reg", is_reg=True)
    config = type(config)(**{**config.__dict__, "subsets": subsets})
    text, _ = show_dataset(group_of((config, [*record, *regularization]), prior_loss_weight=0.25), tmp_path / "out")
    content = text.read_text(encoding="utf-8")
    expected = {
        "dataset 0 (dreambooth): resolution 128x128, batch size 2, 2 batches, 3 samples", "  bucket 128x128: 3 samples",
        "  caption: a, red, green, blue", "  subset: 0 (pictures)", "  subset: 1 (reg)", "  repeats: 2",
        "  regularisation: True", "  loss weight: 0.25", "  cut at (left, top): a random place",
        "  cut at (left, top): (0, 0)", "  network multiplier: 0.5", "  original size (h, w): [200, 300]",
        "  flipped: False", "  tokens: {'ids': [8]}",
    }  # fmt: skip
    assert expected <= set(content.split("\n"))


def test_at_most_the_limit_is_shown_and_long_captions_fit(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    records = records_of([tmp_path / "a.png"], num_repeats=9, caption="word, " * 100 + "\u0000 \u2603 end")
    text, sheet = show_dataset(group_of((dataset_config(), records)), tmp_path / "out", limit=5)
    content = text.read_text(encoding="utf-8")
    assert "#4 batch" in content and "#5 batch" not in content
    with Image.open(sheet) as image:
        assert image.size == (5 * (TILE + GAP), TILE + 6 * LINE + GAP)


def test_an_old_sheet_does_not_stay_beside_a_text_without_pictures(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    group = group_of((dataset_config(), records_of([tmp_path / "a.png"])))
    assert len(show_dataset(group, tmp_path / "out")) == 2
    assert show_dataset(group, tmp_path / "out", limit=0) == [tmp_path / "out" / "samples.txt"]
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


# --- the window -----------------------------------------------------------------------------------------------
class _Terminal:
    """Standard output of somebody who sits before the program, or does not."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(
    ("platform", "variables", "is_terminal", "expected"),
    [
        ("linux", {}, True, False), ("linux", {"DISPLAY": ":0"}, True, True),
        ("linux", {"DISPLAY": ":0"}, False, False), ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True, True),
        ("win32", {}, True, True), ("darwin", {}, False, False),
    ],
)
def test_a_window_opens_only_for_somebody_with_a_display(
    tmp_path, monkeypatch, platform, variables, is_terminal, expected
):
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    shown: list[tuple[int, int]] = []
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preview.sys, "platform", platform)
    monkeypatch.setattr(preview.sys, "stdout", _Terminal(is_terminal=is_terminal))
    monkeypatch.setattr(preview.ImageShow, "show", lambda image, title: shown.append(image.size) or True)
    result = open_window(tmp_path / "sheet.png")
    monkeypatch.undo()
    assert result is expected
    assert shown == [(8, 8)] * expected
