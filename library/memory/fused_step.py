"""Optimizer steps inside the backward pass: gradients are used and freed as soon as they are complete."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from library.options import Options


class FusedStep(Protocol):
    """Optimizers that step by themselves during `backward`. Gradients are clipped tensor by tensor."""

    def begin(self, *, is_last: bool) -> None:
        """Call before `backward`; they step if it is the last one of an accumulation window."""

    def finish(self) -> Tensor | None:
        """Call after the last `backward` of an accumulation window: steps what is left.

        Returns the norm of all gradients before clipping, on their device; None if there were none.
        """


def fused_step_problems(options: Options, processes: int) -> list[str]:
    """Why the options for steps inside the backward pass cannot work in this many processes, one sentence each."""
    names = {
        "--fused_backward_pass": options.optimizer.fused_backward_pass,
        "--blockwise_fused_optimizers": options.memory.blockwise_fused_optimizers,
        "--fused_optimizer_groups": options.memory.fused_optimizer_groups is not None,
    }
    if processes == 1:
        return []
    return [
        f"{name} works in one process only, and this run has {processes}: gradients would be used before the processes "
        "have exchanged them. Leave it out, or train on one device."
        for name, is_given in names.items()
        if is_given
    ]


# --- one optimizer, stepped parameter by parameter ---------------------------------------------------------
class FusedBackward:
    """Steps every parameter of one optimizer as soon as its gradient is complete (`--fused_backward_pass`).

    For optimizers whose update of a parameter depends on nothing but that parameter. bfloat16 parameters are updated
    in float32 and rounded stochastically, so that updates below their resolution count on average.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._norms: list[Tensor] = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, number=number: self._step(p, number))

    def _step(self, parameter: Tensor, number: int) -> None:
        self._norms.append(clip(parameter, self._max_grad_norm))
        with self._alone(parameter, number), in_float32(parameter):
            self._optimizer.step()
        parameter.grad = None

    @contextmanager
    def _alone(self, parameter: Tensor, number: int) -> Iterator[None]:
        """The optimizer sees one parameter only, with the settings of its group."""
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[number], "params": [parameter]}]
        try:
            yield
        finally:
            self._optimizer.param_groups = groups

    def begin(self, *, is_last: bool) -> None:
        """Nothing to prepare: without accumulation every `backward` is the last one."""

    def finish(self) -> Tensor | None:
        """Nothing is left after `backward`."""
        return taken_norm(self._norms)


def clip(parameter: Tensor, max_norm: float) -> Tensor:
    """Scale the gradient of one tensor down to `max_norm`; 0 leaves it. Returns its norm before, on its device."""
    if max_norm:
        return nn.utils.clip_grad_norm_([parameter], max_norm)
    return torch.linalg.vector_norm(cast(Tensor, parameter.grad))


def taken_norm(norms: list[Tensor]) -> Tensor | None:
    """The norm of gradients with these `norms`, which are forgotten."""
    if not norms:
        return None
    total = torch.linalg.vector_norm(torch.stack([norm.float().to(norms[0].device) for norm in norms]))
    norms.clear()
    return total


@contextmanager
def in_float32(parameter: Tensor) -> Iterator[None]:
    """Inside, a bfloat16 parameter with its gradient is float32; afterwards it holds the rounded result."""
    if parameter.dtype != torch.bfloat16 or parameter.grad is None:
        yield
        return
    stored, gradient = parameter.data, parameter.grad.float()
    parameter.grad = None
    parameter.data = stored.float()
    parameter.grad = gradient
    try:
        yield
    finally:
        stored.copy_(round_stochastically(parameter.data))
        parameter.grad = None
        parameter.data = stored


def round_stochastically(values: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that keep the expected value."""
    bits = values.contiguous().view(torch.int32)
    below = torch.randint_like(bits, 0, 1 << 16)  # what a bfloat16 has no room for
    return ((bits + below) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


# --- several optimizers ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """Parameters that share an optimizer of their own; `group` is the number of the parameter group they are from."""

    group: int
    parameters: list[nn.Parameter]


def pieces_by_count(groups: Sequence[Sequence[nn.Parameter]], count: int) -> list[Piece]:
    """About `count` pieces of equally many tensors, in order; no piece reaches over the end of a group."""
    size = max(1, math.ceil(sum(map(len, groups)) / count))
    return [
        Piece(number, list(parameters[start : start + size]))
        for number, parameters in enumerate(groups)
        for start in range(0, len(parameters), size)
    ]


def pieces_by_block(groups: Sequence[Sequence[nn.Parameter]], blocks: Sequence[nn.Module]) -> list[Piece]:
    """One piece for each block and one for what is in no block, per group."""
    block_of = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    pieces = []
    for number, parameters in enumerate(groups):
        members: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            members.setdefault(block_of.get(id(parameter), len(blocks)), []).append(parameter)
        pieces += [Piece(number, members[block]) for block in sorted(members)]
    return pieces


class FusedOptimizers:
    """Steps each optimizer as soon as all of its gradients are complete (`--fused_optimizer_groups`, blockwise)."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, max_grad_norm: float) -> None:
        self._optimizers = optimizers
        self._max_grad_norm = max_grad_norm
        self._is_stepping = True
        self._norms: list[Tensor] = []
        self._waiting: list[int] = []
        for number, optimizer in enumerate(optimizers):
            for parameter in parameters_of(optimizer):
                parameter.register_post_accumulate_grad_hook(lambda p, number=number: self._arrived(p, number))
        self.begin(is_last=True)

    def begin(self, *, is_last: bool) -> None:
        """Gradients are only added up unless this `backward` is the last one."""
        self._is_stepping = is_last
        self._waiting = [len(parameters_of(optimizer)) for optimizer in self._optimizers]

    def _arrived(self, parameter: Tensor, number: int) -> None:
        if not self._is_stepping:
            return
        self._norms.append(clip(parameter, self._max_grad_norm))
        self._waiting[number] -= 1
        if not self._waiting[number]:
            self._step(self._optimizers[number])

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def finish(self) -> Tensor | None:
        """Step the optimizers of which some parameters had no part in the loss."""
        for optimizer in self._optimizers:
            if any(parameter.grad is not None for parameter in parameters_of(optimizer)):
                self._step(optimizer)
        return taken_norm(self._norms)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Everything that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
