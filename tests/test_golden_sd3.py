"""Our own SD3 training steps against the recorded steps of the reference trainer, on the same tiny models.

The recordings cached the text of all three encoders; so do these runs. `sd3_full` was recorded with a float32 copy of
the model file; here the float16 file itself is loaded, because without mixed precision it is cast.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library import launch, training_loop
from library.data.records import Batch
from library.families.sd3 import StableDiffusion3
from library.methods.full import FullTraining
from library.options import Options
from library.train_util import Run, StepPlan, make_accelerator
from tests import test_golden_full, test_golden_runs
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.test_golden_runs import BATCHES_PER_EPOCH, assert_step_matches, rates
from tests.training import clean_process

SCRIPTS = {"sd3_lora": "sd3_train_network", "sd3_full": "sd3_train"}
MODEL = ("--pretrained_model_name_or_path", "models/sd3_tiny.safetensors")


def recorded_options(golden: GoldenRun, script: str, tmp_path: Path) -> Options:
    """What the script makes of the recorded command line."""
    words = [*golden.record["options"], *MODEL, "--output_dir", str(tmp_path), "--output_name", golden.name]
    options = launch.parse(importlib.import_module(script).SCRIPT, words)
    assert isinstance(options, Options)
    return options


def start_run(golden: GoldenRun, script: str, tmp_path: Path) -> tuple[Run, dict[str, dict[str, Tensor]]]:
    """(the run that the script makes of the recorded options, caption -> cached text), encoders forgotten."""
    options = recorded_options(golden, script, tmp_path)
    family = StableDiffusion3(options)
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
    assert family.text_encoders == [None, None, None]
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


def save(run: Run, path: Path) -> dict[str, Tensor]:
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
    golden = golden_run("sd3_lora_reseed")
    monkeypatch.chdir(FOLDER)
    with clean_process():
        run, texts = start_run(golden, "sd3_train_network", tmp_path)
        for index in range(len(golden.steps)):
            batch, used = recorded_batch(run, golden, index, texts), rates(run)
            torch.manual_seed(10000 + index)
            random.seed(10000 + index)
            outcome = run.step(batch, sync=True)
            assert_step_matches(golden, index, outcome.loss, outcome.grad_norm, used)
        saved = save(run, tmp_path / "result.safetensors")
    test_golden_runs.assert_saved_tensors_match(golden, saved)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_family_describes_itself_as_recorded(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    family = StableDiffusion3(recorded_options(golden, SCRIPTS[name], tmp_path))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    said, wanted = family.model_metadata(), golden.record["saved_metadata"]
    assert said["architecture"] == wanted["modelspec.architecture"].removesuffix("/lora")
    assert said["prediction_type"] == wanted["modelspec.prediction_type"]
    assert "{0}x{0}".format(said["default_resolution"]) == wanted["modelspec.resolution"]
    entries = {key: str(value) for key, value in said.items() if key.startswith("ss_")}
    if name == "sd3_lora":
        assert entries == {key: wanted[key] for key in entries}
