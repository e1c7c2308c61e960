"""Numbers that are not finite: noticed on the device, read with the loss, told to the user, and never written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.options.errors import RunFailed
from library.training_state import Position

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

#: float16: this many optimizer steps in a row without one that could be used. The gradient scaler begins at 2**16
#: and halves its factor each time, so that it is then so small that no gradient of a healthy run overflows.
MOST_SKIPPED_STEPS = 30
SHOWN_PICTURES = 8


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """The norm of all gradients as one vector, on their device; None when there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norm: Any = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@dataclass(frozen=True)
class BatchResult:
    """One batch as it left the device: `losses` [B] and, after an optimizer step, the norm of the gradients."""

    losses: Tensor
    keys: Sequence[str]  # of the pictures, one per loss
    norm: Tensor | float | None = None
    was_skipped: bool = False  # the gradient scaler found an overflow and left the weights alone


@dataclass
class StepGuard:
    """Reads a batch's numbers (once, all together) and ends the run at the first one that is not finite.

    With a gradient scaler (float16) an overflow of gradients is part of the work: such a step is skipped, and only
    `MOST_SKIPPED_STEPS` in a row end the run. Several processes end together, after the same optimizer step.
    """

    options: Options
    accelerator: Accelerator
    _window: list[str] = field(default_factory=list)  # pictures since the last optimizer step
    _bad: list[str] = field(default_factory=list)  # those of them whose loss is not finite
    _bad_loss: float = math.nan
    _skipped: int = 0
    _any_process_failed: bool = False

    def read(self, result: BatchResult, *, sync: bool, position: Position, rate: float) -> tuple[float, float | None]:
        """(mean loss, norm of the gradients) as numbers. Raises RunFailed that names step, pictures and rate."""
        losses, norm = self._numbers(result, sync=sync)
        self._window += result.keys
        self._bad += [key for key, loss in zip(result.keys, losses[1:], strict=False) if not math.isfinite(loss)]
        if not math.isfinite(losses[0]):
            self._bad, self._bad_loss = self._bad or list(result.keys), losses[0]
        if self._is_over(result, norm, sync=sync):
            if self.accelerator.num_processes > 1:
                self._tell_all_processes()
            raise RunFailed(self._story(norm, position, rate))
        if sync:
            self._window.clear()
        return losses[0], norm

    def _numbers(self, result: BatchResult, *, sync: bool) -> tuple[list[float], float | None]:
        """([mean, each loss], norm), in the only transfer of a step from the device."""
        losses = result.losses.detach().float()
        numbers = [losses.mean()[None], losses]
        if result.norm is not None:
            norm = torch.as_tensor(result.norm, dtype=torch.float32, device=losses.device)
            numbers.append(norm.detach().reshape(1))
        if sync and self.accelerator.num_processes > 1:
            bad = (~torch.cat(numbers[: 2 if self._has_scaler else 3]).isfinite()).any() | bool(self._bad)
            total: Any = self.accelerator.reduce(bad.float().reshape(1), reduction="sum")
            numbers.append(total)
        read = torch.cat(numbers).tolist()
        if sync and self.accelerator.num_processes > 1:
            self._any_process_failed = read.pop() > 0
        read_norm = read.pop() if result.norm is not None else None
        return read, read_norm

    def _tell_all_processes(self) -> None:
        from accelerate.utils import gather_object

        self._window, self._bad = gather_object(self._window), gather_object(self._bad)

    @property
    def _has_scaler(self) -> bool:
        return getattr(self.accelerator, "scaler", None) is not None

    def _is_over(self, result: BatchResult, norm: float | None, *, sync: bool) -> bool:
        if sync:
            self._skipped = self._skipped + 1 if result.was_skipped else 0
        if self.accelerator.num_processes > 1:  # all of them stop, and only where all of them are
            return sync and (self._any_process_failed or self._skipped >= MOST_SKIPPED_STEPS)
        is_bad_norm = norm is not None and not math.isfinite(norm) and not self._has_scaler
        return bool(self._bad) or is_bad_norm or self._skipped >= MOST_SKIPPED_STEPS

    def _story(self, norm: float | None, position: Position, rate: float) -> str:
        pictures = self._bad or self._window
        if self._bad:
            what = f"the loss is not finite ({self._bad_loss})"
        elif self._skipped >= MOST_SKIPPED_STEPS:
            what = f"the gradients overflowed in {self._skipped} steps in a row"
        else:
            what = f"the gradients are not finite (norm {norm})"
        shown = ", ".join(pictures[:SHOWN_PICTURES])
        more = f" and {len(pictures) - SHOWN_PICTURES} more" if len(pictures) > SHOWN_PICTURES else ""
        return (
            f"training stopped in step {position.step + 1} (epoch {position.epoch}, learning rate {rate:g}): {what}"
            + (f"; pictures: {shown}{more}" if shown else "")
            + f". Nothing of it was saved, and files saved before are as they were. {advice(self.options)}"
        )


def advice(options: Options) -> str:
    """What usually helps."""
    device, model = options.device, options.model
    tips = ["a lower --learning_rate or more --lr_warmup_steps"]
    if not options.optimizer.max_grad_norm:
        tips.append("--max_grad_norm 1")
    if device.mixed_precision == "fp16":
        tips.append("--mixed_precision bf16")
    if device.mixed_precision in ("fp16", "bf16") and not model.no_half_vae:
        tips.append("--no_half_vae")
    return f"What usually helps: {', '.join(tips)}, or leaving out pictures that are named again and again."


# --- before anything is written -----------------------------------------------------------------------------
def check_writable(
    tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype | None, what: str, options: Options
) -> None:
    """Raises RunFailed unless every floating tensor is finite and stays so in `dtype`; one read from the device."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return
    device = named[0][1].device
    peaks = torch.stack([torch.linalg.vector_norm(_plain(t), math.inf).float().to(device) for _, t in named])
    largest = torch.finfo(dtype or torch.float32).max
    for (name, _), peak in zip(named, peaks.tolist(), strict=True):
        if not peak <= largest:
            is_precision = math.isfinite(peak)
            found = f"{peak:g}, more than {dtype} can hold" if is_precision else f"not finite ({peak})"
            tip = "Save with --save_precision bf16 or float." if is_precision else advice(options)
            raise RunFailed(
                f"training stopped before saving: {name} of {what} is {found}. Nothing of it was written, and files "
                f"saved before are as they were. {tip}"
            )


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype.itemsize < 2 else tensor
