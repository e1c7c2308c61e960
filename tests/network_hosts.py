"""Models that networks hook into, in tiny and in full size (on the meta device): U-Nets and CLIP encoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def sd_unet(**config) -> nn.Module:
    """diffusers' U-Net; without arguments a tiny one with attention on three levels."""
    from diffusers import UNet2DConditionModel

    tiny = {
        "sample_size": 8, "block_out_channels": (32, 32, 32, 64), "layers_per_block": 2, "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(**(tiny | config))


FULL_SD15 = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
             "attention_head_dim": 8}  # fmt: skip
FULL_SD21 = FULL_SD15 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                         "use_linear_projection": True}  # fmt: skip


class ClipEncoder(nn.Module):
    """A CLIP encoder whose layers stand below `text_model`, as in weight files."""

    def __init__(self, width: int = 32, layers: int = 2, mlp: int = 64) -> None:
        super().__init__()
        self.text_model = bare_clip(width, layers, mlp)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden state [B,T,width]."""
        return self.text_model(input_ids).last_hidden_state


def bare_clip(width: int = 32, layers: int = 2, mlp: int = 64) -> nn.Module:
    """transformers' own CLIP text model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=98, eos_token_id=99, pad_token_id=99,
        )  # fmt: skip
    )


class ResnetBlock2D(nn.Module):
    """The layers of an SDXL resnet in checkpoint naming."""

    def __init__(self, in_channels: int, channels: int, time_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), nn.Conv2d(in_channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Identity(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        if in_channels != channels:
            self.skip_connection = nn.Conv2d(in_channels, channels, 1)


class Downsample2D(nn.Module):
    """An SDXL downsampler."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Upsample2D(nn.Module):
    """An SDXL upsampler."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)


class SdxlUNet2DConditionModel(nn.Module):
    """The module tree of an SDXL U-Net (three levels of two, three resnets on the way up), without its forward."""

    def __init__(self, channels: tuple[int, int, int], depths: tuple[int, int, int], context: int, head: int) -> None:
        super().__init__()
        self.context, self.head, self.time_width = context, head, 4 * channels[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, channels[0], 3, padding=1)])])
        skips, width = [channels[0]], channels[0]
        for level, (channel, depth) in enumerate(zip(channels, depths, strict=True)):
            for _ in range(2):
                self.input_blocks.append(self._block(width, channel, depth))
                width = channel
                skips.append(width)
            if level < 2:
                self.input_blocks.append(nn.ModuleList([Downsample2D(width)]))
                skips.append(width)
        middle = self._block(width, width, depths[-1])
        self.middle_block = nn.ModuleList([*middle, ResnetBlock2D(width, width, self.time_width)])
        self.output_blocks = nn.ModuleList()
        for level, (channel, depth) in reversed(list(enumerate(zip(channels, depths, strict=True)))):
            for item in range(3):
                block = self._block(width + skips.pop(), channel, depth)
                width = channel
                if item == 2 and level > 0:
                    block.append(Upsample2D(width))
                self.output_blocks.append(block)

    def _block(self, in_channels: int, channels: int, depth: int) -> nn.ModuleList:
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        block = nn.ModuleList([ResnetBlock2D(in_channels, channels, self.time_width)])
        if depth:
            block.append(
                Transformer2DModel(
                    channels // self.head, self.head, channels, num_layers=depth, cross_attention_dim=self.context,
                    use_linear_projection=True,
                )  # fmt: skip
            )
        return block


def randomize(network: nn.Module, scale: float = 0.1) -> None:
    """Fill the up factors, which start at zero, so that the network does something."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                parameter.normal_(0, scale)


def unet_inputs(unet: nn.Module, batch: int = 2) -> Mapping[str, torch.Tensor]:
    """Random inputs of a diffusers U-Net's forward."""
    context = unet.config.cross_attention_dim
    return {
        "sample": torch.randn(batch, 4, 8, 8), "timestep": torch.tensor([10.0, 500.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 7, context),
    }  # fmt: skip
