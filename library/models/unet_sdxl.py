"""SDXL's U-Net under the module paths of its checkpoints, around diffusers' transformer blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.checkpoints.layout_sdxl import NORM_GROUPS, SdxlUnetConfig, unet_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import shapes_of
from library.models.placement import a_tensor_of

SIZE_COUNT = 6  # original height and width, crop top and left, target height and width


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Any values [...] -> float32 [..., width]: cosines, then sines, of frequencies 10000^(-k / (width / 2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def vector_conditioning(pooled: Tensor, sizes: Tensor, vector_width: int) -> Tensor:
    """Pooled text [B,p] and sizes in pixels [B,6] -> the U-Net's `y` [B,vector_width] in the dtype of `pooled`.

    sizes: original height, width, crop top, left, target height, width; each gets (vector_width - p) / 6 sinusoids.
    Raises ValueError if the widths do not fit.
    """
    width, rest = divmod(vector_width - pooled.shape[-1], SIZE_COUNT)
    if rest or width < 2 or width % 2 or sizes.shape[-1] != SIZE_COUNT:
        raise ValueError(
            f"Pooled text of width {pooled.shape[-1]} and {sizes.shape[-1]} sizes do not fit the U-Net, whose vector "
            f"input has width {vector_width}: the text encoder and the U-Net are not from the same kind of model."
        )
    embedded = sinusoids(sizes, width).flatten(-2)
    return torch.cat([pooled, embedded.to(device=pooled.device, dtype=pooled.dtype)], dim=-1)


class ResnetBlock2D(nn.Module):
    """Two convolutions with the time embedding between them, plus a shortcut."""

    def __init__(self, in_channels: int, channels: int, time_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, in_channels), nn.SiLU(), nn.Conv2d(in_channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Identity(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        changes = in_channels != channels
        self.skip_connection = nn.Conv2d(in_channels, channels, 1) if changes else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B,in,h,w], emb [B,time_width] -> [B,channels,h,w]."""
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Downsample2D(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,c,h,w] -> [B,c,ceil(h/2),ceil(w/2)]."""
        return self.op(x)


class Upsample2D(nn.Module):
    """Repeats pixels up to a given size, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size_hw: Sequence[int]) -> Tensor:
        """[B,c,h,w] -> [B,c,*size_hw]."""
        return self.conv(F.interpolate(x, size=tuple(size_hw), mode="nearest"))


class SdxlEncoder(nn.Module):
    """What SDXL's U-Net and its ControlNets have in common: embeddings, the way down and the middle block.

    `gradient_checkpointing`: in train mode every resnet and every transformer is computed again in the backward pass.
    """

    def __init__(self, config: SdxlUnetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        first, time_width = config.channels[0], config.time_width
        self.time_embed = nn.Sequential(nn.Linear(first, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(config.vector_width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        )
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, first, 3, padding=1)])])
        self.skip_channels = self._add_encoder(config)  # widths of all skip connections
        self.middle_block = self._middle(config)

    # --- construction ------------------------------------------------------------------------------------------
    def _add_encoder(self, config: SdxlUnetConfig) -> list[int]:
        """Appends the input blocks; returns the widths of all skip connections."""
        width = config.channels[0]
        skips = [width]
        for index, level in enumerate(config.structure.down):
            for depth in level.depths:
                self.input_blocks.append(self._block(config, index, width, depth))
                width = config.channels[index]
                skips.append(width)
            if level.has_resample:
                self.input_blocks.append(nn.ModuleList([Downsample2D(width)]))
                skips.append(width)
        return skips

    def _middle(self, config: SdxlUnetConfig) -> nn.ModuleList:
        depth = config.structure.middle
        if depth is None:
            return nn.ModuleList()
        width = config.channels[-1]
        block = self._block(config, len(config.channels) - 1, width, depth)
        if depth:
            block.append(ResnetBlock2D(width, width, config.time_width))
        return block

    @staticmethod
    def _block(config: SdxlUnetConfig, index: int, in_channels: int, depth: int) -> nn.ModuleList:
        """A resnet of level `index` and, for a depth above 0, the attention behind it."""
        channels, heads = config.channels[index], config.heads[index]
        block = nn.ModuleList([ResnetBlock2D(in_channels, channels, config.time_width)])
        if depth:
            block.append(
                Transformer2DModel(
                    heads, channels // heads, channels, num_layers=depth, cross_attention_dim=config.context_width,
                    norm_num_groups=NORM_GROUPS, use_linear_projection=True,
                )  # fmt: skip
            )
        return block

    # --- settings ----------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return a_tensor_of(self).device

    @property
    def dtype(self) -> torch.dtype:
        return a_tensor_of(self).dtype

    def enable_gradient_checkpointing(self) -> None:
        """Recompute resnets and transformers in the backward pass (only in train mode)."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def set_attn_processor(self, processor: Any) -> None:
        """Gives every attention layer the same diffusers attention processor."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)

    def enable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention with xformers."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_use_memory_efficient_attention_xformers(True)

    # --- computation -------------------------------------------------------------------------------------------
    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, *, added: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """(all skip connections, output of the middle block, embedding of time and `y` [B,time_width]).

        Inputs are those of the U-Net; `added` [B,channels,h,w] comes on top of the first block's output.
        Raises ValueError if `y` has another width than the model takes.
        """
        if y.shape[-1] != self.config.vector_width:
            raise ValueError(f"y has width {y.shape[-1]}, this U-Net takes {self.config.vector_width}.")
        emb = self._embed(x, timesteps, y)
        skips: list[Tensor] = []
        for index, block in enumerate(self.input_blocks):
            x = self._run(block, x, emb, context)
            if added is not None and index == 0:
                x = x + added
            skips.append(x)
        return skips, self._run(self.middle_block, x, emb, context), emb

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        times = timesteps.to(x.device).expand(x.shape[0])
        embedded = self.time_embed(sinusoids(times, self.config.channels[0]).to(x.dtype))
        return embedded + self.label_emb(y.to(x.dtype))

    def _run(self, block: Any, x: Tensor, emb: Tensor, context: Tensor, *, size_hw: Sequence[int] = ()) -> Tensor:
        """The layers of one numbered block; `size_hw` is what an upsampler at its end makes."""
        for layer in block:
            if isinstance(layer, ResnetBlock2D):
                x = self._recomputable(layer, x, emb)
            elif isinstance(layer, Transformer2DModel):
                x = self._recomputable(layer, x, encoder_hidden_states=context, return_dict=False)[0]
            elif isinstance(layer, Upsample2D):
                x = layer(x, size_hw)
            else:
                x = layer(x)
        return x

    def _recomputable(self, layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, **options)
        return layer(*inputs, **options)


class SdxlUNet2DConditionModel(SdxlEncoder):
    """The U-Net of SDXL; its state dict has the names of the original checkpoints."""

    def __init__(self, config: SdxlUnetConfig) -> None:
        super().__init__(config)
        self.output_blocks = nn.ModuleList()
        self._add_decoder(config, list(self.skip_channels))
        first = config.channels[0]
        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, first), nn.SiLU(), nn.Conv2d(first, config.out_channels, 3, padding=1)
        )

    def _add_decoder(self, config: SdxlUnetConfig, skips: list[int]) -> None:
        width = config.channels[-1]
        for index, level in zip(reversed(range(len(config.channels))), config.structure.up, strict=True):
            for depth in level.depths:
                self.output_blocks.append(self._block(config, index, width + skips.pop(), depth))
                width = config.channels[index]
            if level.has_resample:
                cast(nn.ModuleList, self.output_blocks[-1]).append(Upsample2D(width))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor,
        *,
        residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Noise or velocity [B,out,h,w].

        x: noisy latents [B,in,h,w]; timesteps in [0, 1000), a number or [B]; context: text states [B,T,context_width];
        y: see `vector_conditioning` [B,vector_width]; residuals: a ControlNet's, one per skip connection (in the order
        of `input_blocks`) and one for the middle. Any h and w will do. Raises ValueError if `y` has another width.
        """
        skips, x, emb = self.encode(x, timesteps, context, y)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals[0], strict=True)]
            x = x + residuals[1]
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, emb, context, size_hw=skips[-1].shape[-2:] if skips else ())
        return self.out(x)


def build_sdxl_unet(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    heads: int | Sequence[int] | None = None,
) -> SdxlUNet2DConditionModel:
    """The U-Net with the given tensors (original names, linear projections) in eval mode without gradients.

    Sizes come from shapes; `heads` from a folder's config.json. Raises ValueError unless keys and shapes fit exactly.
    """
    with naming_file(tensors), torch.device("meta"):
        config = unet_config(shapes_of(tensors), heads=heads)
        unet = SdxlUNet2DConditionModel(config)
    fill_from_file(unet, tensors, component="U-Net", dtype=dtype, device=device)
    return unet.eval().requires_grad_(False)
