"""Whole runs that go on with other options than the state was made with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.families.sd import StableDiffusion
from tests.training import PHOTOS, train, write_config

COMMON = ("--cache_latents", "--lr_scheduler", "cosine", "--unet_lr", "1e-3", "--optimizer_args", "weight_decay=0.1")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, `dataset.toml` and, in `output`, two steps of training and the state after them."""
    folder = tmp_path_factory.mktemp("first")
    config = write_config(folder, Path(shutil.copytree(PHOTOS, folder / "photos")))
    train("--dataset_config", config, *COMMON, "--max_train_steps", "2", "--save_state", output_dir=folder / "output")
    return folder


@pytest.mark.slow
def test_what_a_state_does_not_fit_is_said_before_models_are_loaded(
    first_run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.delattr(StableDiffusion, "load")
    common = ["--dataset_config", first_run / "dataset.toml", *COMMON]
    for words in (["--network_alpha", "2"], ["--network_dim", "4"], ["--optimizer_type", "Lion"]):
        with pytest.raises(SystemExit) as stop:
            train(*common, *words, "--resume", first_run / "output" / "run-state", output_dir=tmp_path / "o")
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2
        assert last.startswith(f"train_network.py: error: {words[0]}: the resumed state was made with"), last


@pytest.mark.slow
def test_other_rates_data_and_steps_take_effect_and_are_said(first_run: Path, tmp_path: Path, caplog) -> None:
    """The state is found in the folder it lies in; the photos have moved, one caption is new."""
    config = write_config(tmp_path, Path(shutil.copytree(first_run / "photos", tmp_path / "moved")))
    (tmp_path / "moved" / "cat.txt").write_text("another caption", encoding="utf-8")
    words = ["--dataset_config", config, *COMMON, "--unet_lr", "1e-12", "--text_encoder_lr", "2e-12"]
    with caplog.at_level(logging.INFO):
        path = train(*words, "--max_train_steps", "4", "--resume", first_run / "output", output_dir=tmp_path / "o")
    said = [record.getMessage() for record in caplog.records]
    lines = [line.removeprefix("--resume: ") for line in said if line.startswith("--resume: ")]
    assert lines == [
        "--unet_lr: 0.001 in the resumed run, 1e-12 now: takes effect from here on.",
        "--text_encoder_lr: none in the resumed run, 2e-12 now: takes effect from here on.",
        "--max_train_steps: 2 in the resumed run, 4 now: takes effect from here on.",
        "the captions changed since the resumed run: the result is not what the resumed run would have given.",
    ]
    assert any(line.endswith("its newest whole state is used: run-state") for line in said)
    before, after = load_file(first_run / "output" / "run.safetensors"), load_file(path)
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-9) for key in before)
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    assert (saved["ss_unet_lr"], saved["ss_text_encoder_lr"], saved["ss_steps"]) == ("1e-12", "2e-12", "4")
    assert (saved["modelspec.resolution"], saved["ss_resolution"]) == ("192x192", "(192, 192)")
    assert json.loads(saved["ss_bucket_info"])["buckets"]


@pytest.mark.slow
def test_ranks_and_alphas_that_a_file_brings_stand_in_the_metadata(first_run: Path, tmp_path: Path) -> None:
    weights = first_run / "output" / "run.safetensors"
    words = ["--dataset_config", first_run / "dataset.toml", "--network_weights", weights, "--dim_from_weights"]
    path = train(*words, "--network_dim", "7", "--max_train_steps", "1", output_dir=tmp_path)
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    assert (saved["ss_network_dim"], saved["ss_network_alpha"]) == ("2", "1.0")
