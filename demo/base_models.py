"""The demo's models (text encoder and U-Net with the structure of SD 1.x) and how they become one checkpoint file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.checkpoints import layout_sd
from library.checkpoints.tensors import save_tensors

CHECKPOINT_NAME = "shapes_sd15.safetensors"
TOKENIZER_NAME = "tokenizer"
HEADS = 8


@dataclass(frozen=True)
class BaseSize:
    """Widths of the base model. `levels` are the U-Net's channels per level (SD 1.5: 320, 640, 1280, 1280)."""

    levels: tuple[int, int, int, int] = (64, 96, 32, 32)
    context: int = 80
    text_layers: int = 2
    latent_size: int = 8


def build_unet(size: BaseSize) -> UNet2DConditionModel:
    """U-Net with SD 1.x's blocks: three levels with cross attention, one without, two resnets per level, 8 heads."""
    return UNet2DConditionModel(
        sample_size=size.latent_size, in_channels=4, out_channels=4, block_out_channels=size.levels,
        layers_per_block=2, cross_attention_dim=size.context, attention_head_dim=HEADS, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def build_text_encoder(size: BaseSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text encoder (quick GELU, 77 positions); token embeddings start with the usual spread of 0.02."""
    head_width = next(width for width in (64, 32, 16, 8) if size.context % width == 0)
    vocabulary = len(tokenizer)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=size.context, intermediate_size=4 * size.context,
        num_hidden_layers=size.text_layers, num_attention_heads=size.context // head_width,
        max_position_embeddings=tokenizer.model_max_length, hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=1, projection_dim=size.context,
    ))


def single_file_tensors(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All tensors under the names of the original SD 1.x single-file layout."""
    text = {"text_model." + name.removeprefix("text_model."): tensor
            for name, tensor in text_encoder.state_dict().items() if not name.endswith("position_ids")}
    tensors = layout_sd.to_single_file(unet.state_dict(), text, vae.state_dict(), v2=False)
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def save_single_file(
    folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the checkpoint in the original layout into `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT_NAME
    metadata = {"modelspec.title": "Shapes", "modelspec.architecture": "stable-diffusion-v1",
                "modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon", "format": "pt"}
    save_tensors(path, single_file_tensors(unet, text_encoder, vae, dtype), metadata=metadata)
    return path
