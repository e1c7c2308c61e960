"""Models that networks hook into, in tiny and in full size (on the meta device): U-Nets and CLIP encoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from library.checkpoints.layout_sdxl import SdxlUnetConfig
from library.checkpoints.layout_unet import Level, UnetStructure


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


def sdxl_config(
    channels: tuple[int, ...] = (32, 32, 64), depths: tuple[int, ...] = (0, 2, 1), context: int = 192, head: int = 32
) -> SdxlUnetConfig:
    """SDXL's shape (two resnets per level, one more on the way up) with attention `depths` per level."""
    last = len(channels) - 1
    return SdxlUnetConfig(
        in_channels=4, out_channels=4, channels=channels, heads=tuple(c // head for c in channels),
        structure=UnetStructure(
            down=tuple(Level((depth,) * 2, index < last) for index, depth in enumerate(depths)), middle=depths[-1],
            up=tuple(Level((depth,) * 3, index < last) for index, depth in enumerate(reversed(depths))),
        ),
        context_width=context, vector_width=2816 if context == 2048 else 64 + 6 * 8, time_width=4 * channels[0],
    )  # fmt: skip


def sdxl_unet(*args, **options) -> nn.Module:
    """SDXL's U-Net for the arguments of `sdxl_config`; without any a tiny one."""
    from library.models.unet_sdxl import SdxlUNet2DConditionModel

    return SdxlUNet2DConditionModel(sdxl_config(*args, **options))


FULL_SDXL = {"channels": (320, 640, 1280), "depths": (0, 2, 10), "context": 2048, "head": 64}


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
