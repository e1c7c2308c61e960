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
from tests.training import MODEL, PHOTOS, TOKENIZERS, train, write_config


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def distributed_environment() -> dict[str, str]:
    """One thread per process, on the processor."""
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run_processes(
    processes: int, script: str | Path, out: Path, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """Options that stand in `options` replace the defaults."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port(),
        script, "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS,
        "--network_module", "networks.lora", "--network_dim", "2", "--max_data_loader_n_workers", "0", "--seed", "3",
        "--cache_latents_to_disk", "--learning_rate", "1e-3", "--output_dir", out, "--output_name", "run", *options,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=distributed_environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def train_with_processes(processes: int, script: str | Path, out: Path, *options: str | Path) -> None:
    result = run_processes(processes, script, out, *options)
    assert result.returncode == 0, result.stderr[-3000:]


def train_with_two_processes(out: Path, *options: str | Path) -> None:
    train_with_processes(2, "train_network.py", out, *options)


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


#: train_network.py with noise and timesteps that follow from picture and epoch; leaves each process's seed behind
FIXED_NOISE = f"""
import os, sys, zlib
sys.path.insert(0, {str(ROOT)!r})
import torch
from library import train_util
import train_network

step = train_util.Run.step

def fixed(self, batch, *, sync):
    place = f"seed-{{self.accelerator.num_processes}}-{{self.accelerator.process_index}}"
    with open(os.path.join(os.path.dirname(__file__), place), "w") as file:
        file.write(str(torch.initial_seed()))
    seeds = [zlib.crc32(f"{{key}} {{self.position.epoch}}".encode()) for key in batch.image_keys]
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=draw) for draw in draws])
    times = torch.stack([torch.randint(0, 1000, (), generator=draw) for draw in draws]).float()
    return step(self, batch, sync=sync, timesteps=times, noise=noise)

train_util.Run.step = fixed
train_network.main()
"""


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates_their_batches(tmp_path):
    """Under a rate that decays to nothing: averaged gradients, the length of the schedule, and the data all count."""
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    config = write_config(tmp_path, photos, subset="num_repeats = 2")  # an even number of batches: none is repeated
    config.write_text(config.read_text().replace("batch_size = 2", "batch_size = 1"))
    (tmp_path / "fixed.py").write_text(FIXED_NOISE)
    common = ["--dataset_config", config, "--lr_scheduler", "linear"]
    train(*common, "--cache_latents_to_disk", "--max_train_steps", "1", output_dir=tmp_path / "caches")
    train_with_processes(1, tmp_path / "fixed.py", tmp_path / "one", *common, "--max_train_steps", "6",
                         "--gradient_accumulation_steps", "2")
    train_with_processes(2, tmp_path / "fixed.py", tmp_path / "two", *common, "--max_train_steps", "6")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("one", "two"))
    assert any(tensor.abs().max() > 1e-3 for key, tensor in one.items() if "lora_up" in key)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
    seeds = {path.name: path.read_text() for path in tmp_path.glob("seed-*")}
    assert len(seeds) == 3 and seeds["seed-2-0"] == seeds["seed-1-0"] != seeds["seed-2-1"]
