"""Our own FLUX training steps against the recorded steps of the reference trainer, on the same tiny models.

The recordings cached the text of CLIP-L and T5; so do these runs: the encoders are forgotten before the first step.
"""

from __future__ import annotations

import dataclasses
import importlib
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library import launch, training_loop
from library.data.records import Batch
from library.families.flux import Flux
from library.methods.full import FullTraining
from library.train_util import Run, StepPlan, make_accelerator
from tests import test_golden_full, test_golden_runs
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.test_golden_full import recorded_options
from tests.test_golden_runs import BATCHES_PER_EPOCH, assert_step_matches, rates
from tests.training import clean_process

SCRIPTS = {
    "flux_lora_sigmoid": "flux_train_network", "flux_lora_shift": "flux_train_network", "flux_full": "flux_train",
}  # fmt: skip


def start_run(golden: GoldenRun, script: str, tmp_path) -> tuple[Run, dict[str, dict[str, Tensor]]]:
    """(the run that the script makes of the recorded options, caption -> cached text), encoders forgotten."""
    options = recorded_options(golden, script, tmp_path)
    family = Flux(options)
    method = launch.resolve(importlib.import_module(script).SCRIPT.method)(options, family)
    assert family.check_options() + method.check_options() == []
    accelerator = make_accelerator(options, 0.0)
    placement = training_loop.placement_for(options, accelerator)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    method.before_caching(placement)
    captions = sorted({caption for step in golden.steps for caption in step["captions"]})
    with torch.no_grad():
        encoded = family.encode_text_for_cache(family.tokenize(captions))
    texts = {caption: {k: v[row].float() for k, v in encoded.items()} for row, caption in enumerate(captions)}
    plan = StepPlan.make(options, BATCHES_PER_EPOCH, 1)
    run, _ = training_loop.make_run(options, method, placement, accelerator, plan, 42)
    family.release_text_encoders(family.cached_text_encoders(method.trained_text_encoders()))
    assert family.text_encoders == [None, None]
    if golden.record.get("initial_lora_down_file"):
        info = method.network.load_state_dict(golden.initial_weights, strict=False)
        assert not info.unexpected_keys
        assert all("lora_down" not in key for key in info.missing_keys)
    return run, texts


def recorded_batch(run: Run, golden: GoldenRun, index: int, texts: dict[str, dict[str, Tensor]]) -> Batch:
    """The batch of one recorded step, with its cached text in place of tokens."""
    batch = test_golden_runs.recorded_batch(run, golden, index)
    of_batch = [texts[caption] for caption in batch.captions]
    outputs = {name: torch.stack([text[name] for text in of_batch]) for name in of_batch[0]}
    return dataclasses.replace(batch, tokens=None, text_outputs=outputs)


def save(run: Run, path) -> dict[str, Tensor]:
    with run.inference():
        run.method.save(path, dtype=torch.float32, metadata={})
    return load_file(path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run, texts = start_run(golden, SCRIPTS[name], tmp_path)
        for index, step in enumerate(golden.steps):
            used = rates(run)
            outcome = run.step(
                recorded_batch(run, golden, index, texts), sync=True,
                timesteps=golden.tensors[f"timesteps.{index}"].float(), noise=golden.tensors[f"noise.{index}"],
            )
            assert step["optimizer_step"]
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
        trained = sum(parameter.numel() for parameter in run.method.trained_parameters())
        saved = save(run, tmp_path / "result.safetensors")
    assert [trained] == golden.steps[0]["param_group_sizes"]
    if isinstance(run.method, FullTraining):
        test_golden_full.assert_saved_tensors_match(golden, saved)
    else:
        test_golden_runs.assert_saved_tensors_match(golden, saved)


def test_reseeded_steps_draw_noise_and_timesteps_in_the_recorded_order(tmp_path, monkeypatch):
    golden = golden_run("flux_lora_reseed")
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run, texts = start_run(golden, "flux_train_network", tmp_path)
        for index in range(len(golden.steps)):
            batch, used = recorded_batch(run, golden, index, texts), rates(run)
            torch.manual_seed(10000 + index)
            random.seed(10000 + index)
            outcome = run.step(batch, sync=True)
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
        saved = save(run, tmp_path / "result.safetensors")
    test_golden_runs.assert_saved_tensors_match(golden, saved)


def test_the_denoiser_gets_the_recorded_inputs(tmp_path, monkeypatch):
    golden = golden_run("flux_lora_shift")
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run, texts = start_run(golden, SCRIPTS["flux_lora_shift"], tmp_path)
    calls = []
    run.method.family.denoiser.register_forward_pre_hook(
        lambda _module, _inputs, named: calls.append(named), with_kwargs=True
    )
    for index in range(2):
        batch = recorded_batch(run, golden, index, texts)
        timesteps, noise = golden.tensors[f"timesteps.{index}"].float(), golden.tensors[f"noise.{index}"]
        with torch.no_grad():
            run.method.loss(batch, timesteps=timesteps, noise=noise)
        for name in ("img", "img_ids", "txt", "y", "timesteps", "guidance"):
            record, found = golden.steps[index]["model_call"][name], calls[-1][name]
            assert list(found.shape) == record["shape"], name
            first = found.flatten()[: len(record["first"])].tolist()
            assert first == pytest.approx(record["first"], rel=1e-5, abs=1e-6), name
            assert float(found.mean()) == pytest.approx(record["mean"], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["flux_lora_sigmoid", "flux_full"])
def test_saved_metadata_agrees_with_the_recording(name, tmp_path, monkeypatch):
    """What the family says about itself and its options, in the recorded words."""
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    said = Flux(recorded_options(golden, SCRIPTS[name], tmp_path)).model_metadata()
    wanted = golden.record["saved_metadata"]
    assert said["architecture"] == wanted["modelspec.architecture"].removesuffix("/lora")
    assert said["prediction_type"] is None and "modelspec.prediction_type" not in wanted
    entries = {key: str(value) for key, value in said.items() if key.startswith("ss_")}
    assert {key: wanted[key] for key in entries if key in wanted} == {k: v for k, v in entries.items() if k in wanted}
    if name == "flux_lora_sigmoid":
        assert set(entries) <= set(wanted)
