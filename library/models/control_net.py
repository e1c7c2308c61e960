"""ControlNets of Stable Diffusion 1 and 2: diffusers' class, grown from a U-Net or filled from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import layout_control_net, layout_unet
from library.checkpoints.tensors import fill_module, shapes_of


def new_control_net(unet: Any) -> Any:
    """A `ControlNetModel` in float32 with the U-Net's encoder; its residuals are zero.

    Raises ValueError for U-Nets whose structure the class cannot have.
    """
    from diffusers import ControlNetModel

    _check_structure(unet)
    return ControlNetModel.from_unet(unet)


def build_control_net(unet: Any, tensors: Mapping[str, Tensor], *, config: Mapping[str, Any]) -> Any:
    """A `ControlNetModel` in float32 for this U-Net with the given tensors (of any naming).

    `config` is a diffusers folder's config.json; only the order of the hint's colours is taken from it.
    Raises ValueError with missing, unexpected and misshapen keys.
    """
    from diffusers import ControlNetModel

    _check_structure(unet)
    tensors = layout_control_net.to_diffusers(tensors)
    with torch.device("meta"):
        net = ControlNetModel.from_unet(
            unet, config.get("controlnet_conditioning_channel_order", "rgb"),
            layout_control_net.hint_channels(shapes_of(tensors)), load_weights_from_unet=False,
        )
    tensors = layout_unet.with_projections(tensors, linear=net.config.use_linear_projection)
    fill_module(net, tensors, component="ControlNet of this U-Net", dtype=torch.float32)
    return net.eval()


def _check_structure(unet: Any) -> None:
    layers = unet.config.layers_per_block
    if unet.mid_block is None or not isinstance(layers, int):
        raise ValueError(
            f"This U-Net (resnets per level: {layers}, middle block: {unet.mid_block is not None}) cannot have a "
            "ControlNet: it needs a middle block and the same number of resnets on every level."
        )
