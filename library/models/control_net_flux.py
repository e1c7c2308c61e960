"""FLUX's ControlNet: copies of the transformer's first blocks beside it, fed with the hint picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import layout_control_net_flux
from library.checkpoints.layout_control_net import OPTION
from library.checkpoints.tensors import fill_module, shapes_of
from library.models.flux import Flux, FluxParams, FluxResiduals, FluxTrunk, pack_latents

DOUBLE_DEPTH, SINGLE_DEPTH = 2, 0  # blocks of a new ControlNet
HINT_WIDTH = 16
_STRIDED = (2, 4, 6)  # convolutions of the hint network that halve the resolution


def hint_network(channels: Sequence[int]) -> nn.Sequential:
    """Convolutions with SiLU between; [B,3,H,W] -> [B,channels[-1],H/8,W/8]."""
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        layers += [nn.SiLU()] * (index > 0)
        layers.append(nn.Conv2d(wide, narrow, 3, padding=1, stride=2 if index in _STRIDED else 1))
    return nn.Sequential(*layers)


class FluxControlNet(FluxTrunk):
    """Residuals for the blocks of a `Flux`."""

    def __init__(self, params: FluxParams, hint_channels: Sequence[int]) -> None:
        super().__init__(params)
        size = params.hidden_size
        self.input_hint_block = hint_network(hint_channels)
        self.pos_embed_input = nn.Linear(params.in_channels, size)
        self.controlnet_blocks = nn.ModuleList([nn.Linear(size, size) for _ in range(params.double_depth)])
        self.controlnet_blocks_for_single = nn.ModuleList([nn.Linear(size, size) for _ in range(params.single_depth)])

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, *inputs: Tensor, hint: Tensor, **options: Any) -> Any:
        """`FluxResiduals`, one per block of this ControlNet.

        Inputs are those of `Flux.forward`; `hint` [B,3,H,W] holds RGB in [-1,1] at eight times the latents' size.
        """
        tokens = self.embed(img, img_ids, txt, *inputs, **options)
        x = tokens.img + self.pos_embed_input(pack_latents(self.input_hint_block(hint)))
        txt, vector, turn, mask = tokens.txt, tokens.vector, tokens.turn, tokens.mask
        double, single = [], []
        for block, layer in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            x, txt = self._run(block, x, txt, vector, turn, mask)
            double.append(layer(x))
        x = torch.cat([txt, x], dim=1)
        for block, layer in zip(self.single_blocks, self.controlnet_blocks_for_single, strict=True):
            x = self._run(block, x, vector, turn, mask)
            single.append(layer(x))
        return FluxResiduals(tuple(double), tuple(single))


def new_flux_control_net(base: Flux) -> FluxControlNet:
    """A ControlNet in float32 with copies of the base model's embedders and first blocks; its residuals are zero."""
    params = replace(base.params, double_depth=min(DOUBLE_DEPTH, base.params.double_depth), single_depth=SINGLE_DEPTH)
    channels = (3, *[HINT_WIDTH] * (layout_control_net_flux.HINT_LAYERS - 1), params.in_channels // 4)
    with torch.device("meta"):
        net = FluxControlNet(params, channels)
    copies = base.state_dict()
    fresh = {"input_hint_block": hint_network(channels), "pos_embed_input": nn.Linear(*_sizes(net.pos_embed_input))}
    last = f"input_hint_block.{2 * layout_control_net_flux.HINT_LAYERS - 2}."
    random = {f"{name}.{key}": value for name, module in fresh.items() for key, value in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if key in copies:
            tensors[key] = copies[key].detach().clone()
        elif key in random and not key.startswith(last) and key != "pos_embed_input.bias":
            tensors[key] = random[key]
        else:
            tensors[key] = torch.zeros(value.shape)
    fill_module(net, tensors, component="ControlNet", dtype=torch.float32)
    return net.eval()


def _sizes(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def build_flux_control_net(base: Flux, tensors: Mapping[str, Tensor]) -> FluxControlNet:
    """A ControlNet in float32 for `base` with the given tensors; its depths come from their keys.

    Raises ValueError with missing, unexpected and misshapen keys, or if the base model has other widths.
    """
    tensors = layout_control_net_flux.control_net_tensors(tensors)
    shapes = shapes_of(tensors)
    config = layout_control_net_flux.control_net_config(shapes, axes_dims=base.params.axes_dims)
    params = FluxParams(**config)
    for name in ("in_channels", "hidden_size", "num_heads", "context_width", "vector_width"):
        if getattr(params, name) != getattr(base.params, name):
            raise ValueError(
                f"{OPTION} {tensors.source}: its {name} is {getattr(params, name)}, the base "
                f"model's {getattr(base.params, name)}; it is for another model."
            )
    with torch.device("meta"):
        net = FluxControlNet(params, layout_control_net_flux.hint_channels(shapes))
    fill_module(net, tensors, component="ControlNet", dtype=torch.float32)
    return net.eval()
