"""U-Net key names: the original (LDM) layout, the diffusers layout, and every dimension inferred from shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.checkpoints.tensors import Operation, RenamedTensors, Shapes, shapes_of

logger = logging.getLogger(__name__)

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Level:
    """One resolution level: for every resnet the depth of the attention behind it (0 = none)."""

    depths: tuple[int, ...]
    has_resample: bool  # a downsampler (encoder) or an upsampler (decoder) at its end


@dataclass(frozen=True)
class UnetStructure:
    """Which blocks a U-Net has. `middle` is None (no middle block) or the depth of its attention (0: none)."""

    down: tuple[Level, ...]
    middle: int | None
    up: tuple[Level, ...]


# --- structure -------------------------------------------------------------------------------------------------
def _depth(names: set[str], prefix: str) -> int:
    """The number of transformer blocks below `prefix` ("input_blocks.1.1.")."""
    pattern = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def structure_of_original(keys: Iterable[str]) -> UnetStructure:
    """Walks original-layout keys (without `model.diffusion_model.`)."""
    names = set(keys)
    down: list[Level] = []
    depths: list[int] = []
    index = 1
    while True:
        if f"input_blocks.{index}.0.op.weight" in names:
            down.append(Level(tuple(depths), True))
            depths = []
        elif f"input_blocks.{index}.0.out_layers.3.weight" in names:
            depths.append(_depth(names, f"input_blocks.{index}.1."))
        else:
            break
        index += 1
    down.append(Level(tuple(depths), False))
    up: list[Level] = []
    depths, index = [], 0
    while f"output_blocks.{index}.0.out_layers.3.weight" in names:
        depths.append(_depth(names, f"output_blocks.{index}.1."))
        if any(f"output_blocks.{index}.{sub}.conv.weight" in names for sub in (1, 2)):
            up.append(Level(tuple(depths), True))
            depths = []
        index += 1
    up.append(Level(tuple(depths), False))
    middle = None
    if "middle_block.0.out_layers.3.weight" in names:
        middle = _depth(names, "middle_block.1.")
    return UnetStructure(tuple(down), middle, tuple(up))


def structure_of_diffusers(keys: Iterable[str]) -> UnetStructure:
    """Walks diffusers-layout keys."""
    names = set(keys)

    def levels(side: str, sampler: str) -> tuple[Level, ...]:
        found: list[Level] = []
        while f"{side}.{len(found)}.resnets.0.conv1.weight" in names:
            prefix = f"{side}.{len(found)}."
            count = 0
            while f"{prefix}resnets.{count}.conv1.weight" in names:
                count += 1
            depths = tuple(_depth(names, f"{prefix}attentions.{j}.") for j in range(count))
            found.append(Level(depths, f"{prefix}{sampler}.0.conv.weight" in names))
        return tuple(found)

    middle = None
    if "mid_block.resnets.0.conv1.weight" in names:
        middle = _depth(names, "mid_block.attentions.0.")
    return UnetStructure(levels("down_blocks", "downsamplers"), middle, levels("up_blocks", "upsamplers"))


# --- names -----------------------------------------------------------------------------------------------------
def prefix_pairs(structure: UnetStructure) -> list[tuple[str, str, bool]]:
    """(original prefix, diffusers prefix, is a resnet) of every part, without trailing dots."""
    pairs = [(a, b, False) for a, b in _ENDS.items()]
    index = 1
    for number, level in enumerate(structure.down):
        for j, depth in enumerate(level.depths):
            pairs.append((f"input_blocks.{index}.0", f"down_blocks.{number}.resnets.{j}", True))
            if depth:
                pairs.append((f"input_blocks.{index}.1", f"down_blocks.{number}.attentions.{j}", False))
            index += 1
        if level.has_resample:
            pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{number}.downsamplers.0.conv", False))
            index += 1
    if structure.middle is not None:
        pairs.append(("middle_block.0", "mid_block.resnets.0", True))
        if structure.middle:
            pairs.append(("middle_block.1", "mid_block.attentions.0", False))
            pairs.append(("middle_block.2", "mid_block.resnets.1", True))
    index = 0
    for number, level in enumerate(structure.up):
        for j, depth in enumerate(level.depths):
            pairs.append((f"output_blocks.{index}.0", f"up_blocks.{number}.resnets.{j}", True))
            if depth:
                pairs.append((f"output_blocks.{index}.1", f"up_blocks.{number}.attentions.{j}", False))
            index += 1
        if level.has_resample:
            sub = 2 if level.depths[-1] else 1
            pairs.append((f"output_blocks.{index - 1}.{sub}.conv", f"up_blocks.{number}.upsamplers.0.conv", False))
    return pairs


def _rename(keys: Iterable[str], pairs: Mapping[str, tuple[str, bool]], inner: Mapping[str, str]) -> dict[str, str]:
    """Old key -> new key by the longest matching prefix; keys that no prefix covers keep their names."""
    renamed: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for length in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:length])
            if prefix not in pairs:
                continue
            new, is_resnet = pairs[prefix]
            rest = ".".join(parts[length:])
            if is_resnet:
                name, _, leaf = rest.rpartition(".")
                rest = f"{inner.get(name, name)}.{leaf}"
            renamed[key] = f"{new}.{rest}"
            break
        else:
            renamed[key] = key
    return renamed


def names_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Original key -> diffusers key (both without outer prefixes)."""
    keys = list(keys)
    pairs = {a: (b, is_resnet) for a, b, is_resnet in prefix_pairs(structure_of_original(keys))}
    return _rename(keys, pairs, _RESNET)


def names_to_original(keys: Iterable[str]) -> dict[str, str]:
    """Diffusers key -> original key (both without outer prefixes)."""
    keys = list(keys)
    pairs = {b: (a, is_resnet) for a, b, is_resnet in prefix_pairs(structure_of_diffusers(keys))}
    return _rename(keys, pairs, {b: a for a, b in _RESNET.items()})


def _is_projection(key: str) -> bool:
    return key.endswith((".proj_in.weight", ".proj_out.weight"))


def to_diffusers(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """Original-layout U-Net tensors under diffusers names; no tensor changes its shape."""
    return RenamedTensors(tensors, {new: (old, None) for old, new in names_to_diffusers(tensors).items()})


def to_original(tensors: Mapping[str, Tensor], *, linear_projection: bool) -> RenamedTensors:
    """Diffusers-layout U-Net tensors under original names.

    `linear_projection`: whether `proj_in`/`proj_out` are written as [c,c] (SD2, SDXL) or [c,c,1,1] (SD1).
    """
    shapes = shapes_of(tensors)
    plan: dict[str, tuple[str, Operation | None]] = {}
    for old, new in names_to_original(tensors).items():
        plan[new] = (old, projection_operation(old, shapes[old], linear=linear_projection))
    return RenamedTensors(tensors, plan)


def projection_operation(key: str, shape: tuple[int, ...], *, linear: bool) -> Operation | None:
    """What turns a `proj_in`/`proj_out` weight into the wanted form; None for every other key."""
    if not _is_projection(key) or (len(shape) == 2) == linear:
        return None
    return (lambda t: t[:, :, 0, 0]) if linear else (lambda t: t[:, :, None, None])


def with_projections(tensors: Mapping[str, Tensor], *, linear: bool) -> RenamedTensors:
    """The same tensors with every `proj_in`/`proj_out` weight as [c,c] (linear) or as [c,c,1,1]."""
    plan = {key: (key, projection_operation(key, shape, linear=linear)) for key, shape in shapes_of(tensors).items()}
    return RenamedTensors(tensors, plan)


# --- dimensions ------------------------------------------------------------------------------------------------
def unet_config(shapes: Shapes, *, heads: Any = None) -> dict[str, Any]:
    """Constructor arguments of diffusers' U-Net for original-layout shapes.

    `heads`: heads per level where a `config.json` says so; otherwise inferred (8 heads for convolutional projections,
    64 channels per head for linear ones or a context of 1024). Raises ValueError for structures that the class cannot
    represent.
    """
    structure = structure_of_original(shapes)
    check_levels(structure)
    _check_even_attention(structure)
    channels = level_channels(shapes, structure)
    context = context_width(shapes)
    linear = any(_is_projection(k) and len(s) == 2 for k, s in shapes.items())
    depths = [max(level.depths, default=0) for level in structure.down]
    has_attention = [depth > 0 for depth in depths]
    time_width = shapes["time_embed.0.weight"][0]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": tuple(len(level.depths) for level in structure.down),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if any(v.depths) else "UpBlock2D" for v in structure.up),
        "mid_block_type": _middle_type(structure.middle),
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        "attention_head_dim": heads or _infer_heads(channels, wide=linear or context == 1024),
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    if len(set(config["layers_per_block"])) == 1:
        config["layers_per_block"] = config["layers_per_block"][0]
    config.update(_transformer_depths(structure))
    if time_width != 4 * channels[0]:
        config["time_embedding_dim"] = time_width
    if "label_emb.0.0.weight" in shapes:
        config.update(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=shapes["label_emb.0.0.weight"][1],
        )
    return config


def _middle_type(middle: int | None) -> str | None:
    if middle is None:
        return None
    return "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"


def level_channels(shapes: Shapes, structure: UnetStructure) -> list[int]:
    """The width of every level of an original-layout U-Net."""
    channels, index = [], 1
    for level in structure.down:
        channels.append(shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0])
        index += len(level.depths) + level.has_resample
    return channels


def context_width(shapes: Shapes) -> int:
    """The width of the text states that the cross-attentions take. Raises ValueError if there are none."""
    for key, shape in shapes.items():
        if key.endswith("attn2.to_k.weight"):
            return shape[1]
    raise ValueError("The U-Net has no cross-attention (no attn2.to_k.weight): it cannot be conditioned on text.")


def check_levels(structure: UnetStructure) -> None:
    """Raises ValueError unless every level has one resnet more on the way up than on the way down."""
    if not structure.down[0].depths or not structure.up[0].depths:
        raise ValueError("The U-Net has no input_blocks or output_blocks in the original layout.")
    if len(structure.down) != len(structure.up):
        raise ValueError(f"The U-Net has {len(structure.down)} levels down but {len(structure.up)} up.")
    for down, up in zip(structure.down, reversed(structure.up), strict=True):
        if len(up.depths) != len(down.depths) + 1:
            raise ValueError(f"A U-Net level has {len(down.depths)} resnets down but {len(up.depths)} up; expected +1.")


def _check_even_attention(structure: UnetStructure) -> None:
    for side, levels in (("down", structure.down), ("up", structure.up)):
        for number, level in enumerate(levels):
            if any(level.depths) and not all(level.depths):
                raise ValueError(f"U-Net level {side} {number} has attention behind only some resnets: unsupported.")


def _transformer_depths(structure: UnetStructure) -> dict[str, Any]:
    """`transformer_layers_per_block` and, if the decoder is not the mirrored encoder, its own list."""

    def entry(level: Level) -> int | tuple[int, ...]:
        if not any(level.depths):
            return 1
        return level.depths[0] if len(set(level.depths)) == 1 else level.depths

    down = [entry(level) for level in structure.down]
    up = [entry(level) for level in structure.up]
    last = structure.down[-1]
    if structure.middle:
        if any(last.depths) and down[-1] != structure.middle:
            raise ValueError(
                f"U-Net: the middle block has depth {structure.middle}, the last level {down[-1]}: unsupported."
            )
        down[-1] = structure.middle
    mirrored = [entry(level) for level in reversed(structure.up)]
    if not any(last.depths):
        mirrored[-1] = down[-1]
    if mirrored == down and all(isinstance(d, int) for d in down):
        return {"transformer_layers_per_block": down[0] if len(set(down)) == 1 else tuple(down)}
    return {"transformer_layers_per_block": list(down), "reverse_transformer_layers_per_block": list(up)}


def _infer_heads(channels: list[int], *, wide: bool) -> int | tuple[int, ...]:
    """Heads per level: 64 channels per head (`wide`), or 8 heads; the next power of two below where that fails."""
    if wide:
        heads = tuple(c // next(w for w in (64, 32, 16, 8, 4, 2, 1) if c % w == 0) for c in channels)
        usual = all(c % 64 == 0 for c in channels)
    else:
        heads = tuple(next(h for h in (8, 4, 2, 1) if c % h == 0) for c in channels)
        usual = all(h == 8 for h in heads)
    if not usual:
        logger.info("U-Net channels %s: using %s attention heads", channels, heads)
    return heads[0] if len(set(heads)) == 1 else heads
