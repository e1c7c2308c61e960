"""Regional prompts: several networks draw together, each in its own part of the picture and with its own sub-prompt.

Rows of a batch, for b images and n sub-prompts: latents and queries are [b uncond][b cond] and, where the negative
prompt of the user is separate, [b real uncond]; text is [b uncond][b * n cond, image by image][b real uncond]. Queries
of the cross-attention are repeated for every sub-prompt, and its results are blended by the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

LATENT_FACTOR = 8  # pixels per latent
PYRAMID_LEVELS = 4
BLEND_EPSILON = 1e-4


@dataclass(frozen=True)
class Region:
    """One network's part: its sub-prompt, its mask [H,W] in [0,1], and whether it is the outermost network."""

    index: int
    is_last_network: bool
    mask: Tensor

    def __post_init__(self) -> None:
        if not self.mask.any():
            object.__setattr__(self, "mask", torch.ones_like(self.mask))


@dataclass(frozen=True)
class Generation:
    """One batch of pictures: its layout, the region's mask per area (height * width), and blends under way.

    `shared` is one dictionary for all networks of the batch.
    """

    batch_size: int
    num_sub_prompts: int
    masks: dict[int, Tensor]
    shared: dict[str, Blend] = field(default_factory=dict)

    @property
    def cond_end(self) -> int:
        """First text row behind the conditional ones."""
        return self.batch_size * (1 + self.num_sub_prompts)

    def weight_for(self, output: Tensor) -> Tensor | float:
        """The mask that fits a layer's output, shaped to broadcast; 1 / n where none fits."""
        is_spatial = output.dim() == 4
        area = output.shape[2:].numel() if is_spatial else output.shape[1]
        mask = self.masks.get(area) if output.dim() in (3, 4) else None
        if mask is None:
            return 1.0 / self.num_sub_prompts
        return mask.to(output).reshape((1, 1, *output.shape[2:]) if is_spatial else (1, -1, 1))


@dataclass
class Blend:
    """What the networks add to one cross-attention: changes [n * b, T, C], and one weight (mask) per sub-prompt."""

    changes: Tensor
    weights: list[Tensor | float]


def mask_pyramid(mask: Tensor, width: int, height: int, ds_ratio: float | None = None) -> dict[int, Tensor]:
    """Masks [h,w] for the feature sizes of a U-Net that draws `width` x `height` pixels, by area h * w.

    `ds_ratio`: additional sizes of deep shrink.
    """
    masks: dict[int, Tensor] = {}

    def add(height: int, width: int) -> None:
        resized = nn.functional.interpolate(mask.float()[None, None], (height, width), mode="bilinear")
        masks[height * width] = resized[0, 0]

    h, w = height // LATENT_FACTOR, width // LATENT_FACTOR
    for _ in range(PYRAMID_LEVELS):
        add(h, w)
        if h % 2 or w % 2:
            add(h + h % 2, w + w % 2)
        if ds_ratio is not None:
            add(int(h * ds_ratio), int(w * ds_ratio))
        h, w = (h + 1) // 2, (w + 1) // 2
    return masks


class RegionKind(Enum):
    """How a layer takes part, which its name decides."""

    TEXT_ENCODER = "text encoder: one row per sub-prompt"
    CROSS_ATTENTION_TEXT = "keys and values: one row per sub-prompt"
    EVERYWHERE = "time embedding: no place in the picture"
    QUERY = "queries: masked, then repeated per sub-prompt"
    OUT = "results of the cross-attention: blended"
    MASKED = "all other layers: masked"


def region_kind(name: str) -> RegionKind:
    """The kind of the layer with this network name."""
    if name.startswith(("lora_te_", "lora_te1_", "lora_te2_")):
        return RegionKind.TEXT_ENCODER
    if "attn2_to_k" in name or "attn2_to_v" in name:
        return RegionKind.CROSS_ATTENTION_TEXT
    if "time_emb" in name:
        return RegionKind.EVERYWHERE
    if "attn2_to_q" in name:
        return RegionKind.QUERY
    return RegionKind.OUT if "attn2_to_out" in name else RegionKind.MASKED


Path = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RegionalLayer:
    """A layer: its own forward (`original`) and a network's `change` of it, both functions of the input."""

    name: str
    original: Path
    change: Path

    def __call__(self, x: Tensor, region: Region, generation: Generation) -> Tensor:
        """The layer's output for a batch of regional prompts."""
        kind = region_kind(self.name)
        if kind is RegionKind.EVERYWHERE:
            return self.original(x) + self.change(x)
        if kind is RegionKind.TEXT_ENCODER:
            return self._text_encoder(x, region, generation)
        if kind is RegionKind.CROSS_ATTENTION_TEXT:
            first = generation.batch_size + region.index
            return self._with_changed_rows(x, slice(first, generation.cond_end), generation)
        if kind is RegionKind.OUT:
            return self._blended(x, region, generation)
        change = self.change(x)
        output = self.original(x) + change * generation.weight_for(change)
        if kind is RegionKind.QUERY and region.is_last_network:
            return repeat_queries(output, generation)
        return output

    def _text_encoder(self, x: Tensor, region: Region, generation: Generation) -> Tensor:
        if len(x) == generation.batch_size:  # the unconditional prompts
            return self.original(x)
        return self._with_changed_rows(x, slice(region.index, len(x)), generation)

    def _with_changed_rows(self, x: Tensor, rows: slice, generation: Generation) -> Tensor:
        chosen = slice(rows.start, rows.stop, generation.num_sub_prompts)
        output = self.original(x).clone()
        output[chosen] += self.change(x[chosen])
        return output

    def _blended(self, x: Tensor, region: Region, generation: Generation) -> Tensor:
        b, n = generation.batch_size, generation.num_sub_prompts
        change = self.change(x[b + region.index : generation.cond_end : n])
        if region.is_last_network:
            changes = change.new_zeros((n * b, *change.shape[1:]))
            generation.shared[self.name] = Blend(changes, [0.0] * n)
        blend = generation.shared.get(self.name)
        if blend is None:
            raise RuntimeError(f"regional prompts: the last network has no module {self.name}, which another one has.")
        blend.changes[region.index :: n] = change
        blend.weights[region.index] = generation.weight_for(change)
        output = self.original(x)
        return contract(output, generation.shared.pop(self.name), generation) if region.is_last_network else output


def repeat_queries(queries: Tensor, generation: Generation) -> Tensor:
    """[b uncond][b cond](+[b]) -> [b uncond][b * n cond](+[b])."""
    b = generation.batch_size
    cond = queries[b : 2 * b].repeat_interleave(generation.num_sub_prompts, dim=0)
    return torch.cat([queries[:b], cond, queries[2 * b :]])


def contract(output: Tensor, blend: Blend, generation: Generation) -> Tensor:
    """[b uncond][b * n cond](+[b]) -> [b uncond][b cond](+[b]): the sub-prompts' results, blended by their masks."""
    b, n, end = generation.batch_size, generation.num_sub_prompts, generation.cond_end
    ones = output.new_ones((1, output.shape[1], 1))
    weights = torch.stack([ones * weight for weight in blend.weights], dim=1)  # [1, n, T, 1]
    results = output[b:end].unflatten(0, (b, n))
    changes = blend.changes.unflatten(0, (b, n))
    cond = (weights * results).sum(1) / (weights.sum(1) + BLEND_EPSILON) + (weights * changes).sum(1)
    return torch.cat([output[:b], cond, output[end:]])
