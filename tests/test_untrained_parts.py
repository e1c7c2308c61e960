"""Whole-model training writes the parts that it does not train as it has read them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.stored import fill_from_file, forget_stored, remembering, weights_of
from library.checkpoints.tensors import open_tensors
from tests import sd3_tiny
from tests.golden import FOLDER
from tests.training import MODEL, TOKENIZERS, run_script

SDXL_MODEL = FOLDER / "models" / "sdxl_tiny.safetensors"
COMMON = (
    "--tokenizer_cache_dir", TOKENIZERS, "--max_data_loader_n_workers", "0", "--seed", "1", "--learning_rate", "1e-3",
    "--mixed_precision", "bf16", "--max_train_steps", "1", "--output_name", "run",
)  # fmt: skip


def half(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """The file in float16 with values that bfloat16 cannot hold."""
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in load_file(source).items()}
    if target.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, target)
    else:
        save_file(tensors, target)
    return tensors


def dataset(tmp_path: Path) -> Path:
    """The recorded pictures, with caches in a folder of their own."""
    text = (FOLDER / "dataset_ti.toml").read_text(encoding="utf-8")
    path = tmp_path / "dataset.toml"
    pictures = shutil.copytree(FOLDER / "dataset", tmp_path / "pictures")
    path.write_text(text.replace('"dataset"', repr(str(pictures))), encoding="utf-8")
    return path


def share_of_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], *prefixes: str) -> float:
    keys = [key for key in before if key.startswith(prefixes) and "position_ids" not in key]
    assert keys and all(key in after for key in keys)
    same = [before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in keys]
    return sum(same) / len(same)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_vae_and_frozen_text_encoder_keep_their_bits(ending, tmp_path):
    model = tmp_path / f"model.{ending}"
    before = half(MODEL, model)
    run_script(
        "train_db",
        "--pretrained_model_name_or_path",
        model,
        "--dataset_config",
        dataset(tmp_path),
        *COMMON,
        "--stop_text_encoder_training",
        "-1",
        "--save_model_as",
        "safetensors",
        "--output_dir",
        tmp_path / "out",
    )
    after = load_file(tmp_path / "out" / "run.safetensors")
    assert share_of_equal(before, after, "first_stage_model.", "cond_stage_model.") == 1
    assert share_of_equal(before, after, "model.diffusion_model.") < 0.1


def test_a_trained_text_encoder_is_written_as_trained_and_precision_is_that_of_the_option(tmp_path):
    before = half(MODEL, tmp_path / "model.safetensors")
    run_script(
        "train_db",
        "--pretrained_model_name_or_path",
        tmp_path / "model.safetensors",
        "--dataset_config",
        dataset(tmp_path),
        *COMMON,
        "--save_model_as",
        "safetensors",
        "--full_bf16",
        "--save_precision",
        "float",
        "--output_dir",
        tmp_path / "out",
    )
    after = load_file(tmp_path / "out" / "run.safetensors")
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float32}
    exact = {key: value.float() if value.is_floating_point() else value for key, value in before.items()}
    assert share_of_equal(exact, after, "first_stage_model.") == 1
    assert share_of_equal(exact, after, "cond_stage_model.transformer.text_model.encoder.layers.0.") < 0.5


@pytest.mark.slow
def test_every_encoder_of_larger_models_keeps_its_bits_in_files_and_folders(tmp_path):
    before = half(SDXL_MODEL, tmp_path / "model.safetensors")
    vae = {key.removeprefix("first_stage_model."): value for key, value in before.items() if "first_stage" in key}
    save_file({key: value.float() * 1.001 for key, value in vae.items()}, tmp_path / "vae.safetensors")
    common = (
        "--pretrained_model_name_or_path",
        tmp_path / "model.safetensors",
        "--dataset_config",
        dataset(tmp_path),
        *COMMON,
    )
    run_script("sdxl_train", *common, "--save_model_as", "safetensors", "--output_dir", tmp_path / "file")
    after = load_file(tmp_path / "file" / "run.safetensors")
    assert share_of_equal(before, after, "first_stage_model.", "conditioner.") == 1
    run_script(
        "sdxl_train",
        *common,
        "--save_model_as",
        "diffusers_safetensors",
        "--vae",
        tmp_path / "vae.safetensors",
        "--output_dir",
        tmp_path / "folder",
    )
    written = load_file(tmp_path / "folder" / "run" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    text = load_file(tmp_path / "folder" / "run" / "text_encoder" / "model.safetensors")
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(text[key], before[f"conditioner.embedders.0.transformer.{key}"])


@pytest.mark.slow
def test_the_vae_of_a_transformer_model_keeps_its_bits(tmp_path):
    words = [word for name, path in sd3_tiny.FILES.items() for word in (f"--{name}", path)]
    model = Path(words[words.index("--pretrained_model_name_or_path") + 1])
    before = half(model, tmp_path / "model.safetensors")
    words[words.index("--pretrained_model_name_or_path") + 1] = tmp_path / "model.safetensors"
    run_script(
        "sd3_train",
        *words,
        "--dataset_config",
        dataset(tmp_path),
        *COMMON,
        "--cache_text_encoder_outputs",
        "--output_dir",
        tmp_path / "out",
    )
    after = load_file(tmp_path / "out" / "run.safetensors")
    assert share_of_equal(before, after, "first_stage_model.") == 1


# --- what is remembered ----------------------------------------------------------------------------------------
def filled(path: Path, dtype: torch.dtype) -> torch.nn.Linear:
    module = torch.nn.Linear(2, 2, device="meta")
    fill_from_file(module, open_tensors(path), component="layer", dtype=dtype)
    return module


@pytest.fixture
def file(tmp_path) -> Path:
    save_file({"weight": torch.full((2, 2), 1 / 3).half(), "bias": torch.ones(2).half()}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_only_what_a_cast_takes_away_is_remembered_and_only_when_asked_for(file):
    assert weights_of(filled(file, torch.bfloat16))["weight"].dtype == torch.bfloat16
    with remembering():
        exact, module = filled(file, torch.float32), filled(file, torch.bfloat16)
    assert weights_of(exact)["weight"].dtype == torch.float32
    assert torch.equal(weights_of(exact.bfloat16())["weight"], load_file(file)["weight"])
    assert torch.equal(weights_of(module)["weight"], load_file(file)["weight"])
    forget_stored(module)
    assert weights_of(module)["weight"].dtype == torch.bfloat16


def test_a_file_that_has_changed_is_not_read_again(file, caplog):
    with remembering():
        module = filled(file, torch.bfloat16)
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, file)
    assert torch.equal(weights_of(module)["weight"], torch.full((2, 2), 1 / 3).half().bfloat16())
    assert "has changed since it was read" in caplog.text
