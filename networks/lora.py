"""LoRA for the U-Nets and CLIP encoders of SD 1, SD 2 and SDXL, with convolutions and per-block ranks if asked.

`--network_module networks.lora --network_dim 16 --network_alpha 8 --network_args conv_dim=8 conv_alpha=4`
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter import Adapter, Dropouts, full_precision
from networks.arguments import NetworkArguments, checked_rank
from networks.arguments import argument_problems as check_arguments
from networks.blocks import (
    get_block_dims_and_alphas,
    get_block_index,
    get_block_lr_weight,
    parse_block_lr_kwargs,
    remove_block_dims_and_alphas,
)
from networks.naming_unet import convert_diffusers_to_sai_if_needed
from networks.network import NetworkSettings
from networks.regions import Generation, Region, RegionalLayer, mask_pyramid
from networks.targets import is_conv
from networks.unet_network import DEFAULT_RANK, UnetNetwork, read_weights

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
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim)))
        self.scale = float(alpha or lora_dim) / lora_dim

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` plus the low-rank path; dropouts only in training mode."""
        if not self.training:
            return output + self.low_rank_path(x)
        drop = self.dropouts
        if drop.module is not None and torch.rand(1) < drop.module:
            return output
        hidden = self.lora_down(x)
        scale = self.multiplier * self.scale
        if drop.neuron is not None:
            hidden = nn.functional.dropout(hidden, p=drop.neuron)
        if drop.rank is not None:
            hidden = hidden * self._rank_mask(hidden, drop.rank)
            scale = scale / (1.0 - drop.rank) if drop.rank < 1.0 else 0.0
        return output + self.lora_up(hidden * scale)

    def low_rank_path(self, x: Tensor) -> Tensor:
        """m * (alpha / r) * up(down(x))."""
        return self.lora_up(self.lora_down(x) * (self.multiplier * self.scale))

    def _rank_mask(self, hidden: Tensor, probability: float) -> Tensor:
        """Kept ranks per sample, shaped to broadcast over tokens [B,T,r] or space [B,r,h,w]."""
        keep = torch.rand((hidden.shape[0], self.lora_dim), device=hidden.device) > probability
        if hidden.dim() == 3:
            keep = keep[:, None]
        elif hidden.dim() == 4:
            keep = keep[:, :, None, None]
        return keep

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """multiplier * scale * (up x down), at least float32, in the shape of the layer's weight."""
        factor = self.multiplier if multiplier is None else multiplier
        up, down = self._factors()
        return (factor * self.scale * (up @ down)).reshape(self.host.weight.shape)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, r], down [r, in * kernel]), at least float32."""
        return full_precision(self.lora_up.weight).flatten(1), full_precision(self.lora_down.weight).flatten(1)

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """Frobenius norm of scale * (up x down), from the r x r Gram matrices."""
        up, down = self._factors()
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
        if not self.alpha.is_meta and not self.alpha.any():
            self.alpha.fill_(self.lora_dim)
        self.scale = float(self.alpha) / self.lora_dim


class LoRAInfModule(LoRAModule):
    """A LoRA module that generates: it never drops anything, and it can be confined to a region of the picture."""

    region: Region | None = None
    generation: Generation | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with this module's change; with a region, only where and for whom it counts."""
        if not self.enabled or self.region is None or self.generation is None:
            return super().forward(x)
        layer = RegionalLayer(self.lora_name, self.org_forward, self.low_rank_path)
        return layer(x, self.region, self.generation)

    def change(self, x: Tensor, output: Tensor) -> Tensor:
        """`output` plus the low-rank path."""
        return output + self.low_rank_path(x)


def _make_factors(layer: Any, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """(down, up); down is Kaiming-uniform with a = sqrt(5), up is zero. Draws as many numbers as torch's own layers."""
    if is_conv(layer):
        down: nn.Linear | nn.Conv2d = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        up: nn.Linear | nn.Conv2d = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    else:
        down = nn.Linear(layer.in_features, rank, bias=False)
        up = nn.Linear(rank, layer.out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down, up


class LoRANetwork(UnetNetwork):
    """LoRA modules for an SD or SDXL U-Net and its CLIP encoders."""

    module_class = LoRAModule
    inference_module_class = LoRAInfModule

    _region: Region | None = None

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor | None) -> None:
        """Confine a network made for generation to `mask` [H,W] in [0,1] and to one sub-prompt; None undoes it."""
        if len(self._regional_adapters()) < len(self.adapters):
            raise ValueError("Regions need a network that was created for generation (for_inference=True).")
        self._region = None if mask is None else Region(sub_prompt_index, is_last_network, mask)
        for adapter in self._regional_adapters():
            adapter.region = self._region

    def _regional_adapters(self) -> list[LoRAInfModule]:
        return [adapter for adapter in self.adapters if isinstance(adapter, LoRAInfModule)]

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[str, Any],
        ds_ratio: float | None = None,
    ) -> None:
        """Announce a batch of pictures of `width` x `height` pixels; `shared` is the same object for all networks."""
        if self._region is None:
            raise ValueError("set_region() must come before set_current_generation().")
        masks = mask_pyramid(self._region.mask, width, height, ds_ratio)
        generation = Generation(batch_size, num_sub_prompts, masks, shared)
        for adapter in self._regional_adapters():
            adapter.generation = generation


def known_arguments() -> frozenset[str]:
    """The names of the `--network_args` that this module reads."""
    return LoRANetwork.known_arguments()


def argument_problems(arguments: Mapping[str, Any], *, lineage: str) -> list[str]:
    """What is wrong with `--network_args` for a kind of model, one sentence each; needs no models."""
    return check_arguments(
        lambda given: LoRANetwork.read_arguments(given, is_sdxl=lineage == "sdxl"), arguments, "networks.lora"
    )


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A fresh network: rank `network_dim` (None: 4), alpha `network_alpha` (None: 1); `kwargs` are `--network_args`.

    Raises ValueError for arguments that cannot be read, or that choose no layer at all.
    """
    rank = checked_rank(DEFAULT_RANK if network_dim is None else network_dim, "--network_dim")
    alpha = 1.0 if network_alpha is None else float(network_alpha)
    settings = NetworkSettings(rank, alpha, multiplier)
    arguments = NetworkArguments(kwargs, "networks.lora")
    return LoRANetwork.create(text_encoder, unet, settings, neuron_dropout, arguments)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: nn.Module | None,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """(network with exactly the modules, ranks and alphas of a file, the file's tensors); nothing is loaded into it.

    `weights_sd` replaces the file. `kwargs` are `--network_args`; those that choose ranks have no effect here.
    """
    weights = read_weights(file, weights_sd, unet)
    arguments = NetworkArguments(kwargs, "networks.lora")
    network = LoRANetwork.create_from_weights(
        text_encoder, unet, weights, multiplier, arguments, for_inference=for_inference
    )
    return network, weights
