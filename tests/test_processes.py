"""Two processes train one network together (gloo on the processor stands in for several GPUs)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.training import MODEL, PHOTOS, TOKENIZERS, write_config


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def distributed_environment() -> dict[str, str]:
    """One thread per process, on the processor."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run_two_processes(out: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Options that stand in `options` replace the defaults."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "train_network.py", "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS,
        "--network_module", "networks.lora", "--network_dim", "2", "--max_data_loader_n_workers", "0", "--seed", "3",
        "--cache_latents_to_disk", "--learning_rate", "1e-3", "--output_dir", out, "--output_name", "run", *options,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=distributed_environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def train_with_two_processes(out: Path, *options: str | Path) -> None:
    result = run_two_processes(out, *options)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_exactly(tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    config = write_config(tmp_path, photos, general="flip_aug = true")
    train_with_two_processes(tmp_path / "a", "--dataset_config", config, "--max_train_steps", "3", "--save_state",
                             "--save_every_n_steps", "2")
    straight = load_file(tmp_path / "a" / "run.safetensors")
    assert len(list(photos.glob("*_sd.npz"))) == 5
    state = tmp_path / "a" / "run-step00000002-state"
    assert {path.stem for path in state.glob("random_states_*.json")} == {"random_states_0", "random_states_1"}
    train_with_two_processes(tmp_path / "b", "--dataset_config", config, "--max_train_steps", "3", "--resume", state)
    resumed = load_file(tmp_path / "b" / "run.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
