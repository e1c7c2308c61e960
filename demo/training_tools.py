"""Small helpers shared by the demo's training loops: time budget, rate decay, weight averaging, loss log."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


class TimeBudget:
    """Seconds of training allowed; survives a restart through `restore`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    def restore(self, elapsed: float) -> None:
        """Continue as if `elapsed` seconds had passed already."""
        self._start = time.monotonic() - elapsed

    def elapsed(self) -> float:
        """Seconds used so far."""
        return time.monotonic() - self._start

    def share(self) -> float:
        """Part of the budget used, 0..1."""
        return min(1.0, self.elapsed() / max(self.seconds, 1e-6))

    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.elapsed() >= self.seconds


class Ema:
    """Exponential moving average of a model's parameters in float32, with a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = [parameter.detach().float().clone() for parameter in model.parameters()]

    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model after step `step` (counted from 0)."""
        share = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self.average, [p.detach().float() for p in model.parameters()], share)

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of `model`."""
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> list[torch.Tensor]:
        """The averaged tensors in parameter order."""
        return self.average

    def load_state_dict(self, state: list[torch.Tensor]) -> None:
        """Take over tensors from `state_dict`."""
        for own, other in zip(self.average, state, strict=True):
            own.copy_(other)


class LossLog:
    """Writes the mean of every 50 steps' values as one line of a CSV file: step, seconds, name=value..."""

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self._sums: dict[str, float] = {}
        self._count = 0
        self._last: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, seconds: float, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if self._count < self.every:
            return
        self._last = {name: total / self._count for name, total in self._sums.items()}
        columns = ",".join(f"{name}={value:.5f}" for name, value in self._last.items())
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{step},{seconds:.1f},{columns}\n")
        self._sums, self._count = {}, 0

    def summary(self, step: int, seconds: float) -> str:
        """One line with the latest means."""
        values = " ".join(f"{name} {value:.4f}" for name, value in self._last.items())
        return f"step {step} after {seconds / 60:.1f} min: {values}"


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast on the device."""
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


def save_state(path: Path, **state: Any) -> None:
    """torch.save through a temporary file, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@dataclass
class TrainingRun:
    """Everything a training loop needs between two steps; its state survives in the file `path`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    budget: TimeBudget
    path: Path
    learning_rate: float
    checkpoint_seconds: float
    warmup: int = 250
    step: int = 0

    def __post_init__(self) -> None:
        self.log = LossLog(self.path.with_name(f"{self.path.stem}_loss.csv"))
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Take over the state of an earlier run, if there is one."""
        if not self.path.exists():
            return
        device = next(self.model.parameters()).device
        state = torch.load(self.path, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.restore(state["elapsed"])
        self.step = state["step"]

    def update(self, loss: torch.Tensor, **parts: float) -> None:
        """One optimizer step from a scalar loss. The rate warms up, then falls as a cosine to 2 %."""
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.budget.share()))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.step + 1) / self.warmup) * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()
        self.ema.update(self.model, self.step)
        self.step += 1
        self.log.add(self.step, self.budget.elapsed(), loss=loss.item(), **parts)

    def save_if_due(self) -> bool:
        """Write the state now and then and at the end of the budget; whether it was written."""
        if time.monotonic() - self._saved_at < self.checkpoint_seconds and not self.budget.spent():
            return False
        save_state(self.path, model=self.model.state_dict(), ema=self.ema.state_dict(),
                   optimizer=self.optimizer.state_dict(), elapsed=self.budget.elapsed(), step=self.step)
        self._saved_at = time.monotonic()
        logger.info(self.log.summary(self.step, self.budget.elapsed()))
        return True

    def averaged(self) -> nn.Module:
        """A copy of the model holding the averaged weights."""
        result = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.ema.copy_to(result)
        return result
