"""The main job, shown to work: the tiny base draws what it knows, and a LoRA teaches it what it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT

OUTPUT = ROOT / "demo" / "output"


@pytest.fixture(scope="module")
def quickstart() -> dict[str, dict[str, float]]:
    """The scores of one run of the example, as `python quickstart.py` starts it."""
    command = [sys.executable, str(ROOT / "demo" / "run_quickstart.py"), "--cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert str(OUTPUT / "before_after.png") in result.stdout
    return json.loads((OUTPUT / "scores.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_base_model_draws_known_prompts_right_and_no_stars(quickstart):
    assert quickstart["before"]["known"] >= 0.90
    assert quickstart["before"]["stars"] <= 0.10


@pytest.mark.slow
def test_the_lora_teaches_the_star_and_keeps_what_was_known(quickstart):
    assert quickstart["after"]["stars"] >= 0.80
    assert quickstart["after"]["known"] >= 0.80


@pytest.mark.slow
def test_the_example_leaves_pictures_curve_and_lora(quickstart):
    assert Image.open(OUTPUT / "before_after.png").width > 600
    assert Image.open(OUTPUT / "loss.png").width > 300
    keys = load_file(OUTPUT / "star_lora.safetensors")
    assert any(key.startswith("lora_te_text_model_encoder_layers_") for key in keys)
    assert os.listdir(OUTPUT / "star_pictures")
