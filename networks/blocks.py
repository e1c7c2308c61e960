"""Blocks of the SD and SDXL U-Nets by layer name, and per-block ranks and learning-rate factors."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from networks.arguments import NetworkArguments

if TYPE_CHECKING:
    from networks.network import NetworkSettings

logger = logging.getLogger(__name__)

NUM_OF_BLOCKS = 12  # down and up, each
NUM_OF_MID_BLOCKS = 1
SDXL_NUM_OF_BLOCKS = 9
SDXL_NUM_OF_MID_BLOCKS = 3

LR_PRESETS = ("sine", "cosine", "linear", "reverse_linear", "zeros")
LR_KEYS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")

_SD_BLOCK = re.compile(r"^lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_SDXL_BLOCK = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")
_SDXL_OFFSETS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
_SDXL_SIZES = {"input_blocks": 9, "middle_block": 3, "output_blocks": 9}


@dataclass(frozen=True)
class BlockRanks:
    """Ranks and alphas per block: of Linear and 1x1 layers, and of larger convolutions (None: not adapted)."""

    ranks: list[int]
    alphas: list[float]
    conv_ranks: list[int] | None = None
    conv_alphas: list[float] | None = None

    def at(self, index: int, *, is_spatial: bool) -> tuple[int, float] | None:
        """(rank, alpha) of a layer in block `index`; None if such layers are not adapted."""
        if not is_spatial:
            return self.ranks[index], self.alphas[index]
        if self.conv_ranks is None or self.conv_alphas is None:
            return None
        return self.conv_ranks[index], self.conv_alphas[index]


def num_of_all_blocks(is_sdxl: bool) -> int:
    """Length of every per-block list: 25 for SD 1/2, 23 for SDXL (which counts embeddings and output as blocks)."""
    return 23 if is_sdxl else 2 * NUM_OF_BLOCKS + NUM_OF_MID_BLOCKS


def get_block_index(lora_name: str, is_sdxl: bool = False) -> int:
    """Position of a U-Net layer in per-block lists (0-24 for SD 1/2, 0-22 for SDXL), or -1 if it is in no block."""
    return _sdxl_index(lora_name) if is_sdxl else _sd_index(lora_name)


def _sd_index(name: str) -> int:
    if name.startswith("lora_unet_mid_block_"):
        return NUM_OF_BLOCKS
    match = _SD_BLOCK.match(name)
    if match is None:
        return -1
    side, level, kind, item = match[1], int(match[2]), match[3], int(match[4])
    position = 3 * level + (2 if kind in ("downsamplers", "upsamplers") else item)
    index = 1 + position if side == "down" else 13 + position
    limit = NUM_OF_BLOCKS if side == "down" else 25
    return index if index < limit else -1


def _sdxl_index(name: str) -> int:
    if name.startswith(("lora_unet_time_embed_", "lora_unet_label_emb_")):
        return 0
    if name.startswith("lora_unet_out_"):
        return 22
    match = _SDXL_BLOCK.match(name)
    if match is None or int(match[2]) >= _SDXL_SIZES[match[1]]:
        return -1
    return _SDXL_OFFSETS[match[1]] + int(match[2])


def require_block_index(lora_name: str, is_sdxl: bool) -> int:
    """`get_block_index`, with ValueError for a layer that is in no block."""
    index = get_block_index(lora_name, is_sdxl)
    if index < 0:
        raise ValueError(
            f"per-block options cannot be used: {lora_name} lies in none of the "
            f"{num_of_all_blocks(is_sdxl)} blocks of {'an SDXL' if is_sdxl else 'an SD 1/2'} U-Net."
        )
    return index


# --- ranks -----------------------------------------------------------------------------------------------------
def get_block_dims_and_alphas(
    is_sdxl: bool,
    block_dims: str | Sequence[int] | None,
    block_alphas: str | Sequence[float] | None,
    network_dim: int,
    network_alpha: float,
    conv_block_dims: str | Sequence[int] | None,
    conv_block_alphas: str | Sequence[float] | None,
    conv_dim: int | None,
    conv_alpha: float | None,
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """Per-block (ranks, alphas, ranks of spatial convolutions, their alphas); the last two are None without them.

    Lists may be comma-separated text. Raises ValueError if a list has not exactly one entry per block.
    """
    count = num_of_all_blocks(is_sdxl)
    ranks = _entries("block_dims", block_dims, int, count) or [network_dim] * count
    alphas = _entries("block_alphas", block_alphas, float, count) or [network_alpha] * count
    conv_ranks = _entries("conv_block_dims", conv_block_dims, int, count)
    if conv_ranks is None and conv_dim is not None:
        conv_ranks = [conv_dim] * count
    if conv_ranks is None:
        return ranks, alphas, None, None
    default_alpha = 1.0 if conv_alpha is None else conv_alpha
    conv_alphas = _entries("conv_block_alphas", conv_block_alphas, float, count) or [default_alpha] * count
    return ranks, alphas, conv_ranks, conv_alphas


def remove_block_dims_and_alphas(
    is_sdxl: bool,
    block_dims: Sequence[int],
    block_alphas: Sequence[float],
    conv_block_dims: Sequence[int] | None,
    conv_block_alphas: Sequence[float] | None,
    block_lr_weight: Sequence[float] | None,
) -> tuple[list[int], list[float], list[int] | None, list[float] | None]:
    """The same lists with rank 0 (no modules) wherever the block's learning-rate factor is 0."""
    factors = block_lr_weight or [1.0] * num_of_all_blocks(is_sdxl)

    def keep(ranks: Sequence[int] | None) -> list[int] | None:
        if ranks is None:
            return None
        return [rank if factor != 0 else 0 for rank, factor in zip(ranks, factors, strict=True)]

    conv_alphas = None if conv_block_alphas is None else list(conv_block_alphas)
    return keep(block_dims) or [], list(block_alphas), keep(conv_block_dims), conv_alphas


def read_block_ranks(
    arguments: NetworkArguments, settings: NetworkSettings, block_lr_weight: list[float] | None, *, is_sdxl: bool
) -> BlockRanks | None:
    """Ranks per block, if `block_dims` is given or blocks have learning-rate factors; otherwise None."""
    given = arguments.select("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    if "block_dims" not in given and block_lr_weight is None:
        if given:
            logger.warning("network arguments without effect unless block_dims is given: %s", ", ".join(given))
        return None
    lists = get_block_dims_and_alphas(
        is_sdxl,
        given.get("block_dims"),
        given.get("block_alphas"),
        settings.rank,
        settings.alpha,
        given.get("conv_block_dims"),
        given.get("conv_block_alphas"),
        settings.conv_rank,
        settings.conv_alpha,
    )
    return BlockRanks(*remove_block_dims_and_alphas(is_sdxl, *lists, block_lr_weight))


def _entries(name: str, value: str | Sequence[Any] | None, kind: type, count: int) -> list[Any] | None:
    if value is None:
        return None
    items = value.split(",") if isinstance(value, str) else list(value)
    try:
        entries = [kind(item) for item in items]
    except ValueError as error:
        raise ValueError(f"network argument {name}={value}: expected {count} numbers separated by commas.") from error
    if len(entries) != count:
        raise ValueError(f"network argument {name} has {len(entries)} values; it needs one for each of {count} blocks.")
    if any(entry < 0 for entry in entries):
        raise ValueError(f"network argument {name}={value}: values must not be negative.")
    return entries


# --- learning rates --------------------------------------------------------------------------------------------
def parse_block_lr_kwargs(is_sdxl: bool, kwargs: Mapping[str, Any]) -> list[float] | None:
    """Learning-rate factors per block from the arguments `LR_KEYS`; None if no `*_lr_weight` is among them."""
    threshold = kwargs.get("block_lr_zero_threshold")
    try:
        zero_threshold = 0.0 if threshold is None else float(threshold)
        mid = kwargs.get("mid_lr_weight")
        mid_weights = _csv(mid) if isinstance(mid, str) else mid
    except ValueError as error:
        raise ValueError(f"mid_lr_weight and block_lr_zero_threshold must be numbers: {error}.") from error
    return get_block_lr_weight(
        is_sdxl, kwargs.get("down_lr_weight"), mid_weights, kwargs.get("up_lr_weight"), zero_threshold
    )


def get_block_lr_weight(
    is_sdxl: bool,
    down_lr_weight: str | Sequence[float] | None,
    mid_lr_weight: Sequence[float] | None,
    up_lr_weight: str | Sequence[float] | None,
    zero_threshold: float,
) -> list[float] | None:
    """Factors in block order (down, mid, up; SDXL has a 1.0 at both ends); None if all three parts are None.

    A part may be a preset, `name` or `name+base`. Short lists are filled with 1.0, long ones cut, both with a warning;
    factors up to `zero_threshold` become 0. Raises ValueError for text that is neither a preset nor a list.
    """
    if down_lr_weight is None and mid_lr_weight is None and up_lr_weight is None:
        return None
    sides = SDXL_NUM_OF_BLOCKS if is_sdxl else NUM_OF_BLOCKS
    middle = SDXL_NUM_OF_MID_BLOCKS if is_sdxl else NUM_OF_MID_BLOCKS
    factors: list[float] = []
    for name, value, count in (
        ("down_lr_weight", down_lr_weight, sides),
        ("mid_lr_weight", mid_lr_weight, middle),
        ("up_lr_weight", up_lr_weight, sides),
    ):
        part = _parse_part(name, value, count)
        factors += [factor if factor > zero_threshold else 0.0 for factor in _fit(name, part, count)]
    return [1.0, *factors, 1.0] if is_sdxl else factors


def _parse_part(name: str, value: str | Sequence[float] | None, count: int) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return [float(item) for item in value]
    try:
        return _csv(value) if "," in value else _preset(value, count)
    except ValueError as error:
        raise ValueError(
            f"network argument {name}={value}: expected numbers separated by commas, or one of the presets "
            f"{', '.join(LR_PRESETS)}, each optionally followed by +BASE (for example cosine+0.1)."
        ) from error


def _csv(text: str) -> list[float]:
    return [float(item) if item.strip() else 0.0 for item in text.split(",")]


def _preset(text: str, count: int) -> list[float]:
    name, _, base_text = text.partition("+")
    base = float(base_text) if base_text else 0.0
    last = count - 1
    shapes = {
        "sine": lambda i: math.sin(math.pi / 2 * i / last),
        "cosine": lambda i: math.sin(math.pi / 2 * (last - i) / last),
        "linear": lambda i: i / last,
        "reverse_linear": lambda i: (last - i) / last,
        "zeros": lambda i: 0.0,
    }
    if name.strip() not in shapes:
        raise ValueError(name)
    return [shapes[name.strip()](i) + base for i in range(count)]


def _fit(name: str, weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) > count:
        logger.warning("%s has %d values; only the first %d are used", name, len(weights), count)
    elif len(weights) < count:
        logger.warning("%s has %d values; the other %d are 1.0", name, len(weights), count - len(weights))
    return [*weights[:count], *[1.0] * (count - len(weights))]
