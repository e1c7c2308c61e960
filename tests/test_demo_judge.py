"""The demo's picture generator and judge: same seed, same picture; the judge names what the generator drew."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import judge as judge_module  # noqa: E402
import shapes  # noqa: E402


def test_pictures_are_a_function_of_the_seed() -> None:
    first, scene = shapes.known_picture(5)
    second, same_scene = shapes.known_picture(5)
    other, _ = shapes.known_picture(6)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert scene == same_scene and np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(shapes.free_drawing(9), shapes.free_drawing(9))
    assert np.array_equal(shapes.vae_picture(12), shapes.vae_picture(12))


def test_shapes_stay_inside_the_picture() -> None:
    for seed in range(60):
        picture, scene = shapes.known_picture(seed, shapes.ALL_SHAPES)
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(int)
        assert np.ptp(frame, axis=0).max() == 0, scene


def test_judge_names_what_was_drawn() -> None:
    wrong = []
    for seed in range(300):
        picture, scene = shapes.known_picture(10_000 + seed, shapes.ALL_SHAPES)
        if not judge_module.judge(picture).matches(scene.shape, scene.colour, scene.background):
            wrong.append(scene)
    assert len(wrong) <= 3, wrong


def test_judge_withstands_noise_and_jpeg(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = 0
    for seed in range(100):
        picture, scene = shapes.known_picture(20_000 + seed, shapes.ALL_SHAPES)
        noisy = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "noisy.jpg", quality=85)
        with Image.open(tmp_path / "noisy.jpg") as image:
            right += judge_module.judge(image).matches(scene.shape, scene.colour, scene.background)
    assert right >= 97


def test_judge_refuses_what_is_no_shape() -> None:
    flat = np.full((64, 64, 3), 246, np.uint8)
    assert judge_module.judge(flat).shape == judge_module.UNKNOWN
    assert judge_module.judge(flat).background == "white"
    blobs = flat.copy()
    blobs[8:20, 8:20] = blobs[44:56, 44:56] = (218, 46, 52)
    assert judge_module.judge(blobs).shape == judge_module.UNKNOWN
    green_paper = np.full((64, 64, 3), (52, 168, 83), np.uint8)
    assert judge_module.judge(green_paper).background == judge_module.UNKNOWN


def test_judge_takes_other_sizes_and_refuses_grey_arrays() -> None:
    picture, scene = shapes.known_picture(3)
    large = Image.fromarray(picture).resize((512, 512), Image.Resampling.BICUBIC)
    assert judge_module.judge(large).matches(scene.shape, scene.colour, scene.background)
    with pytest.raises(ValueError, match="RGB"):
        judge_module.judge(np.zeros((64, 64), np.uint8))


def test_captions_are_compared_by_what_they_name() -> None:
    verdict = judge_module.Verdict("star", "red", "white")
    assert judge_module.agrees(verdict, "a sks red star on a white background")
    assert judge_module.agrees(verdict, "a star")
    assert not judge_module.agrees(verdict, "a red circle on a white background")


@pytest.mark.parametrize(("kind", "extension"), [("known", "png"), ("star", "jpg")])
def test_written_folders_hold_pictures_and_captions(tmp_path: Path, kind: str, extension: str) -> None:
    paths = shapes.write_pictures(tmp_path, kind, 20, extension=extension)
    assert len(paths) == 20
    for path in paths:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        assert ("sks" in caption and "star" in caption) == (kind == "star")
        with Image.open(path) as image:
            assert judge_module.agrees(judge_module.judge(image), caption), caption


def test_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        shapes.write_pictures(tmp_path, "cat", 1)
