"""A killed run: what stands under a final name is whole, and training goes on from it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.training_state import read_progress
from tests.conftest import ROOT
from tests.training import MODEL, PHOTOS, TOKENIZERS, train, write_config


@pytest.mark.slow
def test_kill_9_while_saving_leaves_whole_files_and_a_state_to_resume_from(tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    config = write_config(tmp_path, photos)
    out = tmp_path / "out"
    options = ["--dataset_config", config, "--cache_latents", "--max_train_steps", "1000", "--save_every_n_steps", "1",
               "--save_state", "--save_last_n_steps", "2", "--learning_rate", "1e-3"]
    command = [sys.executable, "train_network.py", *map(str, options), "--pretrained_model_name_or_path", str(MODEL),
               "--tokenizer_cache_dir", str(TOKENIZERS), "--network_module", "networks.lora", "--network_dim", "32",
               "--max_data_loader_n_workers", "0", "--seed", "1", "--output_dir", str(out), "--output_name", "run"]
    rng = random.Random(5)
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        with (tmp_path / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
            deadline = time.monotonic() + 240
            while not (out / "run-step00000003.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
            process.wait()
        models = [path for path in out.glob("*.safetensors") if not path.name.startswith(".")]
        states = sorted(out.glob("run-step????????-state"))
        assert len(models) >= 2 and states
        for path in models:
            assert len(load_file(path)) == 612
        for state in states:
            assert read_progress(state).is_exact
            assert len(load_file(state / "model.safetensors")) == 612
    step = read_progress(states[-1]).position.step
    resumed = train("--dataset_config", config, "--cache_latents", "--network_dim", "32", "--seed", "1",
                    "--max_train_steps", str(step + 1), "--resume", states[-1], output_dir=tmp_path / "resumed")
    assert len(load_file(resumed)) == 612
