"""Learning cases with hint pictures: does the drawn shape lie where the outline of the hint says?"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from learning import ROOT, Measure, run_script
from PIL import Image
from shapes import SIZE, SUPERSAMPLE, Scene, combinations, draw_scene, fill, finish, random_scene, shape_outline

TRAINING_PICTURES = 432
TEST_PICTURES = 18
_LINE_WIDTH = 4.0  # pixels
_OFF_CENTRE = 10.0  # pixels: test shapes stand at least so far from the middle, where a guess would put them
_SHIFT = 8  # fixed-point bits of OpenCV's sub-pixel coordinates


def control_net(folder: Path, words: Sequence[str]) -> list[Measure]:
    """A ControlNet on the demo's Stable Diffusion."""
    return follow_outlines(
        "train_control_net", folder,
        ["--pretrained_model_name_or_path", ROOT / "demo" / "model" / "shapes_sd15.safetensors",
         "--learning_rate", "4e-3", "--max_train_steps", "400", *words],
    )  # fmt: skip


def lllite(folder: Path, words: Sequence[str]) -> list[Measure]:
    """A ControlNet-LLLite on the demo's SDXL."""
    return follow_outlines(
        "sdxl_train_control_net_lllite", folder,
        ["--pretrained_model_name_or_path", ROOT / "demo" / "model" / "shapes_sdxl.safetensors",
         "--tokenizer_cache_dir", ROOT / "demo" / "model" / "tokenizers", "--cache_text_encoder_outputs",
         "--cond_emb_dim", "128", "--network_dim", "256", "--learning_rate", "4e-4", "--max_train_steps", "12000",
         *words],
    )  # fmt: skip


def follow_outlines(script: str, folder: Path, words: Sequence[str | Path]) -> list[Measure]:
    """Train with outlines as hints; mean overlap of drawn and hinted areas before training and after it.

    What is trained starts as an identity, so that the sample images before the first step are those of the base model.
    """
    write_pairs(folder, TRAINING_PICTURES, seed=0)
    scenes = write_prompts(folder, TEST_PICTURES, seed=1)
    words = [str(word) for word in words]
    steps = words[len(words) - 1 - words[::-1].index("--max_train_steps") + 1]
    run_script(
        script, "--train_data_dir", folder / "pictures", "--conditioning_data_dir", folder / "hints",
        "--caption_extension", ".txt", "--resolution", str(SIZE), "--train_batch_size", "8", "--cache_latents",
        "--max_data_loader_n_workers", "0", "--seed", "1", "--lr_scheduler", "cosine", "--debiased_estimation_loss",
        "--min_timestep", "200",  # places are decided at high noise
        "--sample_prompts", folder / "prompts.txt", "--sample_sampler", "ddim", "--sample_at_first",
        "--sample_every_n_steps", steps, "--output_dir", folder / "trained", "--output_name", "hints", *words,
    )  # fmt: skip
    before, after = (overlaps(folder / "trained" / "sample", scenes, when) for when in ("e000000", f"{int(steps):06d}"))
    return [
        Measure("overlap with the hint, without training", float(np.mean(before)), at_most=0.4),
        Measure("overlap with the hint, after training", float(np.mean(after)), at_least=0.7),
    ]


# --- pictures --------------------------------------------------------------------------------------------------
def scenes_of(count: int, seed: int, *, off_centre: float = 0.0) -> list[Scene]:
    """Scenes of all combinations in turn, whose shapes stand at least `off_centre` pixels from the middle."""
    triples = combinations()
    random.Random(seed).shuffle(triples)
    rng = random.Random(f"hints-{seed}")
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, *triples[len(scenes) % len(triples)])
        if math.hypot(scene.centre_x - SIZE / 2, scene.centre_y - SIZE / 2) >= off_centre:
            scenes.append(scene)
    return scenes


def corners_of(scene: Scene) -> np.ndarray:
    """The outline of a scene's shape, [n,2] in pixels."""
    return shape_outline(scene.shape, scene.tilt) * scene.radius + np.array([scene.centre_x, scene.centre_y])


def outline_picture(scene: Scene) -> np.ndarray:
    """The hint: a white outline on black, uint8 [64,64,3]."""
    canvas = np.zeros((SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE, 3), np.uint8)
    points = np.round(corners_of(scene) * (SUPERSAMPLE * (1 << _SHIFT))).astype(np.int32).reshape(-1, 1, 2)
    cv2.polylines(canvas, [points], True, (255, 255, 255), round(_LINE_WIDTH * SUPERSAMPLE), cv2.LINE_8, _SHIFT)
    return finish(canvas, SIZE)


def area_of(scene: Scene) -> np.ndarray:
    """Where a scene's shape is: bool [64,64]."""
    canvas = np.zeros((SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE, 3), np.uint8)
    fill(canvas, corners_of(scene), (255, 255, 255))
    return finish(canvas, SIZE)[..., 0] > 127


def write_pairs(folder: Path, count: int, seed: int) -> None:
    """`pictures/` with captions, and `hints/` with an outline of the same name for each."""
    for name in ("pictures", "hints"):
        (folder / name).mkdir()
    rng = random.Random(f"colours-{seed}")
    for index, scene in enumerate(scenes_of(count, seed)):
        Image.fromarray(draw_scene(scene, rng)).save(folder / "pictures" / f"{index:04d}.png")
        Image.fromarray(outline_picture(scene)).save(folder / "hints" / f"{index:04d}.png")
        (folder / "pictures" / f"{index:04d}.txt").write_text(scene.caption() + "\n", encoding="utf-8")


def write_prompts(folder: Path, count: int, seed: int) -> list[Scene]:
    """`prompts.txt` for scenes that are not trained, whose places only the hints tell."""
    scenes = scenes_of(count, seed, off_centre=_OFF_CENTRE)
    (folder / "test_hints").mkdir()
    lines = []
    for index, scene in enumerate(scenes):
        hint = folder / "test_hints" / f"{index:04d}.png"
        Image.fromarray(outline_picture(scene)).save(hint)
        lines.append(f"{scene.caption()} --w {SIZE} --h {SIZE} --s 12 --l 3 --d {1000 + index} --cn {hint}")
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return scenes


# --- judging ---------------------------------------------------------------------------------------------------
def drawn_area(picture: np.ndarray) -> np.ndarray:
    """Where something is drawn, bool [H,W]: pixels nearer to the paint than to the colour of the border."""
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=2)
    return distance > max(20.0, 0.5 * float(np.percentile(distance, 97)))


def overlaps(folder: Path, scenes: Sequence[Scene], when: str) -> list[float]:
    """Intersection over union of drawn and hinted areas, for the sample images of one time ("000600": step 600)."""
    values = []
    for index, scene in enumerate(scenes):
        [path] = folder.glob(f"hints_{when}_{index:02d}_*.png")
        with Image.open(path) as image:
            drawn = drawn_area(np.asarray(image.convert("RGB")))
        wanted = area_of(scene)
        values.append(float((drawn & wanted).sum() / max(1, (drawn | wanted).sum())))
    return values
