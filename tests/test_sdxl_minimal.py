"""`sdxl_minimal_inference.py` and `gen_img.py` on the tiny SDXL model, from command line to files."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from library import tool_launch
from library.generation.minimal import Asked, ask_lines, split_strength
from library.generation.request import ImageRequest
from tests.generation import difference, generate, pixels_of, texts_of
from tests.sdxl_tiny import MODEL, sdxl_family, write_sdxl_lora
from tests.training import MODEL as SD1_MODEL
from tests.training import TOKENIZERS, clean_process

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> Path:
    return write_sdxl_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", sdxl_family())


def draw(*arguments: str | Path, outdir: Path) -> list[Path]:
    """The files that the script writes, small and with few steps unless the arguments say otherwise."""
    import sdxl_minimal_inference

    words = [str(word) for word in arguments]
    defaults = {"--ckpt_path": MODEL, "--width": "96", "--height": "64", "--steps": "3"}
    for option, value in defaults.items():
        words += [] if option in words else [option, str(value)]
    with clean_process():
        tool_launch.main(
            sdxl_minimal_inference.TOOL, [*words, "--tokenizer_cache_dir", str(TOKENIZERS), "--output_dir", str(outdir)]
        )
    return sorted(outdir.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, outdir: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        draw(*arguments, outdir=outdir)
    assert stop.value.code == 2
    assert not outdir.exists()
    return capsys.readouterr().err


def test_the_picture_is_that_of_the_diffusers_pipeline(tmp_path):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (path,) = draw("--seed", "5", "--negative_prompt", "dark", outdir=tmp_path / "a")
    assert re.fullmatch(r"image_\d{8}-\d{6}_000\.png", path.name)
    assert texts_of(path)["prompt"] == "A photo of a cat" and texts_of(path)["sampler"] == "euler"
    sdxl_family().save(tmp_path / "m", layout="diffusers_safetensors", dtype=None, metadata={})
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "m", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    image = pipe(
        "A photo of a cat", negative_prompt="dark", width=96, height=64, num_inference_steps=3, guidance_scale=7.0,
        latents=torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5)),
    ).images[0]  # fmt: skip
    image.save(tmp_path / "theirs.png")
    assert pixels_of(path).std() > 0.03
    assert difference(path, tmp_path / "theirs.png") <= 1


def test_the_second_prompt_is_read_by_the_second_encoder(tmp_path):
    (one,) = draw("--seed", "5", outdir=tmp_path / "a")
    (same,) = draw("--seed", "5", "--prompt2", "A photo of a cat", outdir=tmp_path / "b")
    (other,) = draw("--seed", "5", "--prompt2", "a castle at night", outdir=tmp_path / "c")
    assert difference(one, same) == 0 and difference(one, other) > 5


@pytest.mark.slow
def test_a_network_is_merged_with_its_strength(lora_file, tmp_path):
    (plain,) = draw("--seed", "5", outdir=tmp_path / "a")
    (half,) = draw("--seed", "5", "--lora_weights", f"{lora_file};0.5", outdir=tmp_path / "b")
    arguments = ("--prompt", "A photo of a cat --d 5 --w 96", "--ckpt", MODEL, "--steps", "3", "--sampler", "euler",
                 "--scale", "7", "--network_module", "networks.lora", "--network_weights", lora_file)  # fmt: skip
    (theirs,) = generate(*arguments, "--network_mul", "0.5", outdir=tmp_path / "c", script="gen_img")
    assert difference(plain, half) > 5 and difference(half, theirs) <= 1
    assert texts_of(half)["networks"] == "style.safetensors:0.5"


def test_prompts_from_the_keyboard(tmp_path, monkeypatch):
    (wanted,) = draw("--seed", "5", outdir=tmp_path / "a")
    answers = ["A photo of a cat", "", "", "5", "a dog", "a fox", "dark", "x", "a dog", "a fox", "dark", "", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(answers)))
    files = draw("--interactive", "--seed", "9", outdir=tmp_path / "b")
    assert len(files) == 2
    assert difference(files[0], wanted) == 0
    texts = texts_of(files[1])
    assert (texts["prompt"], texts["negative-prompt"]) == ("a dog", "dark") and texts["seed"] not in ("5", "9")


def test_lines_keep_sizes_and_forget_seeds(monkeypatch):
    lines = ["a cat --w 512 --d 3 --n blurry --c 2.5 --m 0.5,1", "a dog --n - --s 7", "a fox", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    template = ImageRequest("ignored", negative_prompt="bad", seed=1, width=256, height=256, steps=20)
    one, two, three = (asked.request for asked in ask_lines(Asked(template)))
    assert (one.prompt, one.width, one.height, one.seed, one.negative_prompt) == ("a cat", 512, 256, 3, "blurry")
    assert (one.scale, one.network_multipliers) == (2.5, (0.5, 1.0))
    assert (two.prompt, two.width, two.seed, two.negative_prompt, two.steps) == ("a dog", 512, 1, "", 7)
    assert (three.negative_prompt, three.steps, three.scale) == ("bad", 7, 2.5)


def test_mistakes_end_before_the_model_loads(tmp_path, capsys, lora_file):
    outdir = tmp_path / "o"
    text = refused(capsys, "--width", "100", "--seed", "-1", "--steps", "0", "--ckpt_path", "no.ckpt", outdir=outdir)
    for name in ("--width 100", "--seed -1", "--steps 0", "--ckpt_path"):
        assert name in text
    assert "there is no file nothing.safetensors" in refused(
        capsys, "--lora_weights", "nothing.safetensors;1", outdir=outdir
    )
    assert "not a number" in refused(capsys, "--lora_weights", f"{lora_file};x", outdir=outdir)
    assert "looks like a Stable Diffusion 1.x" in refused(capsys, "--ckpt_path", SD1_MODEL, outdir=outdir)


def test_strengths_are_split_at_the_last_semicolon(tmp_path):
    assert split_strength("a.safetensors") == ("a.safetensors", 1.0)
    assert split_strength("C;D/a.safetensors;0.5") == ("C;D/a.safetensors", 0.5)
    odd = tmp_path / "a;1"
    odd.write_bytes(b"")
    assert split_strength(str(odd)) == (str(odd), 1.0)


# --- gen_img.py ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_gen_img_tells_the_model_by_its_keys_and_uses_sizes(tmp_path):
    line = "a cat --d 3 --n dog"
    (told,) = generate("--prompt", line, "--ckpt", MODEL, "--sdxl", outdir=tmp_path / "a", script="gen_img")
    (found,) = generate("--prompt", line, "--ckpt", MODEL, outdir=tmp_path / "b", script="gen_img")
    (own,) = generate("--prompt", line, "--ckpt", MODEL, outdir=tmp_path / "e", script="sdxl_gen_img")
    assert difference(told, found) == difference(own, found) == 0 and pixels_of(found).std() > 0.03
    options = ("--original_width", "512", "--crop_top", "40", "--original_height_negative", "900")
    (sized,) = generate("--prompt", line, "--ckpt", MODEL, *options, outdir=tmp_path / "c", script="gen_img")
    in_line = f"{line} --ow 512 --ct 40 --nh 900"
    (lined,) = generate("--prompt", in_line, "--ckpt", MODEL, outdir=tmp_path / "d", script="gen_img")
    assert difference(sized, found) > 0 and difference(sized, lined) == 0


def test_sdxl_gen_img_refuses_other_models(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate("--prompt", "a cat", "--ckpt", SD1_MODEL, outdir=tmp_path / "o", script="sdxl_gen_img")
    assert stop.value.code == 2
    assert "looks like a Stable Diffusion 1.x checkpoint" in capsys.readouterr().err
