"""A family in a file of its own trains with every method that suits it: nothing of the project knows its name."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library import launch
from library.checkpoints.tensors import open_tensors
from library.options.full import FullTrainingOptions
from library.options.script import NETWORK_TRAINING, TRAINING_GROUPS
from library.options.script_options import ScriptOptions
from tests import fifth_family
from tests.conftest import ROOT
from tests.training import clean_process

FULL_TRAINING = ScriptOptions(groups=(FullTrainingOptions, *TRAINING_GROUPS))
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine plain pictures with captions, the model, and a dataset file."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "pictures").mkdir()
    for name, colour in COLOURS.items():
        for index in range(3):
            Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{name}{index}.png")
            (folder / "pictures" / f"{name}{index}.txt").write_text(f"a {name} wall")
    fifth_family.write_model(folder / "model.safetensors")
    pictures = folder / "pictures"
    (folder / "data.toml").write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 9\n[[datasets.subsets]]\nimage_dir = '{pictures}'\n"
        "caption_extension = '.txt'\n"
    )
    return folder


def run(data: Path, name: str, method: str, options: object, *words: str) -> Path:
    """Train; returns the file."""
    script = launch.Script("train_colours.py", "", options, "tests.fifth_family:Colours", method)  # type: ignore[arg-type]
    with clean_process():
        launch.main(script, [
            "--pretrained_model_name_or_path", str(data / "model.safetensors"), "--dataset_config",
            str(data / "data.toml"), "--output_dir", str(data), "--output_name", name, "--seed", "1",
            "--max_data_loader_n_workers", "0", "--cache_latents", *words,
        ])  # fmt: skip
    return data / f"{name}.safetensors"


def drawn_errors(model: Path) -> list[float]:
    """How far (0..255) each drawn wall is from its colour, on average."""
    from library.generation.engine import draw
    from library.generation.request import ImageRequest
    from library.options import make_options

    family = fifth_family.Colours(make_options(pretrained_model_name_or_path=str(model)))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    requests = [ImageRequest(f"a {name} wall", width=64, height=64, steps=20, scale=1.0, seed=7) for name in COLOURS]
    images = draw(family, requests, device="cpu", dtype=torch.float32)
    return [
        float(np.abs(np.asarray(image, np.float32) - colour).mean())
        for image, colour in zip(images, COLOURS.values(), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cached", [[], ["--cache_text_encoder_outputs"]])
def test_full_training_teaches_a_new_family_its_colours(data: Path, cached: list[str]) -> None:
    trained = run(
        data, f"full{len(cached)}", "library.methods.full:FullTraining", FULL_TRAINING, "--learning_rate", "5e-3",
        "--max_train_steps", "300", "--save_model_as", "safetensors", *cached,
    )  # fmt: skip
    before, after = drawn_errors(data / "model.safetensors"), drawn_errors(trained)
    assert min(before) > 50 and max(after) < 25, (before, after)


def test_a_network_module_of_a_third_party_trains_on_a_new_family(data: Path) -> None:
    trained = run(
        data, "network", "library.methods.network:NetworkTraining", NETWORK_TRAINING, "--network_module",
        "tests.colour_network", "--max_train_steps", "5", "--learning_rate", "5e-3",
    )  # fmt: skip
    tensors = open_tensors(trained)
    assert tensors["bias"].abs().min() > 1e-3
    assert tensors.metadata["ss_base_model_version"] == "colours"


def test_the_project_does_not_know_the_new_family() -> None:
    """No file outside the tests mentions it, so adding it changed none."""
    found = subprocess.run(
        ["grep", "-rliE", "fifth_family|colour_network", "--include=*.py", "library", "networks", "tools"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert found == ""
