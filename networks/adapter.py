"""The base of every adapter module: hooking into one layer, switching it off, merging it into the layer's weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.arguments import checked_probability


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Dropouts:
    """Probabilities used in training mode: of single hidden values, of whole ranks per sample, of the whole module."""

    neuron: float | None = None
    rank: float | None = None
    module: float | None = None

    def __post_init__(self) -> None:
        for name in ("neuron", "rank", "module"):
            checked_probability(getattr(self, name), f"{name} dropout")


class Adapter(nn.Module, ABC):
    """A trainable change of one `Linear` or `Conv2d`.

    `apply_to` replaces the layer's `forward` by this module's; several adapters may stand on one layer, the last
    applied outermost. The layer is held in a tuple, so that it never becomes part of this module's state.
    """

    #: parameters with one of these in their name form LoRA+'s second group
    plus_parameters: tuple[str, ...] = ()

    def __init__(self, lora_name: str, org_module: Any, multiplier: float) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.enabled = True
        self._host = (org_module,)
        self._is_applied = False
        self.org_forward = org_module.forward

    @property
    def host(self) -> Any:
        """The adapted layer, a Linear or Conv2d or what looks like one."""
        return self._host[0]

    def apply_to(self) -> None:
        """Put this adapter in front of the layer's current forward. A second call changes nothing."""
        if self._is_applied:
            return
        self.org_forward = self.host.forward
        self.host.forward = self.forward
        self._is_applied = True

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with this adapter's change."""
        output = self.org_forward(x)
        return self.change(x, output) if self.enabled else output

    @abstractmethod
    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """The changed output of the layer, from its input and its original output."""

    @abstractmethod
    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """What the adapter adds to the layer's weight, at least float32, in its shape (default: own multiplier)."""

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight (at least float32) that makes the layer alone behave like layer and adapter together."""
        return weight + self.get_weight().to(weight.device).reshape(weight.shape)

    @abstractmethod
    def weight_norm(self) -> Tensor:
        """Frobenius norm (0-dim, float32) of the change at multiplier 1."""

    @abstractmethod
    def scale_weight_(self, factor: float) -> None:
        """Scale the change by `factor` in place."""

    # --- merging -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge_to_host(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Add the change to the layer's weight in place; computed on `device` in float32 or better."""
        weight = self.host.weight
        merged = self.merged_weight(full_precision(weight.to(device=device or weight.device)))
        weight.copy_(merged.to(dtype or weight.dtype))

    def backup_weight(self) -> None:
        """Keep a copy of the layer's weight on the layer, once."""
        if not hasattr(self.host, "_lora_org_weight"):
            self.host._lora_org_weight = self.host.weight.detach().clone()
            self.host._lora_restored = True

    @torch.no_grad()
    def restore_weight(self) -> None:
        """Bring the layer's original weight back and use the hook again."""
        if not getattr(self.host, "_lora_restored", True):
            self.host.weight.copy_(self.host._lora_org_weight)
            self.host._lora_restored = True
        self.enabled = True

    def pre_calculate(self) -> None:
        """Merge into the backed-up layer and switch the hook off: generation then costs nothing extra."""
        if not hasattr(self.host, "_lora_org_weight"):
            raise RuntimeError(f"{self.lora_name}: backup_weights() must come before pre_calculation()")
        self.merge_to_host()
        self.host._lora_restored = False
        self.enabled = False
