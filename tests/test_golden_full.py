"""Full training against the recorded steps of the reference trainer, on the same tiny models."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library import training_loop
from library.families.base import ModelFamily
from library.families.sd import StableDiffusion
from library.metadata import TrainingMetadata
from library.methods.full import DreamBoothTraining, FullTraining
from library.options import Options
from library.train_util import Run, StepPlan, make_accelerator
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.test_golden_runs import BATCHES_PER_EPOCH, assert_step_matches, rates, recorded_batch
from tests.training import clean_process

#: run -> (script, method, whether the text encoder is trained)
RUNS = {"sd1_db": ("train_db", DreamBoothTraining, True), "sd1_ft": ("fine_tune", FullTraining, False)}


def recorded_options(golden: GoldenRun, script: str, tmp_path) -> Options:
    """What the script makes of the recorded command line."""
    import importlib

    from library.launch import parse

    words = [*golden.record["options"], "--output_dir", str(tmp_path), "--output_name", golden.name]
    options = parse(importlib.import_module(script).SCRIPT, words)
    assert isinstance(options, Options)
    return options


def start_run(
    options: Options, method_class: type[FullTraining], family_class: type[ModelFamily] = StableDiffusion
) -> Run:
    """The run that the script makes, without its data."""
    family = family_class(options)
    method = method_class(options, family)
    accelerator = make_accelerator(options, 0.0)
    placement = training_loop.placement_for(options, accelerator)
    family.load(weight_dtype=method.loading_dtype(placement), vae_dtype=torch.float32, device="cpu")
    method.before_caching(placement)
    plan = StepPlan.make(options, BATCHES_PER_EPOCH, 1)
    return training_loop.make_run(options, method, placement, accelerator, plan, 42)[0]


def has_zero_gradient(key: str) -> bool:
    """Tensors whose exact gradient is zero (README of the recordings), which follow rounding noise.

    A group norm over single channels cancels every constant in front of it; so does attention for key biases.
    """
    return any(part in key for part in ("emb_layers.1.", "in_layers.2.bias", "k_proj.bias"))


def assert_saved_tensors_match(golden: GoldenRun, saved: dict[str, Tensor]) -> None:
    """`saved_tensors` of the recording leave the VAE out, which nobody trains."""
    record = golden.record
    assert len(saved) == record["saved_tensor_count"]
    assert {key for key in saved if not key.startswith("first_stage_model.")} == set(record["saved_tensors"])
    for key, wanted in record["checked_tensors"].items():
        assert saved[key].flatten()[:8].tolist() == pytest.approx(wanted["first"], abs=1e-4), key
    for key, (shape, dtype, mean, deviation) in record["saved_tensors"].items():
        tensor = saved[key]
        assert (list(tensor.shape), f"torch.{dtype.removeprefix('torch.')}") == (shape, str(tensor.dtype)), key
        if has_zero_gradient(key) or deviation is None:
            continue
        assert float(tensor.float().mean()) == pytest.approx(mean, abs=1e-4), key
        if tensor.numel() > 1:
            assert float(tensor.float().std()) == pytest.approx(deviation, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    script, method_class, trains_text = RUNS[name]
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    options = recorded_options(golden, script, tmp_path)
    with clean_process():
        run = start_run(options, method_class)
        for index, step in enumerate(golden.steps):
            used = rates(run)
            outcome = run.step(
                recorded_batch(run, golden, index), sync=True, timesteps=golden.tensors[f"timesteps.{index}"].float(),
                noise=golden.tensors[f"noise.{index}"],
            )
            assert set(used) == set(step["lr"])  # the reference keeps denoiser and text encoder in one group
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, step["lr"])
        assert sum(parameter.numel() for parameter in run.method.trained_parameters()) == (
            golden.steps[0]["param_group_sizes"][0]
        )
        assert list(run.method.trainable) == ["denoiser", *["text_encoder1"] * trains_text]
        path = tmp_path / f"result{run.method.file_extension}"
        metadata = TrainingMetadata(options, None, run.method, None).at(epoch=2, steps=8)
        with run.inference():
            run.method.save(path, dtype=torch.float32, metadata=metadata)
    assert_saved_tensors_match(golden, load_file(path))
    assert_metadata_matches(golden, path)


def assert_metadata_matches(golden: GoldenRun, path) -> None:
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    wanted = golden.record["saved_metadata"]
    assert set(saved) - {"format"} == set(wanted)
    for key, value in wanted.items():
        if value != "<varies>" and key != "modelspec.implementation_version":
            assert saved[key] == value, key
