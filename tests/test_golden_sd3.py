"""Our own SD3 training steps against the recorded steps of the reference trainer, on the same tiny models.

`sd3_full` was recorded with a float32 copy of the model file; here the float16 file itself is loaded, because without
mixed precision it is cast.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from library import launch
from library.families.sd3 import StableDiffusion3
from library.options import Options
from tests.golden import FOLDER, GoldenRun, golden_run
from tests.golden_cached import assert_injected_steps_match, assert_reseeded_steps_match

SCRIPTS = {"sd3_lora": "sd3_train_network", "sd3_full": "sd3_train"}
MODEL = ("--pretrained_model_name_or_path", "models/sd3_tiny.safetensors")


def recorded_options(golden: GoldenRun, script: str, tmp_path: Path) -> Options:
    """What the script makes of the recorded command line."""
    words = [*golden.record["options"], *MODEL, "--output_dir", str(tmp_path), "--output_name", golden.name]
    options = launch.parse(importlib.import_module(script).SCRIPT, words)
    assert isinstance(options, Options)
    return options


@pytest.mark.parametrize("name", SCRIPTS)
def test_injected_steps_reproduce_the_recorded_losses_and_weights(name, tmp_path, monkeypatch):
    golden = golden_run(name)
    monkeypatch.chdir(FOLDER)
    assert_injected_steps_match(golden, SCRIPTS[name], recorded_options(golden, SCRIPTS[name], tmp_path), tmp_path)


def test_reseeded_steps_draw_noise_and_timesteps_in_the_recorded_order(tmp_path, monkeypatch):
    golden = golden_run("sd3_lora_reseed")
    monkeypatch.chdir(FOLDER)
    options = recorded_options(golden, "sd3_train_network", tmp_path)
    assert_reseeded_steps_match(golden, "sd3_train_network", options, tmp_path)


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
