"""Recorded runs whose text came from caches (SD3, FLUX.1): our own steps with the same cached text and no encoders."""

from __future__ import annotations

import dataclasses
import importlib
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from library import launch, training_loop
from library.data.records import Batch
from library.methods.full import FullTraining
from library.options import Options
from library.train_util import Run, StepPlan, make_accelerator
from tests import test_golden_full, test_golden_runs
from tests.golden import GoldenRun
from tests.test_golden_runs import BATCHES_PER_EPOCH, assert_step_matches, rates
from tests.training import clean_process

Texts = dict[str, dict[str, Tensor]]  # caption -> cached arrays


def start_run(golden: GoldenRun, script: str, options: Options) -> tuple[Run, Texts]:
    """(the run that the entry script makes of the recorded options, caption -> cached text), encoders forgotten."""
    entry = importlib.import_module(script).SCRIPT
    family = launch.resolve(entry.family)(options)
    method = launch.resolve(entry.method)(options, family)
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
    assert set(family.text_encoders) == {None}
    if golden.record.get("initial_lora_down_file"):
        info = method.network.load_state_dict(golden.initial_weights, strict=False)
        assert not info.unexpected_keys
        assert all("lora_down" not in key for key in info.missing_keys)
    return run, texts


def recorded_batch(run: Run, golden: GoldenRun, index: int, texts: Texts) -> Batch:
    """The batch of one recorded step, with its cached text in place of tokens."""
    batch = test_golden_runs.recorded_batch(run, golden, index)
    of_batch = [texts[caption] for caption in batch.captions]
    outputs = {name: torch.stack([text[name] for text in of_batch]) for name in of_batch[0]}
    return dataclasses.replace(batch, tokens=None, text_outputs=outputs)


def save(run: Run, path: Path) -> dict[str, Tensor]:
    """The tensors of the file that the run saves."""
    with run.inference():
        run.method.save(path, dtype=torch.float32, metadata={})
    return load_file(path)


def assert_injected_steps_match(golden: GoldenRun, script: str, options: Options, tmp_path: Path) -> None:
    """Recorded noise and timesteps: losses, gradient norms, rates and saved tensors are the recorded ones."""
    with clean_process():
        run, texts = start_run(golden, script, options)
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


def assert_reseeded_steps_match(golden: GoldenRun, script: str, options: Options, tmp_path: Path) -> None:
    """Reseeded as the recording was: noise and timesteps are drawn in the recorded order."""
    with clean_process():
        run, texts = start_run(golden, script, options)
        for index in range(len(golden.steps)):
            batch, used = recorded_batch(run, golden, index, texts), rates(run)
            torch.manual_seed(10000 + index)
            random.seed(10000 + index)
            outcome = run.step(batch, sync=True)
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
        saved = save(run, tmp_path / "result.safetensors")
    test_golden_runs.assert_saved_tensors_match(golden, saved)
