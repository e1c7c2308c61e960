"""Optimizer groups of a network: learning rates per part and block, and LoRA+ groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from networks.adapter import Adapter
from networks.arguments import NetworkArguments


@dataclass(frozen=True)
class PlusRatios:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): how much faster the output-side factor learns; None = as usual."""

    overall: float | None = None
    denoiser: float | None = None
    text_encoder: float | None = None

    @classmethod
    def read(cls, arguments: NetworkArguments) -> PlusRatios:
        """From `loraplus_lr_ratio`, `loraplus_unet_lr_ratio` and `loraplus_text_encoder_lr_ratio`."""
        return cls(
            arguments.number("loraplus_lr_ratio"),
            arguments.number("loraplus_unet_lr_ratio"),
            arguments.number("loraplus_text_encoder_lr_ratio"),
        )

    @property
    def for_denoiser(self) -> float | None:
        """The denoiser's own ratio, else the overall one."""
        return self.denoiser or self.overall

    @property
    def for_text_encoder(self) -> float | None:
        """The text encoders' own ratio, else the overall one."""
        return self.text_encoder or self.overall


@dataclass
class OptimizerGroups:
    """Groups for an optimizer, their names for the logs, and the parameters that got no learning rate."""

    groups: list[dict[str, object]] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    untrained: list[nn.Parameter] = field(default_factory=list)

    def add(self, adapters: Iterable[Adapter], lr: float | None, ratio: float | None, description: str) -> None:
        """One group for `adapters`, or two with LoRA+; nothing is added for a rate of None or 0."""
        usual: list[nn.Parameter] = []
        plus: list[nn.Parameter] = []
        for adapter in adapters:
            for name, parameter in adapter.named_parameters():
                is_plus = ratio is not None and any(part in name for part in adapter.plus_parameters)
                (plus if is_plus else usual).append(parameter)
        self._add_group(usual, lr, description)
        self._add_group(plus, None if lr is None or ratio is None else lr * ratio, f"{description} plus")

    def _add_group(self, parameters: list[nn.Parameter], lr: float | None, description: str) -> None:
        if not parameters:
            return
        if not lr:
            self.untrained += parameters
            return
        self.groups.append({"params": parameters, "lr": lr})
        self.descriptions.append(description)


def rates_per_encoder(
    rates: float | Sequence[float] | None, default: float | None, count: int
) -> tuple[list[float | None], int]:
    """(one rate for each of `count` text encoders, how many given rates are left over).

    Nothing given: the default for all. Fewer than encoders: the last one is repeated.
    """
    given = [rates] if isinstance(rates, (int, float)) else list(rates or [])
    if not given:
        return [default] * count, 0
    return [given[min(index, len(given) - 1)] for index in range(count)], max(0, len(given) - count)
