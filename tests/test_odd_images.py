"""Odd and broken picture files through the whole script: read right, or all named in one report."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests.training import PHOTOS, train, write_config


@pytest.fixture
def odd_pictures(tmp_path) -> Path:
    """A folder of unusual but readable pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo = Image.open(PHOTOS / "cat.jpg").convert("RGB")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("P").save(folder / "palette.png", transparency=0)
    photo.convert("LA").save(folder / "grey alpha.png")
    Image.fromarray(numpy.asarray(photo.convert("L")).astype("uint16") * 257).save(folder / "sixteen.png")
    photo.save(folder / "wrong.png", format="JPEG")
    photo.save(folder / "日本語 [1] 😀.webp")
    Image.new("RGB", (1, 1), "red").save(folder / "tiny.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("a cat", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_unusual_pictures_train_and_turned_ones_are_upright(odd_pictures, tmp_path, capfd):
    config = write_config(tmp_path, odd_pictures)
    out = tmp_path / "out"
    train("--dataset_config", config, "--max_train_steps", "2", "--cache_latents", output_dir=out)
    train("--dataset_config", config, "--debug_dataset", output_dir=out)
    shown = (out / "debug_dataset" / "samples.txt").read_text(encoding="utf-8")
    assert "日本語 [1] 😀.webp" in shown
    sheet = Image.open(out / "debug_dataset" / "contact_sheet.png")
    assert min(sheet.size) > 100


def test_one_report_names_every_broken_file(odd_pictures, tmp_path, capfd):
    whole = (PHOTOS / "cat.jpg").read_bytes()
    (odd_pictures / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (odd_pictures / "empty.png").write_bytes(b"")
    (odd_pictures / "text.webp").write_text("no picture")
    for arguments in ([], ["--cache_latents"]):
        with pytest.raises(SystemExit) as stopped:
            train("--dataset_config", write_config(tmp_path, odd_pictures), *arguments, output_dir=tmp_path / "out")
        assert stopped.value.code == 2
        message = capfd.readouterr().err
        for name in ("truncated.jpg", "empty.png", "text.webp"):
            assert name in message
        assert "cmyk.jpg" not in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()
