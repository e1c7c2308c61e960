"""Models that say they predict velocity, or that their noise ends pure, are drawn so by every script that draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdxl_minimal_inference
from library import tool_launch
from library.model_files import RecordedNoise, recorded_noise
from library.model_util import load_checkpoint, save_diffusers_folder, scheduler_config
from tests.generation import difference, generate
from tests.sdxl_tiny import MODEL as SDXL
from tests.training import MODEL as SD1
from tests.training import TOKENIZERS, clean_process

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VELOCITY = ("--v_parameterization",)
PURE = ("--v_parameterization", "--zero_terminal_snr")


def marked(path: Path, model: Path, *markers: str, **metadata: str) -> Path:
    """The model with empty tensors of these names, and this metadata."""
    save_file({**load_file(model), **{name: torch.zeros(0) for name in markers}}, path, metadata or None)
    return path


def drawn(folder: Path, model: Path, script: str, *options: str) -> Path:
    (path,) = generate("--prompt", "a cat --d 3", "--ckpt", model, *options, outdir=folder, script=script)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model"),
    [("gen_img", SD1), ("gen_img_diffusers", SD1), ("gen_img", SDXL), ("sdxl_gen_img", SDXL)],
)
def test_markers_do_what_the_options_do(tmp_path: Path, script: str, model: Path, caplog) -> None:
    plain, velocity, pure = (
        drawn(tmp_path / f"{index}", model, script, *options) for index, options in enumerate(((), VELOCITY, PURE))
    )
    caplog.clear()
    for index, (markers, wanted) in enumerate(((("v_pred",), velocity), (("v_pred", "ztsnr"), pure))):
        path = marked(tmp_path / f"{index}.safetensors", model, *markers)
        found = drawn(tmp_path / f"m{index}", path, script)
        assert difference(found, wanted) == 0 and difference(found, plain) > 1
    assert difference(velocity, pure) > 1
    assert "add --v_parameterization" not in caplog.text


def test_metadata_of_saved_models_is_used(tmp_path: Path) -> None:
    path = marked(tmp_path / "v.safetensors", SD1, **{"modelspec.prediction_type": "v"})
    found, wanted = drawn(tmp_path / "a", path, "gen_img"), drawn(tmp_path / "b", SD1, "gen_img", *VELOCITY)
    assert difference(found, wanted) == 0


def test_folders_say_it_in_their_scheduler(tmp_path: Path) -> None:
    modules = load_checkpoint(SD1, v2=False, dtype=torch.float32)
    save_diffusers_folder(tmp_path / "m", modules, scheduler=scheduler_config(v_parameterization=True))
    assert recorded_noise(tmp_path / "m") == RecordedNoise("v", False)
    config = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rescale_betas_zero_snr": True}))
    assert recorded_noise(tmp_path / "m") == RecordedNoise("v", True)


@pytest.mark.slow
def test_the_small_script_draws_velocity_models(tmp_path: Path, caplog) -> None:
    """It has no option for it; SDXL with Euler steps is what gen_img.py draws, apart from the size conditioning."""
    files = {}
    for name, markers in {"plain": (), "v": ("v_pred",), "pure": ("v_pred", "ztsnr")}.items():
        path = marked(tmp_path / f"{name}.safetensors", SDXL, *markers)
        words = ["--ckpt_path", path, "--width", "64", "--height", "64", "--steps", "3", "--seed", "5", "--dtype",
                 "float32", "--tokenizer_cache_dir", TOKENIZERS, "--prompt", "a cat"]  # fmt: skip
        with clean_process():
            tool_launch.main(
                sdxl_minimal_inference.TOOL, [str(word) for word in (*words, "--output_dir", tmp_path / name)]
            )
        (files[name],) = (tmp_path / name).glob("*.png")
        common = ("--prompt", "a cat --d 5 --l 7 --s 3", "--sampler", "euler", "--ckpt", path)
        (wanted,) = generate(*common, outdir=tmp_path / f"w{name}", script="gen_img")
        assert difference(files[name], wanted) <= 1, name
    assert difference(files["plain"], files["v"]) > 1 and difference(files["v"], files["pure"]) > 1
    assert "--v_parameterization" not in caplog.text


def test_a_sampler_that_cannot_begin_with_pure_noise_is_refused_before_loading(tmp_path: Path, capsys) -> None:
    path = marked(tmp_path / "pure.safetensors", SD1, "v_pred", "ztsnr")
    with pytest.raises(SystemExit) as stop:
        drawn(tmp_path / "a", path, "gen_img", "--sampler", "lms")
    assert stop.value.code == 2
    assert "'lms' cannot start from zero terminal SNR" in capsys.readouterr().err
