"""SDXL's ControlNet: the U-Net's encoder, a network that reads the hint picture, and zero convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from library.checkpoints import layout_control_net, layout_unet
from library.checkpoints.layout_sdxl import SdxlUnetConfig
from library.checkpoints.tensors import fill_module, shapes_of
from library.models.unet_sdxl import SdxlEncoder, SdxlUNet2DConditionModel

HINT_CHANNELS = (16, 32, 96, 256)


class SdxlControlNet(SdxlEncoder):
    """Residuals for every skip connection and the middle of an `SdxlUNet2DConditionModel`."""

    def __init__(self, config: SdxlUnetConfig, hint_channels: Sequence[int] = HINT_CHANNELS) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            config.channels[0], block_out_channels=tuple(hint_channels)
        )
        widths = self.skip_channels
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(width, width, 1) for width in widths])
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, hint: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """(one residual per skip connection, one for the middle).

        The first four inputs are the U-Net's; `hint` [B,3,H,W] holds RGB in [0,1] at eight times the latents' size.
        """
        skips, middle, _ = self.encode(x, timesteps, context, y, added=self.controlnet_cond_embedding(hint))
        residuals = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return residuals, self.controlnet_mid_block(middle)


def new_sdxl_control_net(unet: SdxlUNet2DConditionModel) -> SdxlControlNet:
    """A ControlNet in float32 with copies of the U-Net's encoder; its residuals are zero."""
    with torch.device("meta"):
        net = SdxlControlNet(unet.config)
    copies = unet.state_dict()
    hint = ControlNetConditioningEmbedding(unet.config.channels[0], block_out_channels=HINT_CHANNELS).state_dict()
    tensors: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if key in copies:
            tensors[key] = copies[key].detach().clone()
        elif key.startswith(layout_control_net.HINT_PREFIX):
            tensors[key] = hint[key.removeprefix(layout_control_net.HINT_PREFIX)]
        else:
            tensors[key] = torch.zeros(value.shape)
    fill_module(net, tensors, component="ControlNet", dtype=torch.float32)
    return net.eval()


def build_sdxl_control_net(config: SdxlUnetConfig, tensors: Mapping[str, Tensor]) -> SdxlControlNet:
    """A ControlNet in float32 for a U-Net of these sizes with the given tensors (of any naming).

    Raises ValueError with missing, unexpected and misshapen keys.
    """
    tensors = layout_control_net.to_diffusers(tensors)
    with torch.device("meta"):
        net = SdxlControlNet(config, layout_control_net.hint_channels(shapes_of(tensors)))
    encoder = layout_unet.to_original(tensors, linear_projection=True)
    fill_module(net, encoder, component="ControlNet of this U-Net", dtype=torch.float32)
    return net.eval()
