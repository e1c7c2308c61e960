"""A network module of a third party for `tests.fifth_family`: one added bias per denoiser channel."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class ColourNetwork(nn.Module):
    """Adds a trained bias [3] to what the denoiser's last layer gives."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.multiplier = 1.0
        self._layer = [unet.outward]

    def apply_to(self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool) -> None:
        layer: Any = self._layer[0]
        forward = layer.forward

        def with_bias(x: Tensor) -> Tensor:
            return forward(x) + self.multiplier * self.bias[:, None, None].to(x)

        layer.forward = with_bias

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, default_lr: Any = None) -> list[Any]:
        return [{"params": [self.bias], "lr": unet_lr or default_lr}]

    def enable_gradient_checkpointing(self) -> None:
        pass

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [self.bias]

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        save_file({"bias": self.bias.detach().to(dtype or torch.float32)}, file, metadata)


def create_network(
    multiplier: float, dim: Any, alpha: Any, vae: Any, text_encoder: Any, unet: nn.Module, **_: Any
) -> Any:
    """The trainer's entry point."""
    return ColourNetwork(unet)


def create_network_from_weights(multiplier: float, file: str, *_: Any, **__: Any) -> Any:
    """Not needed here."""
    raise ValueError(f"{file}: colour networks do not continue.")
