"""LoRA for the U-Nets and CLIP encoders of SD 1, SD 2 and SDXL, with convolutions and per-block ranks if asked.

`--network_module networks.lora --network_dim 16 --network_alpha 8 --network_args conv_dim=8 conv_alpha=4`
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter import Adapter, Dropouts
from networks.arguments import NetworkArguments
from networks.blocks import (
    BlockRanks,
    convert_diffusers_to_sai_if_needed,
    get_block_dims_and_alphas,
    get_block_index,
    get_block_lr_weight,
    parse_block_lr_kwargs,
    parse_block_ranks,
    remove_block_dims_and_alphas,
)
from networks.groups import PlusRatios
from networks.network import AdapterNetwork, NetworkSettings, RankAndAlpha, positive_rank
from networks.targets import (
    CLIP_CLASSES,
    UNET_CONV_CLASSES,
    UNET_TRANSFORMER_CLASSES,
    Target,
    as_encoder_list,
    find_targets,
    is_conv,
    is_sdxl_unet,
)
from networks.weights_file import load_network_file, ranks_and_alphas

__all__ = [
    "LoRAInfModule",
    "LoRAModule",
    "LoRANetwork",
    "convert_diffusers_to_sai_if_needed",
    "create_network",
    "create_network_from_weights",
    "get_block_dims_and_alphas",
    "get_block_index",
    "get_block_lr_weight",
    "parse_block_lr_kwargs",
    "remove_block_dims_and_alphas",
]

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4


class LoRAModule(Adapter):
    """y = W x + m * (alpha / r) * up(down(x)), Hu et al. 2021 (arXiv 2106.09685), for a `Linear` or a `Conv2d`.

    A convolution's `down` has the layer's kernel, stride and padding, `up` is 1x1. `alpha` None or 0 means r.
    """

    plus_parameters = ("lora_up",)

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = DEFAULT_RANK,
        alpha: float | Tensor | None = 1.0,
        dropouts: Dropouts = Dropouts(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__(lora_name, org_module, multiplier)
        self.lora_dim = lora_dim
        self.dropouts = dropouts
        self.lora_down, self.lora_up = _make_factors(org_module, lora_dim)
        alpha = float(alpha.detach().float()) if isinstance(alpha, Tensor) else alpha
        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim)))
        self.scale = float(alpha or lora_dim) / lora_dim

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` plus the low-rank path; dropouts only in training mode."""
        if not self.training:
            return output + self.lora_up(self.lora_down(x) * (self.multiplier * self.scale))
        drop = self.dropouts
        if drop.module is not None and torch.rand(1) < drop.module:
            return output
        hidden = self.lora_down(x)
        scale = self.multiplier * self.scale
        if drop.neuron is not None:
            hidden = nn.functional.dropout(hidden, p=drop.neuron)
        if drop.rank is not None:
            hidden = hidden * self._rank_mask(hidden)
            scale = scale / (1.0 - drop.rank) if drop.rank < 1.0 else 0.0
        return output + self.lora_up(hidden * scale)

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """Kept ranks per sample, shaped to broadcast over tokens [B,T,r] or space [B,r,h,w]."""
        keep = torch.rand((hidden.shape[0], self.lora_dim), device=hidden.device) > self.dropouts.rank
        if hidden.dim() == 3:
            keep = keep[:, None]
        elif hidden.dim() == 4:
            keep = keep[:, :, None, None]
        return keep

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """multiplier * scale * (up x down), float32, in the shape of the layer's weight."""
        factor = self.multiplier if multiplier is None else multiplier
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        return (factor * self.scale * (up @ down)).reshape(self.host.weight.shape)

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """Frobenius norm of scale * (up x down), from the r x r Gram matrices."""
        up, down = self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        return self.scale * squared.sqrt()

    @torch.no_grad()
    def scale_weight_(self, factor: float) -> None:
        """Both factors take the square root."""
        self.lora_up.weight.mul_(math.sqrt(factor))
        self.lora_down.weight.mul_(math.sqrt(factor))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts 1x1-convolution shapes for a `Linear` and the reverse; the scale follows the loaded alpha."""
        for key, own in (("lora_down.weight", self.lora_down.weight), ("lora_up.weight", self.lora_up.weight)):
            loaded = state_dict.get(prefix + key)
            if loaded is None:
                continue
            if loaded.dim() != own.dim() and loaded.numel() == own.numel():
                state_dict[prefix + key] = loaded.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.scale = float(self.alpha) / self.lora_dim


class LoRAInfModule(LoRAModule):
    """A LoRA module that generates: it never drops anything, whatever mode it is in."""

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` plus the low-rank path."""
        return output + self.lora_up(self.lora_down(x) * (self.multiplier * self.scale))


def _make_factors(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """(down, up); down is Kaiming-uniform with a = sqrt(5), up is zero. Draws as many numbers as torch's own layers."""
    if is_conv(layer):
        down: nn.Module = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    else:
        down = nn.Linear(layer.in_features, rank, bias=False)
        up = nn.Linear(rank, layer.out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down, up
