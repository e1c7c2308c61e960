"""Our own SDXL training steps against the recorded steps of the reference trainer, on the same tiny model.

The model's text projection is symmetric, because the reference never transposes it: the orientation is tested in
`test_sdxl_family.py`.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file

from library import launch, training_loop
from library.families.sdxl import StableDiffusionXL
from library.metadata import TrainingMetadata
from library.methods.full import FullTraining
from library.train_util import Run, StepPlan, make_accelerator
from tests import test_golden_full, test_golden_runs
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.test_golden_runs import BATCHES_PER_EPOCH, assert_step_matches, rates, recorded_batch
from tests.training import clean_process

SCRIPTS = {"sdxl_lora": "sdxl_train_network", "sdxl_full": "sdxl_train"}


def start_run(golden: GoldenRun, script: str, tmp_path) -> Run:
    """The run that the script makes of the recorded options, without its data."""
    words = [*golden.record["options"], "--output_dir", str(tmp_path), "--output_name", golden.name]
    script_of = importlib.import_module(script).SCRIPT
    options = launch.parse(script_of, words)
    family = StableDiffusionXL(options)
    method = launch.resolve(script_of.method)(options, family)
    assert family.check_options() + method.check_options() == []
    accelerator = make_accelerator(options, 0.0)
    placement = training_loop.placement_for(options, accelerator)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    method.before_caching(placement)
    plan = StepPlan.make(options, BATCHES_PER_EPOCH, 1)
    run, _ = training_loop.make_run(options, method, placement, accelerator, plan, 42)
    if golden.record.get("initial_lora_down_file"):
        info = method.network.load_state_dict(golden.initial_weights, strict=False)
        assert not info.unexpected_keys
        assert all("lora_down" not in key for key in info.missing_keys)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run = start_run(golden, SCRIPTS[name], tmp_path)
        for index, step in enumerate(golden.steps):
            used = rates(run)
            outcome = run.step(
                recorded_batch(run, golden, index), sync=True, timesteps=golden.tensors[f"timesteps.{index}"].float(),
                noise=golden.tensors[f"noise.{index}"],
            )
            assert step["optimizer_step"]
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
        path = tmp_path / "result.safetensors"
        is_full = isinstance(run.method, FullTraining)
        metadata = TrainingMetadata(run.options, None, run.method, None).at(epoch=2, steps=8) if is_full else {}
        with run.inference():
            run.method.save(path, dtype=torch.float32, metadata=metadata)
    if is_full:
        test_golden_full.assert_saved_tensors_match(golden, load_file(path))
        test_golden_full.assert_metadata_matches(golden, path)
    else:
        test_golden_runs.assert_saved_tensors_match(golden, load_file(path))


def test_the_denoiser_gets_the_recorded_inputs(tmp_path, monkeypatch):
    """Context, vector and timesteps of the first recorded steps, text encoded live."""
    golden = golden_run("sdxl_lora")
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run = start_run(golden, SCRIPTS["sdxl_lora"], tmp_path)
    calls = []
    run.method.family.denoiser.register_forward_pre_hook(
        lambda _module, _words, named: calls.append(named), with_kwargs=True
    )
    for index in range(2):
        batch = recorded_batch(run, golden, index)
        timesteps, noise = golden.tensors[f"timesteps.{index}"].float(), golden.tensors[f"noise.{index}"]
        with torch.no_grad():
            run.method.loss(batch, timesteps=timesteps, noise=noise)
        wanted = golden.steps[index]["model_call"]
        assert set(calls[-1]) - {"residuals"} == set(wanted)
        for name, record in wanted.items():
            found = calls[-1][name]
            assert list(found.shape) == record["shape"], name
            assert found.flatten()[:4].tolist() == pytest.approx(record["first"], rel=1e-5, abs=1e-6), name
            assert float(found.float().mean()) == pytest.approx(record["mean"], rel=1e-4, abs=1e-6), name
        assert [ids[0, 0, :16].tolist() for ids in batch.tokens.values()] == golden.steps[index]["input_ids"]
