"""`flux_minimal_inference.py`: pictures equal to diffusers', networks, questions at the keyboard, refusals."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import flux_minimal_inference
from library import tool_launch
from library.families import minimal
from library.generation.engine import DrawSettings, draw_batch
from library.generation.request import ImageRequest
from library.options.minimal_inference import FluxMinimalOptions
from networks import lora_flux
from tests.flux_tiny import FILES, TRANSFORMER, flux_family, without_guidance
from tests.golden import FOLDER
from tests.training import TOKENIZERS, clean_process

SIZE = ("--width", "64", "--height", "48")


def arguments(folder: Path, *further: str | Path) -> list[str]:
    words: list[str | Path] = ["--ckpt_path", TRANSFORMER, "--tokenizer_cache_dir", TOKENIZERS, "--output_dir", folder]
    for name, path in FILES.items():
        words += [f"--{name}", path]
    return [str(word) for word in (*words, *SIZE, "--steps", "2", "--seed", "5", *further)]


def run(folder: Path, *further: str | Path) -> list[Path]:
    """Pictures that the script writes, oldest first."""
    with clean_process():
        tool_launch.main(flux_minimal_inference.TOOL, arguments(folder, *further))
    return sorted(folder.glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def refusal(capsys, folder: Path, *further: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        run(folder, *further)
    assert caught.value.code == 2
    return capsys.readouterr().err


# --- diffusers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("negative", "scale"), [("", 1.0), ("blurry", 3.0)])
def test_a_picture_equals_that_of_the_diffusers_pipeline(negative, scale, tmp_path):
    """The model goes through our Diffusers folder; the start noise is that of one seed."""
    from diffusers import FluxPipeline

    family = flux_family(guidance_scale=3.5)
    family.save(tmp_path, layout="diffusers_safetensors", dtype=None, metadata={})
    pipeline = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipeline(
            "a cat girl", negative_prompt=negative, true_cfg_scale=scale, height=64, width=96, num_inference_steps=3,
            guidance_scale=2.5, generator=torch.Generator("cpu").manual_seed(7), output_type="pt",
        ).images
    request = ImageRequest(
        "a cat girl", negative, width=96, height=64, steps=3, seed=7, scale=scale, guidance_scale=2.5
    )
    ours = draw_batch(family, [request], device="cpu", dtype=torch.float32, settings=DrawSettings())
    assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-3)
    assert theirs.std() > 0.01


# --- the script ------------------------------------------------------------------------------------------------
def test_the_same_seed_draws_the_same_picture_and_guidance_changes_it(tmp_path):
    [first] = run(tmp_path / "a")
    [again] = run(tmp_path / "b", "--offload", "--t5xxl_dtype", "fp32")
    [other] = run(tmp_path / "c", "--guidance", "1.0")
    assert pixels(first).shape == (48, 64, 3)
    assert (pixels(first) == pixels(again)).all()
    assert (pixels(first) != pixels(other)).any()


def test_schnell_takes_four_steps_and_dev_fifty(tmp_path):
    steps = {}
    for name, path in {"dev": TRANSFORMER, "schnell": without_guidance(tmp_path)}.items():
        options = FluxMinimalOptions(ckpt_path=str(path), **{key: str(file) for key, file in FILES.items()})
        steps[name] = minimal.flux(options).request["steps"]
    assert steps == {"dev": 50, "schnell": 4}


def test_a_network_hooked_in_merged_and_at_half_strength(tmp_path):
    family = flux_family()
    network = lora_flux.create_network(1.0, 2, 2.0, None, family.text_encoders, family.denoiser)
    torch.manual_seed(0)
    state = {k: v if k.endswith("alpha") else torch.randn(v.shape) * 0.3 for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, torch.float32, {})
    [plain] = run(tmp_path / "plain")
    [hooked] = run(tmp_path / "hooked", "--lora_weights", path)
    [merged] = run(tmp_path / "merged", "--lora_weights", path, "--merge_lora_weights")
    [half] = run(tmp_path / "half", "--lora_weights", f"{path};0.5")
    assert np.abs(pixels(hooked) - pixels(merged)).max() <= 1
    assert np.abs(pixels(hooked) - pixels(plain)).max() > 3
    assert np.abs(pixels(hooked) - pixels(half)).max() > 3


def test_lines_from_the_keyboard_keep_sizes_and_begin_with_the_command_line(tmp_path, monkeypatch):
    lines = "a cat --w 32 --d 1\na dog --g 1.5 --d 1\na dog --d 1 --n blurry --c 2\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    files = run(tmp_path, "--interactive")
    shapes = [pixels(path).shape for path in files]
    assert shapes == [(48, 32, 3)] * 3
    assert len({pixels(path).tobytes() for path in files}) == 3


# --- refusals --------------------------------------------------------------------------------------------------
def test_refusals_name_the_option_before_the_model_loads(tmp_path, capsys):
    said = refusal(capsys, tmp_path, "--width", "40", "--steps", "0")
    assert "--width 40 is not allowed: it must be a multiple of 16" in said and "--steps 0" in said
    assert "--t5xxl nowhere: no such file or folder" in refusal(capsys, tmp_path, "--t5xxl", "nowhere")
    assert "--dtype int3: allowed are" in refusal(capsys, tmp_path, "--dtype", "int3")
    assert "--model_type chroma: only flux" in refusal(capsys, tmp_path, "--model_type", "chroma")
    other = FOLDER / "models" / "sd1_lora_start.safetensors"
    wrong = FOLDER / "models" / "t5xxl_tiny.safetensors"
    assert "it is no network for this model" in refusal(capsys, tmp_path, "--lora_weights", wrong)
    assert "it is no network for this model" in refusal(capsys, tmp_path, "--lora_weights", other)
