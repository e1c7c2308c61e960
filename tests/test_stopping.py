"""Numbers that are not finite end a run: named, with status 1, and without writing or removing anything."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from library.finite import MOST_SKIPPED_STEPS, BatchResult, StepGuard, check_writable
from library.options import make_options
from library.options.errors import RunFailed
from library.training_state import Position
from tests.golden import FOLDER
from tests.test_full_training import make_run, steps
from tests.test_processes import run_processes
from tests.training import PHOTOS, clean_process, train, write_config

SAVING = ("--cache_latents", "--save_every_n_steps", "3", "--save_last_n_steps", "1", "--save_state")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_neither_writes_nor_removes(tmp_path, capsys):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    config = write_config(tmp_path, photos)
    out = tmp_path / "out"
    train("--dataset_config", config, *SAVING, "--max_train_steps", "4", output_dir=out)
    before = contents(out)
    assert {path.split("/")[0] for path in before} == {
        "run-step00000003.safetensors",
        "run-step00000003-state",
        "run.safetensors",
        "run-state",
    }
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        train("--dataset_config", config, *SAVING, "--max_train_steps", "6", "--learning_rate", "1e30", output_dir=out)
    assert ending.value.code == 1
    [message] = [line for line in capsys.readouterr().err.splitlines() if "error: training stopped" in line]
    assert re.search(r"in step 2 \(epoch 1, learning rate 1e\+30\): the loss is not finite", message)
    assert re.search(r"pictures: .*\.(jpg|png)", message) and "a lower --learning_rate" in message
    assert contents(out) == before


# --- where the bad number comes from, on real modules --------------------------------------------------------
@pytest.fixture
def run_with(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    with clean_process():
        yield lambda **values: make_run(tmp_path, **values)


FUSED = {
    "plain": {},
    "unclipped": {"max_grad_norm": 0.0},
    "backward pass": {"fused_backward_pass": True, "optimizer_type": "Adafactor", "learning_rate": 1e-4},
    "backward pass, unclipped": {
        "fused_backward_pass": True, "optimizer_type": "Adafactor", "learning_rate": 1e-4, "max_grad_norm": 0.0,
    },
    "groups": {"fused_optimizer_groups": 3},
    "blocks": {"blockwise_fused_optimizers": True, "max_grad_norm": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_a_gradient_that_is_not_finite_stops_the_run_however_the_optimizer_steps(name, run_with):
    run = run_with(**FUSED[name])
    steps(run, 0)
    weight = next(run.method.trainable.parameters())
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunFailed, match=r"in step 1 \(epoch 1.*the gradients are not finite.*pictures: "):
        steps(run, 1)


def test_weights_and_optimizers_that_are_not_finite_are_never_written(run_with, tmp_path):
    run = run_with()
    steps(run, 0)
    run.check_weights(torch.float16)
    name, weight = next(iter(run.method.trainable.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] = 1e6
    run.check_weights()
    with pytest.raises(RunFailed, match=re.escape(name) + r".*1e\+06, more than torch.float16 can hold"):
        run.check_weights(torch.float16)
    run.optimizer.optimizer.state[weight]["exp_avg"].view(-1)[0] = math.inf
    with pytest.raises(RunFailed, match="exp_avg of parameter 0 of the optimizer is not finite"):
        run.save_state(tmp_path / "state")
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    with pytest.raises(RunFailed, match=re.escape(name) + " of the trained weights is not finite"):
        run.check_weights()
    assert not list(tmp_path.glob("state*"))


def test_whole_numbers_and_empty_tensors_are_written():
    tensors = [("a", torch.tensor([2**40])), ("b", torch.empty(0)), ("c", torch.ones(3, dtype=torch.bfloat16))]
    check_writable(tensors, dtype=torch.float16, what="x", options=make_options())


# --- which numbers end a run ---------------------------------------------------------------------------------
class OneProcess:
    num_processes = 1
    scaler: object = None


def read(guard: StepGuard, losses: list[float], norm: float | None = None, *, sync=True, skipped=False):
    keys = [f"{index}.png" for index in range(len(losses))]
    result = BatchResult(torch.tensor(losses), keys, None if norm is None else torch.tensor(norm), skipped)
    return guard.read(result, sync=sync, position=Position(2, 5, 7), rate=1e-4)


def test_the_picture_with_the_bad_loss_is_named_alone():
    guard = StepGuard(make_options(), OneProcess())
    assert read(guard, [1.0, 2.0], 3.0) == (1.5, 3.0)
    with pytest.raises(RunFailed, match=r"step 8 \(epoch 2, learning rate 0.0001\): .*\(nan\); pictures: 1.png\. "):
        read(guard, [1.0, math.nan, 2.0], sync=False)


def test_bad_gradients_name_the_pictures_of_the_whole_accumulation_window():
    guard = StepGuard(make_options(), OneProcess())
    read(guard, [1.0] * 3)
    read(guard, [1.0] * 2, sync=False)
    with pytest.raises(RunFailed, match=r"norm inf\); pictures: 0.png, 1.png, 0.png\. "):
        read(guard, [1.0], math.inf)


def test_a_gradient_scaler_may_skip_steps_but_not_for_ever():
    accelerator = OneProcess()
    accelerator.scaler = object()
    guard = StepGuard(make_options(mixed_precision="fp16"), accelerator)
    for _ in range(MOST_SKIPPED_STEPS - 1):
        read(guard, [1.0], math.inf, skipped=True)
    read(guard, [1.0], 1.0)
    for _ in range(MOST_SKIPPED_STEPS - 1):
        read(guard, [1.0], math.nan, skipped=True)
    with pytest.raises(RunFailed, match=f"overflowed in {MOST_SKIPPED_STEPS} steps in a row.*--mixed_precision bf16"):
        read(guard, [1.0], math.inf, skipped=True)
    with pytest.raises(RunFailed, match="the loss is not finite"):
        read(StepGuard(make_options(), accelerator), [math.inf])


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    config = write_config(tmp_path, photos)
    result = run_processes(
        2, "train_network.py",
        tmp_path / "out",
        "--dataset_config",
        config,
        "--max_train_steps",
        "6",
        "--learning_rate",
        "1e30",
        "--save_every_n_steps",
        "3",
        "--save_state",
    )
    assert result.returncode == 1
    told = re.findall(r"training stopped in step \d .*not finite", result.stderr)
    assert len(told) == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]
    assert not os.path.isdir(tmp_path / "out") or os.listdir(tmp_path / "out") == []
