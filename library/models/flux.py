"""FLUX.1's transformer with the module paths of the original checkpoints, and the packing of its latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.checkpoints.layout_flux import transformer_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import shapes_of
from library.models.attention import Attention, as_tokens, fused

NORM_EPSILON = 1e-6
ROPE_THETA = 10000


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a FLUX transformer; `layout_flux.transformer_config` reads them from the shapes of a file."""

    in_channels: int  # of a packed image token: 64 in dev and schnell
    out_channels: int
    hidden_size: int
    num_heads: int
    context_width: int  # of the text tokens (T5)
    vector_width: int  # of the pooled text (CLIP-L)
    time_width: int  # of the sinusoids of time and guidance
    mlp_width: int  # in double blocks
    single_mlp_width: int
    double_depth: int
    single_depth: int
    axes_dims: tuple[int, ...]  # rotary features per position axis; their sum is the width of a head
    qkv_bias: bool
    guidance: bool  # whether guidance is an input (dev) or not (schnell)

    def __post_init__(self) -> None:
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        if rest or sum(self.axes_dims) != head_dim or any(width % 2 for width in self.axes_dims):
            raise ValueError(
                f"FLUX transformer: {self.num_heads} heads of a width {self.hidden_size} need rotary widths that are "
                f"even and add up to {head_dim}; given: {list(self.axes_dims)}."
            )


# --- latents and positions -------------------------------------------------------------------------------------
def pack_latents(latents: Tensor) -> Tensor:
    """Latents [B,C,H,W] -> tokens [B,HW/4,4C]: 2x2 patches row by row, features ordered channel, row, column.

    Raises ValueError if H or W is odd.
    """
    batch, channels, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"FLUX needs latents of even height and width, given {height}x{width}: resize to 16 pixels.")
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def unpack_latents(tokens: Tensor, latent_hw: tuple[int, int]) -> Tensor:
    """Tokens [B,HW/4,4C] -> latents [B,C,H,W]; the inverse of `pack_latents`."""
    height, width = latent_hw
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, height, width)


def image_ids(batch: int, latent_hw: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Positions (0, row, column) of the packed tokens of latents [H,W]: float32 [B,HW/4,3]."""
    rows, columns = latent_hw[0] // 2, latent_hw[1] // 2
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.reshape(1, rows * columns, 3).repeat(batch, 1, 1)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of all rotary angles, float32 [B,1,L,head_dim/2] each."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Turns neighbouring pairs of features of x [B,heads,L,head_dim] (Su et al. 2021, eq. 34)."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((self.cos * even - self.sin * odd, self.sin * even + self.cos * odd), dim=-1)
        return turned.flatten(-2).to(x.dtype)


def rotation(ids: Tensor, axes_dims: Sequence[int]) -> Rotation:
    """The rotation of positions [B,L,axes]; angles are computed in float64 (on the CPU where a device has none)."""
    device = ids.device
    positions = (ids.cpu() if device.type == "mps" else ids).double()
    angles = []
    for axis, width in enumerate(axes_dims):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(positions[..., axis, None] * ROPE_THETA**-exponents)
    angle = torch.cat(angles, dim=-1)[:, None]
    return Rotation(angle.cos().float().to(device), angle.sin().float().to(device))


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Features of t [B] in [0,1] (guidance: any number): float32 [B,width], cosines before sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# --- parts of a block ------------------------------------------------------------------------------------------
class MLPEmbedder(nn.Module):
    """A vector [B,in] -> [B,hidden]."""

    def __init__(self, in_width: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_width, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPSILON) * self.scale.float()


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [B,L,3H] -> queries, keys (both normalised), values, each [B,heads,L,head_dim]."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is over both."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.heads = params.num_heads
        self.qkv = nn.Linear(size, 3 * size, bias=params.qkv_bias)
        self.norm = QKNorm(size // params.num_heads)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B,L,H], each [B,heads,L,head_dim]."""
        return self.norm(self.qkv(x), self.heads)


class Modulation(nn.Module):
    """Shift, scale and gate, once or twice, from the conditioning vector."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(size, count * size)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector [B,H] -> `count` tensors [B,1,H]."""
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


def layer_norm(size: int) -> nn.LayerNorm:
    """The norm before every modulation: without parameters."""
    return nn.LayerNorm(size, elementwise_affine=False, eps=NORM_EPSILON)


def mlp(size: int, width: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear."""
    return nn.Sequential(nn.Linear(size, width), nn.GELU(approximate="tanh"), nn.Linear(width, size))


# --- blocks ----------------------------------------------------------------------------------------------------
class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own and one attention over both, text first."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.img_mod = Modulation(size, 6)
        self.img_norm1 = layer_norm(size)
        self.img_attn = SelfAttention(params)
        self.img_norm2 = layer_norm(size)
        self.img_mlp = mlp(size, params.mlp_width)
        self.txt_mod = Modulation(size, 6)
        self.txt_norm1 = layer_norm(size)
        self.txt_attn = SelfAttention(params)
        self.txt_norm2 = layer_norm(size)
        self.txt_mlp = mlp(size, params.mlp_width)
        self.attention: Attention = fused

    def forward(
        self, img: Tensor, txt: Tensor, vector: Tensor, turn: Rotation, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Image [B,Li,H] and text [B,Lt,H] tokens after the block; `mask` is True where a key counts."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vector)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vector)
        of_txt = self.txt_attn((1 + txt_scale1) * self.txt_norm1(txt) + txt_shift1)
        of_img = self.img_attn((1 + img_scale1) * self.img_norm1(img) + img_shift1)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_txt, of_img, strict=True))
        seen = as_tokens(self.attention(turn(q), turn(k), v, mask))
        txt_seen, img_seen = seen[:, : txt.shape[1]], seen[:, txt.shape[1] :]
        img = img + img_gate1 * self.img_attn.proj(img_seen)
        img = img + img_gate2 * self.img_mlp((1 + img_scale2) * self.img_norm2(img) + img_shift2)
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_seen)
        txt = txt + txt_gate2 * self.txt_mlp((1 + txt_scale2) * self.txt_norm2(txt) + txt_shift2)
        return img, txt


class SingleStreamBlock(nn.Module):
    """All tokens together, attention and feed-forward side by side."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.heads = params.num_heads
        self.widths = [3 * size, params.single_mlp_width]
        self.linear1 = nn.Linear(size, sum(self.widths))
        self.linear2 = nn.Linear(size + params.single_mlp_width, size)
        self.norm = QKNorm(size // params.num_heads)
        self.pre_norm = layer_norm(size)
        self.modulation = Modulation(size, 3)
        self.attention: Attention = fused

    def forward(self, x: Tensor, vector: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """Tokens [B,Lt+Li,H] after the block."""
        shift, scale, gate = self.modulation(vector)
        qkv, inner = self.linear1((1 + scale) * self.pre_norm(x) + shift).split(self.widths, dim=-1)
        q, k, v = self.norm(qkv, self.heads)
        seen = as_tokens(self.attention(turn(q), turn(k), v, mask))
        return x + gate * self.linear2(torch.cat([seen, F.gelu(inner, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    """The output projection, modulated once more (shift before scale)."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.norm_final = layer_norm(size)
        self.linear = nn.Linear(size, params.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


# --- the model -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FluxResiduals:
    """What a ControlNet adds: after double block n `double[n % len]` [B,Li,H] to the image tokens, after single block
    n `single[n % len]` [B,Lt+Li,H] to all tokens. Either may be empty."""

    double: tuple[Tensor, ...] = ()
    single: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What every block gets: embedded image [B,Li,H] and text [B,Lt,H], and what both depend on."""

    img: Tensor
    txt: Tensor
    vector: Tensor  # [B,H]
    turn: Rotation
    mask: Tensor | None


class FluxTrunk(nn.Module):
    """What the transformer and its ControlNets have in common: embedders and blocks."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        self.gradient_checkpointing = False
        size = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, size)
        self.time_in = MLPEmbedder(params.time_width, size)
        self.vector_in = MLPEmbedder(params.vector_width, size)
        self.guidance_in = MLPEmbedder(params.time_width, size) if params.guidance else None
        self.txt_in = nn.Linear(params.context_width, size)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(params) for _ in range(params.double_depth)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(params) for _ in range(params.single_depth)])

    def embed(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        timesteps: Tensor,
        y: Tensor,
        *,
        guidance: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tokens:
        """The inputs of the first block; see `Flux.forward` for the arguments and errors."""
        self._check_inputs(img, guidance)
        vector = self._conditioning_vector(timesteps, y, guidance, img.dtype)
        ids = torch.cat([img_ids.new_zeros(len(img_ids), txt.shape[1], img_ids.shape[2]), img_ids], dim=1)
        turn = rotation(ids, self.params.axes_dims)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask.bool(), (0, img.shape[1]), value=True)[:, None, None]
        return Tokens(self.img_in(img), self.txt_in(txt), vector, turn, mask)

    def _check_inputs(self, img: Tensor, guidance: Tensor | None) -> None:
        if self.guidance_in is not None and guidance is None:
            raise ValueError("This FLUX model was distilled with guidance and needs a guidance value per sample.")
        if img.shape[-1] != self.params.in_channels:
            raise ValueError(
                f"This FLUX model takes {self.params.in_channels} channels per packed token, given {img.shape[-1]} "
                "(Fill, Canny and Depth models need their extra channels; dev and schnell take 64)."
            )

    def _conditioning_vector(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        width = self.params.time_width
        vector = self.time_in(sinusoid(timesteps, width).to(dtype))
        if self.guidance_in is not None and guidance is not None:
            vector = vector + self.guidance_in(sinusoid(guidance, width).to(dtype))
        return vector + self.vector_in(y)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass (only in train mode)."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def set_attention(self, attention: Attention) -> None:
        """How every block computes attention."""
        for block in (*self.double_blocks, *self.single_blocks):
            block.attention = attention


class Flux(FluxTrunk):
    """The transformer: a velocity (noise minus latents) for every packed token."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.final_layer = LastLayer(params)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        timesteps: Tensor,
        y: Tensor,
        *,
        guidance: Tensor | None = None,
        text_mask: Tensor | None = None,
        residuals: FluxResiduals | None = None,
    ) -> Tensor:
        """Packed noisy latents [B,Li,in] -> velocity [B,Li,out].

        img_ids: [B,Li,3]. txt: T5 states [B,Lt,context]; text has position zero. timesteps: [B] in [0,1], float32 in
        every precision. y: pooled CLIP [B,vector]. guidance: [B], needed if the model has the input, otherwise
        unused. text_mask: [B,Lt], nonzero where a text token counts. The dtype of `img` is that of the computation.
        Raises ValueError if the guidance is missing or `img` has other channels than the model.
        """
        residuals = residuals or FluxResiduals()
        tokens = self.embed(img, img_ids, txt, timesteps, y, guidance=guidance, text_mask=text_mask)
        img, txt, vector, turn, mask = tokens.img, tokens.txt, tokens.vector, tokens.turn, tokens.mask
        for index, block in enumerate(self.double_blocks):
            img, txt = self._run(block, img, txt, vector, turn, mask)
            if residuals.double:
                img = img + residuals.double[index % len(residuals.double)]
        x = torch.cat([txt, img], dim=1)
        for index, block in enumerate(self.single_blocks):
            x = self._run(block, x, vector, turn, mask)
            if residuals.single:
                x = x + residuals.single[index % len(residuals.single)]
        return self.final_layer(x[:, txt.shape[1] :], vector)


def build_flux(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    axes_dims: Sequence[int] | None = None,
) -> Flux:
    """A transformer with the given tensors (`layout_flux.transformer_tensors`); its sizes come from their shapes.

    axes_dims: a folder's `axes_dims_rope`. Raises ValueError unless keys and shapes fit exactly.
    """
    with naming_file(tensors), torch.device("meta"):
        params = FluxParams(**transformer_config(shapes_of(tensors), axes_dims=axes_dims))
        model = Flux(params)
    fill_from_file(model, tensors, component="FLUX transformer", dtype=dtype, device=device)
    return model.eval().requires_grad_(False)
