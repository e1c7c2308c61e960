"""SD3 and SD3.5 files: recognition, what belongs to which component, key names, and dimensions from shapes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import layout_clip, layout_vae
from library.checkpoints.extras import is_left_over, warn_of_extras
from library.checkpoints.recognition import UNET_PREFIX, ModelKind, check_not_quantised, is_ignorable, recognise
from library.checkpoints.tensors import (
    JoinedTensors,
    LazyTensors,
    Operation,
    RenamedTensors,
    Shapes,
    select,
    shapes_of,
    swap_halves,
)

logger = logging.getLogger(__name__)

VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "text_encoders."
TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
#: what a file may be, and how metadata calls its transformer
MODEL_TYPES = {ModelKind.SD3: "medium", ModelKind.SD35_LARGE: "5-large", ModelKind.SD35_MEDIUM: "5-medium"}
POSITION_SIDE = 192  # of the table that is computed for a file without one
_BLOCK = re.compile(r"^joint_blocks\.(\d+)\.")
_DUAL = re.compile(r"^joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight$")


# --- recognition and components --------------------------------------------------------------------------------
def model_type(shapes: Shapes, *, source: str, option: str) -> str:
    """`medium`, `5-large` or `5-medium` for the keys of a file in the original layout or in diffusers'.

    Raises ValueError "this looks like X, but the command expects Y" for anything else, and for quantised files.
    """
    check_not_quantised(shapes, source=source)
    kind = recognise(shapes)
    if kind is ModelKind.SD3_DIFFUSERS:
        names = {key.removeprefix(UNET_PREFIX) for key in shapes}
        if "transformer_blocks.0.attn.norm_q.weight" not in names:
            kind = ModelKind.SD3
        else:
            dual = any(key.startswith("transformer_blocks.") and ".attn2." in key for key in names)
            kind = ModelKind.SD35_MEDIUM if dual else ModelKind.SD35_LARGE
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{option} {source} looks like {kind.value}, but the command expects {ModelKind.SD3.value} (or 3.5)."
        )
    return MODEL_TYPES[kind]


def transformer_tensors(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The transformer of a file under its original names without prefix; diffusers' layout is converted.

    A file without the prefix `model.diffusion_model.` is a transformer with whatever other components stand in it.
    """
    part = select(tensors, UNET_PREFIX)
    if not part:
        others = (VAE_PREFIX, TEXT_PREFIX)
        names = [key for key in tensors if not key.startswith(others) and not is_ignorable(key)]
        names = [key for key in names if not is_left_over(key)]
        part = RenamedTensors(tensors, {key: (key, None) for key in names})
    return from_diffusers(part) if "transformer_blocks.0.attn.add_k_proj.bias" in part else part


def vae_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The VAE of a file in diffusers layout; empty if the file has none."""
    return layout_vae.to_diffusers(select(tensors, VAE_PREFIX))


def clip_tensors(tensors: Mapping[str, Tensor], encoder: str) -> RenamedTensors:
    """The tensors of a CLIP encoder (`clip_l`, `clip_g`; no outer prefix) under `text_model.…` names.

    A `clip_l` without `text_projection.weight` gets the identity. Raises ValueError for a `clip_g` without one.
    """
    if layout_clip.is_openclip(shapes_of(tensors)):
        part = layout_clip.openclip_to_hf(tensors, projection=True)
    else:
        part = layout_clip.normalize_hf(tensors)
    if "text_projection.weight" in part or "text_model.final_layer_norm.weight" not in part:
        return part
    if encoder == "clip_g":
        raise ValueError(f"{part.source}: clip_g has no text_projection.weight; use a file that holds it.")
    plan: dict[str, tuple[str, Operation | None]] = {key: (key, None) for key in part}
    plan["text_projection.weight"] = ("text_model.final_layer_norm.weight", _identity_like)
    return RenamedTensors(part, plan)


def _identity_like(vector: Tensor) -> Tensor:
    return torch.eye(vector.shape[0], dtype=vector.dtype, device=vector.device)


def warn_of_foreign_keys(tensors: LazyTensors) -> None:
    """One warning about the keys of a file that belong to no component; of a bare transformer, known left-overs."""
    known = (UNET_PREFIX, VAE_PREFIX, *(f"{TEXT_PREFIX}{name}." for name in TEXT_ENCODERS))
    has_prefix = any(key.startswith(UNET_PREFIX) for key in tensors)
    foreign = [key for key in tensors if not key.startswith(known) and not is_ignorable(key)]
    warn_of_extras([key for key in foreign if has_prefix or is_left_over(key)], source=tensors.source)


def to_single_file(
    mmdit: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None = None,
    text_encoders: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Module state dicts (the VAE's in diffusers layout, text encoders by name) -> the keys of a single file."""
    result = {UNET_PREFIX + key: mmdit[key] for key in mmdit}
    if vae is not None:
        compvis = layout_vae.to_compvis(vae)
        result.update({VAE_PREFIX + key: compvis[key] for key in compvis})
    for name, state in (text_encoders or {}).items():
        result.update({f"{TEXT_PREFIX}{name}.transformer.{key}": value for key, value in state.items()})
    return result


# --- dimensions ------------------------------------------------------------------------------------------------
def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `library.models.mmdit.MMDiTParams` for original names without prefix.

    Raises ValueError if a needed tensor is missing, blocks are not numbered without gaps, or the table is no square.
    """
    needed = (
        "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.mlp.0.weight", "context_embedder.weight",
        "final_layer.linear.weight", "joint_blocks.0.x_block.mlp.fc1.weight",
    )  # fmt: skip
    missing = [key for key in needed if key not in shapes]
    if missing:
        raise ValueError(f"These are not the weights of an SD3 transformer: {', '.join(missing)} missing.")
    blocks = {int(match[1]) for key in shapes if (match := _BLOCK.match(key))}
    if blocks != set(range(len(blocks))):
        raise ValueError(f"The SD3 transformer's joint_blocks have gaps: {sorted(blocks)}.")
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    kind = None if norm is None else "layer" if "joint_blocks.0.x_block.attn.ln_q.bias" in shapes else "rms"
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "depth": len(blocks),
        "hidden_size": hidden,
        "heads": hidden // (norm[0] if norm else _head_size(hidden)),
        "mlp_size": shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
        "time_size": shapes["t_embedder.mlp.0.weight"][1],
        "vector_size": shapes["y_embedder.mlp.0.weight"][1],
        "context_size": shapes["context_embedder.weight"][1],
        "position_side": _position_side(shapes),
        "qk_norm": kind,
        "dual_blocks": frozenset(int(match[1]) for key in shapes if (match := _DUAL.match(key))),
        "register_length": shapes["register"][1] if "register" in shapes else 0,
    }


def _head_size(hidden: int) -> int:
    """The width of a head where no norm tells it: 64 in every published model."""
    size = next((width for width in (64, 32, 16, 8) if hidden % width == 0), hidden)
    if size != 64:
        logger.info("a transformer of width %d is taken to have heads of width %d", hidden, size)
    return size


def _position_side(shapes: Shapes) -> int:
    if "pos_embed" not in shapes:
        return POSITION_SIDE
    places = shapes["pos_embed"][1]
    side = math.isqrt(places)
    if side**2 != places:
        raise ValueError(f"The SD3 transformer's pos_embed has {places} places, which is not a square.")
    return side


# --- diffusers -------------------------------------------------------------------------------------------------
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_INNER = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_THIRDS = {
    "attn.to_{}": "x_block.attn.qkv",
    "attn.add_{}_proj": "context_block.attn.qkv",
    "attn2.to_{}": "x_block.attn2.qkv",
}
_JOINED = {part.format(letter): (whole, index) for part, whole in _THIRDS.items() for index, letter in enumerate("qkv")}
_DIFFUSERS_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)$")


def from_diffusers(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A transformer in diffusers layout (no outer prefix) under original names.

    Queries, keys and values become one tensor; where diffusers stores scale before shift (the last layer and the text
    side of the last block), the halves change places. Raises ValueError for keys that have no original name.
    """
    shapes = shapes_of(tensors)
    blocks = [int(match[1]) for key in shapes if (match := _DIFFUSERS_BLOCK.match(key))]
    last = f"joint_blocks.{max(blocks, default=0)}.context_block.adaLN_modulation.1"
    whole: dict[str, list[str]] = {}
    joined: dict[str, dict[int, str]] = {}
    for key in shapes:
        name, leaf = key.rpartition(".")[::2]
        match = _DIFFUSERS_BLOCK.match(name)
        if key == "pos_embed.pos_embed":
            whole["pos_embed"] = [key]
        elif name in _ENDS:
            whole[f"{_ENDS[name]}.{leaf}"] = [key]
        elif match and match[2] in _INNER:
            whole[f"joint_blocks.{match[1]}.{_INNER[match[2]]}.{leaf}"] = [key]
        elif match and match[2] in _JOINED:
            target, index = _JOINED[match[2]]
            joined.setdefault(f"joint_blocks.{match[1]}.{target}.{leaf}", {})[index] = key
        else:
            source = getattr(tensors, "source", "the given tensors")
            raise ValueError(f"{source}: {key} is not part of an SD3 transformer in diffusers layout.")
    for name, parts in joined.items():
        if set(parts) != {0, 1, 2}:
            raise ValueError(f"{name} needs q, k and v; found only {', '.join(parts.values())}.")
        whole[name] = [parts[index] for index in range(3)]
    swapped = {key for key in whole if key.rpartition(".")[0] in (last, "final_layer.adaLN_modulation.1")}
    return JoinedTensors(tensors, whole, swapped)


_ORIGINAL_BLOCK = re.compile(r"^joint_blocks\.(\d+)\.(.+)$")


def to_diffusers(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """An original transformer (no prefix) under the names of diffusers' `SD3Transformer2DModel`: `from_diffusers` back.

    Raises ValueError for keys that have no name there (learned registers).
    """
    shapes = shapes_of(tensors)
    blocks = [int(match[1]) for key in shapes if (match := _ORIGINAL_BLOCK.match(key))]
    last = f"joint_blocks.{max(blocks, default=0)}.context_block.adaLN_modulation.1"
    ends = {original: theirs for theirs, original in _ENDS.items()}
    inner = {original: theirs for theirs, original in _INNER.items()}
    thirds = {original: theirs for theirs, original in _THIRDS.items()}
    plan: dict[str, tuple[str, Operation | None]] = {}
    for key in shapes:
        name, leaf = key.rpartition(".")[::2]
        operation = swap_halves if name in (last, "final_layer.adaLN_modulation.1") else None
        match = _ORIGINAL_BLOCK.match(name)
        if key == "pos_embed":
            plan["pos_embed.pos_embed"] = (key, None)
        elif name in ends:
            plan[f"{ends[name]}.{leaf}"] = (key, operation)
        elif match and match[2] in inner:
            plan[f"transformer_blocks.{match[1]}.{inner[match[2]]}.{leaf}"] = (key, operation)
        elif match and match[2] in thirds:
            for index, letter in enumerate("qkv"):
                plan[f"transformer_blocks.{match[1]}.{thirds[match[2]].format(letter)}.{leaf}"] = (key, _third(index))
        else:
            raise ValueError(f"{key} has no name in diffusers' layout of an SD3 transformer.")
    return RenamedTensors(tensors, plan)


def _third(index: int) -> Operation:
    return lambda tensor: tensor.chunk(3)[index].clone()


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """The config.json of diffusers' `SD3Transformer2DModel` for original names without prefix.

    Raises ValueError for structures that diffusers cannot express.
    """
    own = transformer_config(shapes)
    if own["qk_norm"] == "layer" or own["register_length"] or own["mlp_size"] != 4 * own["hidden_size"]:
        raise ValueError("This SD3 transformer has parts that diffusers does not know; save it as a single file.")
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": own["patch_size"],
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "num_layers": own["depth"],
        "attention_head_dim": own["hidden_size"] // own["heads"],
        "num_attention_heads": own["heads"],
        "joint_attention_dim": own["context_size"],
        "caption_projection_dim": own["hidden_size"],
        "pooled_projection_dim": own["vector_size"],
        "pos_embed_max_size": own["position_side"],
        "dual_attention_layers": sorted(own["dual_blocks"]),
        "qk_norm": "rms_norm" if own["qk_norm"] else None,
    }
