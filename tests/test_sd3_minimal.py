"""`sd3_minimal_inference.py`: pictures equal to diffusers', networks, questions at the keyboard, refusals."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import sd3_minimal_inference
from library import tool_launch
from library.generation.engine import DrawSettings, draw_batch
from library.generation.request import ImageRequest
from networks import lora_sd3
from tests.sd3_tiny import FILES, tiny_family
from tests.training import clean_process


def run(folder: Path, *further: str | Path) -> list[Path]:
    """Pictures that the script writes, oldest first."""
    words: list[str | Path] = ["--output_dir", folder, "--width", "64", "--height", "48", "--steps", "2"]
    for name, path in FILES.items():
        words += [f"--{'ckpt_path' if name == 'pretrained_model_name_or_path' else name}", path]
    with clean_process():
        tool_launch.main(sd3_minimal_inference.TOOL, [str(word) for word in (*words, *further)])
    return sorted(folder.glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_picture_equals_that_of_the_diffusers_pipeline(tmp_path):
    """The model goes through our Diffusers folder; the start noise is that of one seed."""
    from diffusers import StableDiffusion3Pipeline

    family = tiny_family()
    family.save(tmp_path, layout="diffusers_safetensors", dtype=None, metadata={})
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipeline(
            "a cat girl", negative_prompt="blurry", height=64, width=96, num_inference_steps=4, guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(7), output_type="pt",
        ).images
    request = ImageRequest("a cat girl", "blurry", width=96, height=64, steps=4, seed=7, scale=5.0)
    ours = draw_batch(family, [request], device="cpu", dtype=torch.float32, settings=DrawSettings())
    assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-3)
    assert theirs.std() > 0.01


def test_the_same_seed_draws_the_same_picture_and_options_change_it(tmp_path):
    [first] = run(tmp_path / "a")
    [again] = run(tmp_path / "b", "--offload", "--seed", "1")
    changed = {
        name: run(tmp_path / name, *words)[0]
        for name, words in {
            "scale": ("--cfg_scale", "1"), "negative": ("--negative_prompt", "blurry"), "seed": ("--seed", "2"),
            "mask": ("--apply_t5_attn_mask",), "length": ("--t5xxl_token_length", "64"),
        }.items()
    }  # fmt: skip
    assert pixels(first).shape == (48, 64, 3)
    assert (pixels(first) == pixels(again)).all()
    for name, path in changed.items():
        assert (pixels(first) != pixels(path)).any(), name


def test_a_network_hooked_in_merged_and_at_half_strength(tmp_path):
    family = tiny_family()
    network = lora_sd3.create_network(1.0, 2, 2.0, None, family.text_encoders, family.denoiser)
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
    lines = "a cat --w 32\na dog\na dog --n - --c 2\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    files = run(tmp_path, "--interactive", "--negative_prompt", "blurry")
    assert [pixels(path).shape for path in files] == [(48, 32, 3)] * 3
    assert len({pixels(path).tobytes() for path in files}) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--width", "40"), "--width 40 is not allowed: it must be a multiple of 16"),
        (("--fp16", "--bf16"), "--fp16 and --bf16 exclude each other"),
        (("--clip_g", "nowhere"), "--clip_g nowhere: no such file or folder"),
        (("--t5xxl_token_length", "0"), "--t5xxl_token_length 0"),
        (("--lora_weights", str(FILES["clip_l"])), "it is no network for this model"),
    ],
)
def test_refusals_name_the_option_before_the_model_loads(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "out", *words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
