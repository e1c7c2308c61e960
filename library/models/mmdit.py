"""The SD3 and SD3.5 transformer (MMDiT) with the module paths of its original checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.checkpoints.layout_sd3 import transformer_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import Operation, RenamedTensors, shapes_of
from library.models.attention import Attention, as_tokens, fused
from library.models.placement import a_tensor_of

EPSILON = 1e-6  # of every normalisation
TIME_PERIOD = 10000.0
POSITION_PERIOD = 10000.0
POSITION_SPAN = 16.0  # the table's positions run over this much within its base size
POSITION_BASE = 64  # patches of a published model's base size (1024 pixels)


@dataclass(frozen=True)
class MMDiTParams:
    """All dimensions of an MMDiT; `library.checkpoints.layout_sd3.transformer_config` reads them from shapes."""

    patch_size: int
    in_channels: int
    out_channels: int
    depth: int
    hidden_size: int
    heads: int
    mlp_size: int
    time_size: int  # width of the timestep's sinusoid
    vector_size: int  # width of the pooled text
    context_size: int  # width of the text tokens
    position_side: int  # the position table holds side x side places
    qk_norm: Literal["rms", "layer"] | None = None
    dual_blocks: frozenset[int] = frozenset()  # blocks whose image side attends twice
    register_length: int = 0  # learned tokens in front of the text tokens

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden size {self.hidden_size} cannot be divided among {self.heads} heads.")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads


# --- positions -------------------------------------------------------------------------------------------------
def position_table(hidden_size: int, side: int, base: int) -> Tensor:
    """Sines and cosines of a square grid [side, side, hidden_size] in float32; first the column, then the row.

    The middle `base` places of each axis span positions 0 to 16, so tables of different sizes agree around the centre.
    Raises ValueError unless the width is a multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"a position table needs a width that is a multiple of 4, not {hidden_size}.")
    quarter = hidden_size // 4
    frequencies = POSITION_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    places = (torch.arange(side, dtype=torch.float64) - (side - base) / 2) * (POSITION_SPAN / base)
    angles = places[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis[None].expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).float()


class ScaledPositions:
    """Position tables made for the sizes of a training set, instead of the one in the file.

    `latent_sizes` are edge lengths of square training latents. The table of a picture is the one whose square is
    nearest in area; a picture longer than that table's edge gets a table of its own size.
    """

    def __init__(self, latent_sizes: Sequence[int], *, hidden_size: int, patch_size: int = 2) -> None:
        self._bases = sorted({size // patch_size for size in latent_sizes})
        if not self._bases or self._bases[0] < 1:
            raise ValueError(f"scaled position tables need latent sizes of at least {patch_size}: {list(latent_sizes)}")
        self._hidden_size = hidden_size
        self._tables: dict[int, Tensor] = {}

    def table(self, height: int, width: int) -> Tensor:
        """The table [side, side, hidden] for a picture of so many patches; it is at least as large as the picture."""
        area = height * width
        neighbours = zip(self._bases, self._bases[1:], strict=False)
        base = next((low for low, high in neighbours if area <= (low**2 + high**2) // 2), self._bases[-1])
        if max(height, width) > _side_of(base):
            base = max(height, width)
        if base not in self._tables:
            self._tables[base] = position_table(self._hidden_size, _side_of(base), base)
        return self._tables[base]


def _side_of(base: int) -> int:
    return int(1.5 * base)


def crop_positions(table: Tensor, height: int, width: int, *, random_rate: float = 0.0) -> Tensor:
    """The part [1, height*width, hidden] of a table [side, side, hidden]: its centre, or by chance any place.

    With `random_rate` above 0 one draw from torch's generator decides for the whole batch whether the place is drawn
    too. Raises ValueError if the picture is larger than the table.
    """
    side = table.shape[0]
    if height > side or width > side:
        raise ValueError(
            f"a picture of {height}x{width} patches is larger than the model's position table ({side}x{side} patches). "
            "Use a smaller picture or scaled position tables."
        )
    top, left = (side - height) // 2, (side - width) // 2
    if random_rate > 0 and float(torch.rand(())) < random_rate:
        top = int(torch.randint(side - height + 1, ()))
        left = int(torch.randint(side - width + 1, ()))
    return table[top : top + height, left : left + width].reshape(1, height * width, -1)


# --- embedders -------------------------------------------------------------------------------------------------
class PatchEmbedder(nn.Module):
    """Latents [B,C,H,W] -> tokens [B, H/p * W/p, hidden], row by row."""

    def __init__(self, parameters: MMDiTParams) -> None:
        super().__init__()
        size = parameters.patch_size
        self.proj = nn.Conv2d(parameters.in_channels, parameters.hidden_size, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VectorEmbedder(nn.Module):
    """A vector [B, width] -> [B, hidden]."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector)


def time_sinusoid(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timesteps [B] (0 to 1000) as [B, width] in float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(TIME_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# --- blocks ----------------------------------------------------------------------------------------------------
class RmsNorm(nn.Module):
    """Division by the root mean square, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)
        return (wide * self.weight.float()).to(x.dtype)


class QkvLayers(nn.Module):
    """The layers around one attention; the attention itself may span two token streams and stands in `JointBlock`."""

    def __init__(self, parameters: MMDiTParams, *, has_output: bool = True) -> None:
        super().__init__()
        width, head_size = parameters.hidden_size, parameters.head_size
        self.heads = parameters.heads
        self.qkv = nn.Linear(width, 3 * width)
        if has_output:
            self.proj = nn.Linear(width, width)
        self.ln_q: nn.Module = _head_norm(parameters.qk_norm, head_size)
        self.ln_k: nn.Module = _head_norm(parameters.qk_norm, head_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, L, head size] of tokens [B, L, hidden]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.ln_q(query).to(value.dtype), self.ln_k(key).to(value.dtype), value


def _head_norm(kind: str | None, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return RmsNorm(width) if kind == "rms" else nn.LayerNorm(width, eps=EPSILON)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def normalize(x: Tensor) -> Tensor:
    """Layer normalisation without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x` [B,L,hidden] scaled by 1 + `scale` and shifted, both [B, hidden]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SingleDiTBlock(nn.Module):
    """One stream (text or image) of a joint block.

    `is_last` marks the text side of the last block, whose tokens are only looked at. `is_dual` adds a second attention
    within the stream.
    """

    def __init__(self, parameters: MMDiTParams, *, is_last: bool = False, is_dual: bool = False) -> None:
        super().__init__()
        self.attention: Attention = fused
        width = parameters.hidden_size
        self.is_last = is_last
        self.is_dual = is_dual
        self.attn = QkvLayers(parameters, has_output=not is_last)
        if is_dual:
            self.attn2 = QkvLayers(parameters)
        if not is_last:
            self.mlp = Mlp(width, parameters.mlp_size)
        self.modulation_count = 2 if is_last else 9 if is_dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.modulation_count * width))

    def modulation(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Shifts, scales and gates [B, hidden] for a conditioning vector [B, hidden].

        Order: shift, scale, gate of the attention, then of the feed-forward part, then of the second attention.
        """
        return self.adaLN_modulation(vector).chunk(self.modulation_count, dim=-1)

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The stream after its part of the joint attention [B, L, hidden] has come back."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
        result = x + gate[:, None] * self.attn.proj(attended)
        if self.is_dual:
            shift, scale, gate = modulation[6:]
            own = as_tokens(self.attention(*self.attn2.project(modulate(normalize(x), shift, scale)), None))
            result = result + gate[:, None] * self.attn2.proj(own)
        return result + gate_mlp[:, None] * self.mlp(modulate(normalize(result), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Text and image tokens attend to each other; everything else they do apart."""

    def __init__(self, parameters: MMDiTParams, *, is_last: bool, is_dual: bool) -> None:
        super().__init__()
        self.attention: Attention = fused
        self.context_block = SingleDiTBlock(parameters, is_last=is_last)
        self.x_block = SingleDiTBlock(parameters, is_dual=is_dual)

    def forward(self, context: Tensor, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Text tokens [B,L,hidden] and image tokens [B,N,hidden] after this block; the last leaves the text alone."""
        context_modulation = self.context_block.modulation(vector)
        x_modulation = self.x_block.modulation(vector)
        context_qkv = self.context_block.attn.project(modulate(normalize(context), *context_modulation[:2]))
        x_qkv = self.x_block.attn.project(modulate(normalize(x), *x_modulation[:2]))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(context_qkv, x_qkv, strict=True))
        attended = as_tokens(self.attention(query, key, value, None))
        length = context.shape[1]
        x = self.x_block.update(x, attended[:, length:], x_modulation)
        if not self.context_block.is_last:
            context = self.context_block.update(context, attended[:, :length], context_modulation)
        return context, x


class FinalLayer(nn.Module):
    """Image tokens [B,N,hidden] -> patch contents [B, N, patch*patch*channels]."""

    def __init__(self, parameters: MMDiTParams) -> None:
        super().__init__()
        width = parameters.hidden_size
        self.linear = nn.Linear(width, parameters.patch_size**2 * parameters.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector).chunk(2, dim=-1)
        return self.linear(modulate(normalize(x), shift, scale))


# --- the model -------------------------------------------------------------------------------------------------
class MMDiT(nn.Module):
    """The denoiser of SD3 and SD3.5 (Esser et al. 2024); its output is the flow's velocity."""

    pos_embed: Tensor  # [1, side*side, hidden]: stored in files, never trained
    register: Tensor | None

    def __init__(self, parameters: MMDiTParams) -> None:
        super().__init__()
        self.params = parameters
        width = parameters.hidden_size
        self.x_embedder = PatchEmbedder(parameters)
        self.t_embedder = VectorEmbedder(parameters.time_size, width)
        self.y_embedder = VectorEmbedder(parameters.vector_size, width)
        self.context_embedder = nn.Linear(parameters.context_size, width)
        self.register_buffer("pos_embed", torch.zeros(1, parameters.position_side**2, width))
        count = parameters.register_length
        self.register_parameter("register", nn.Parameter(torch.zeros(1, count, width)) if count else None)
        self.joint_blocks = nn.ModuleList(
            JointBlock(parameters, is_last=index == parameters.depth - 1, is_dual=index in parameters.dual_blocks)
            for index in range(parameters.depth)
        )
        self.final_layer = FinalLayer(parameters)
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return a_tensor_of(self).device

    @property
    def dtype(self) -> torch.dtype:
        return a_tensor_of(self).dtype

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every joint block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing = False

    def set_attention(self, attention: Attention) -> None:
        """How every block computes attention."""
        for module in self.modules():
            if isinstance(module, JointBlock | SingleDiTBlock):
                module.attention = attention

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        *,
        scaled_positions: ScaledPositions | None = None,
        random_crop_rate: float = 0.0,
    ) -> Tensor:
        """Velocity [B,C,H,W] for noisy latents [B,C,H,W], timesteps [B] (0 to 1000), text [B,L,w], pooled text [B,v].

        `scaled_positions` replaces the position table of the file; `random_crop_rate` is the chance that the places
        are cut from anywhere in the table instead of its centre. Raises ValueError for a size that is no multiple of
        the patch or larger than the table.
        """
        patch = self.params.patch_size
        height, width = x.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"latents of {height}x{width} are not a multiple of the patch size {patch}.")
        rows, columns = height // patch, width // patch
        table = self._stored_table() if scaled_positions is None else scaled_positions.table(rows, columns)
        positions = crop_positions(table, rows, columns, random_rate=random_crop_rate)
        image = self.x_embedder(x)
        image = image + positions.to(device=image.device, dtype=image.dtype)
        time = time_sinusoid(t, self.params.time_size).to(x.dtype)
        vector = self.t_embedder(time) + self.y_embedder(y)
        context = self.context_embedder(context)
        if self.register is not None:
            context = torch.cat([self.register.expand(len(context), -1, -1).to(context.dtype), context], dim=1)
        for block in self.joint_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                context, image = checkpoint(block, context, image, vector, use_reentrant=False)
            else:
                context, image = block(context, image, vector)
        return self._picture(self.final_layer(image, vector), rows, columns)

    def _stored_table(self) -> Tensor:
        side = self.params.position_side
        return self.pos_embed.reshape(side, side, -1)

    def _picture(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        size = self.params.patch_size
        grid = patches.unflatten(-1, (size, size, -1)).unflatten(1, (rows, columns))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * size, columns * size)


def build_mmdit(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> MMDiT:
    """An MMDiT with the given tensors (original names without prefix); its sizes come from their shapes.

    A missing position table is computed. Raises ValueError unless keys and shapes fit exactly.
    """
    with naming_file(tensors), torch.device("meta"):
        parameters = MMDiTParams(**transformer_config(shapes_of(tensors)))
        model = MMDiT(parameters)
    if "pos_embed" not in tensors:
        table = position_table(parameters.hidden_size, parameters.position_side, POSITION_BASE).flatten(0, 1)[None]
        plan: dict[str, tuple[str, Operation | None]] = {key: (key, None) for key in tensors}
        plan["pos_embed"] = ("context_embedder.weight", lambda _: table)
        tensors = RenamedTensors(tensors, plan)
    fill_from_file(model, tensors, component="SD3 transformer", dtype=dtype, device=device)
    return model.eval().requires_grad_(False)
