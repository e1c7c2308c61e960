"""FLUX.1 files: which keys are the transformer, its sizes, and its names in diffusers' layout, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from library.checkpoints import layout_vae
from library.checkpoints.extras import is_left_over, warn_of_extras
from library.checkpoints.recognition import UNET_PREFIX, check_not_quantised, is_ignorable
from library.checkpoints.tensors import (
    JoinedTensors,
    LazyTensors,
    Operation,
    RenamedTensors,
    Shapes,
    shapes_of,
    swap_halves,
)

COMPANION_PREFIXES = (*layout_vae.VAE_PREFIXES, "text_encoders.")
_BLOCK = re.compile(r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(\d+)\.")
_LINEAR = (("weight", "weight"), ("bias", "bias"))
_SCALE = (("scale", "weight"),)
_MODULATION_OF_THE_OUTPUT = "final_layer.adaLN_modulation.1."

# original path -> diffusers paths, whose tensors are joined along the first dimension
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_ROOTS = tuple({
    "double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks.",
    *(f"{name.partition('.')[0]}." for names in _ENDS.items() for name in (names[0], *names[1])),
})  # fmt: skip


# --- which keys ------------------------------------------------------------------------------------------------
def transformer_tensors(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The transformer of a FLUX file of either layout, under its original names and without a prefix.

    Keys of companions (autoencoder, text encoders), keys outside the prefix that the transformer has, and keys that
    mean nothing are left out; any other key stays, so that filling the model names it. Raises ValueError for quantised
    weights and for a key that is there twice.
    """
    source = getattr(tensors, "source", "the given tensors")
    plan: dict[str, tuple[str, Operation | None]] = {}
    foreign = set(_foreign_keys(tensors))
    for key in tensors:
        name = key.removeprefix(UNET_PREFIX)
        if key in foreign or key.startswith(COMPANION_PREFIXES) or is_ignorable(name):
            continue
        if name in plan:
            raise ValueError(f"{source}: {name} is there twice, with and without the prefix {UNET_PREFIX}.")
        plan[name] = (key, None)
    part = RenamedTensors(tensors, plan)
    check_not_quantised(part.shapes, source=source)
    return to_original(part) if any(key.startswith("transformer_blocks.") for key in part) else part


def warn_of_foreign_keys(tensors: LazyTensors) -> None:
    """One warning about the keys of a file that belong to no part of the model."""
    warn_of_extras(_foreign_keys(tensors), source=tensors.source)


def _foreign_keys(tensors: Mapping[str, Tensor]) -> list[str]:
    """Known left-overs; in a file whose transformer has a prefix, also what begins like no part of a transformer."""
    has_prefix = any(key.startswith(UNET_PREFIX) for key in tensors)
    others = [key for key in tensors if not key.startswith(COMPANION_PREFIXES)]
    others = [key for key in others if not is_ignorable(key.removeprefix(UNET_PREFIX))]
    known = (UNET_PREFIX, *_ROOTS) if has_prefix else ("",)
    return [key for key in others if is_left_over(key) or not key.startswith(known)]


def autoencoder_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The autoencoder of a file (its own file, or embedded under `vae.` or `first_stage_model.`) in diffusers layout.

    Empty if there is none. The way back is `layout_vae.to_compvis`, the sizes are `layout_vae.vae_config`.
    """
    prefix = next((p for p in layout_vae.VAE_PREFIXES if any(key.startswith(p) for key in tensors)), "")
    plan: dict[str, tuple[str, Operation | None]] = {}
    if prefix or "encoder.conv_in.weight" in tensors:
        plan = {key.removeprefix(prefix): (key, None) for key in tensors if key.startswith(prefix)}
    return layout_vae.to_diffusers(RenamedTensors(tensors, plan))


def block_count(shapes: Shapes, group: str) -> int:
    """How many blocks `group` (`double_blocks`, ...) has. Raises ValueError if a number between is missing."""
    found = {int(match[2]) for key in shapes if (match := _BLOCK.match(key)) and match[1] == group}
    count = max(found, default=-1) + 1
    if len(found) != count:
        missing = sorted(set(range(count)) - found)
        raise ValueError(f"FLUX transformer: {group} has numbers up to {count - 1}, but none of {missing[:10]}.")
    return count


# --- sizes -----------------------------------------------------------------------------------------------------
def transformer_config(shapes: Shapes, *, axes_dims: Sequence[int] | None = None) -> dict[str, Any]:
    """Every size of a FLUX transformer (the fields of `models.flux.FluxParams`) from original names and shapes.

    axes_dims: the rotary widths of a folder's configuration, which shapes cannot tell.
    Raises ValueError if a key that tells a size is missing, or if widths do not fit each other.
    """
    hidden, in_channels = _shape(shapes, "img_in.weight")
    double, single = block_count(shapes, "double_blocks"), block_count(shapes, "single_blocks")
    head_dim = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    if hidden % head_dim:
        raise ValueError(f"FLUX transformer: the width {hidden} is no multiple of the head width {head_dim}.")
    mlp_width = _shape(shapes, "double_blocks.0.img_mlp.0.weight")[0]
    return {
        "in_channels": in_channels,
        "out_channels": _shape(shapes, "final_layer.linear.weight")[0],
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "context_width": _shape(shapes, "txt_in.weight")[1],
        "vector_width": _shape(shapes, "vector_in.in_layer.weight")[1],
        "time_width": _shape(shapes, "time_in.in_layer.weight")[1],
        "mlp_width": mlp_width,
        "single_mlp_width": _shape(shapes, "single_blocks.0.linear1.weight")[0] - 3 * hidden if single else mlp_width,
        "double_depth": double,
        "single_depth": single,
        "axes_dims": tuple(axes_dims) if axes_dims is not None else default_axes(head_dim),
        "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
        "guidance": "guidance_in.in_layer.weight" in shapes,
    }


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """How the head width is divided among the three position axes: 16, 56, 56 of 128, others in proportion."""
    side = 2 * (7 * head_dim // 32)
    return head_dim - 2 * side, side, side


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        found = ", ".join(list(shapes)[:10]) or "nothing"
        raise ValueError(f"FLUX transformer: {key} is missing (keys: {found}).")
    return shapes[key]


# --- diffusers -------------------------------------------------------------------------------------------------
def to_original(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A diffusers FLUX transformer (no prefix) under original names; q, k, v are joined while reading.

    Raises ValueError for unknown names and for groups of which only a part is there.
    """
    shapes = shapes_of(tensors)
    source = getattr(tensors, "source", "the given tensors")
    table = _names(block_count(shapes, "transformer_blocks"), block_count(shapes, "single_transformer_blocks"))
    parts: dict[str, tuple[str, ...]] = {}
    for original, names in table.items():
        missing = [name for name in names if name not in shapes]
        if not missing:
            parts[original] = names
        elif len(missing) < len(names):
            raise ValueError(f"{source}: {', '.join(missing)} missing, which {original} is made of.")
    _refuse_unknown(set(shapes) - {name for names in parts.values() for name in names}, source)
    swapped = [key for key in parts if key.startswith(_MODULATION_OF_THE_OUTPUT)]
    return JoinedTensors(tensors, parts, swapped)


def to_diffusers(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """An original FLUX transformer (no prefix) under the names of diffusers' `FluxTransformer2DModel`.

    Raises ValueError for unknown names.
    """
    shapes = shapes_of(tensors)
    table = _names(block_count(shapes, "double_blocks"), block_count(shapes, "single_blocks"))
    _refuse_unknown(set(shapes) - set(table), getattr(tensors, "source", "the given tensors"))
    hidden = _shape(shapes, "img_in.weight")[0]
    plan: dict[str, tuple[str, Operation | None]] = {}
    for original in shapes:
        names = table[original]
        if original.startswith(_MODULATION_OF_THE_OUTPUT):
            plan[names[0]] = (original, swap_halves)
        elif len(names) == 1:
            plan[names[0]] = (original, None)
        else:
            for index, name in enumerate(names):
                end = None if index == len(names) - 1 else (index + 1) * hidden
                plan[name] = (original, _rows(index * hidden, end))
    return RenamedTensors(tensors, plan)


def diffusers_config(shapes: Shapes, *, axes_dims: Sequence[int] | None = None) -> dict[str, Any]:
    """The config.json of diffusers' `FluxTransformer2DModel` for original names without prefix.

    Raises ValueError for structures that diffusers cannot express.
    """
    own = transformer_config(shapes, axes_dims=axes_dims)
    hidden = own["hidden_size"]
    if {own["mlp_width"], own["single_mlp_width"]} != {4 * hidden} or not own["qkv_bias"] or own["time_width"] != 256:
        raise ValueError("This FLUX transformer has parts that diffusers does not know; save it as a single file.")
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "num_layers": own["double_depth"],
        "num_single_layers": own["single_depth"],
        "attention_head_dim": hidden // own["num_heads"],
        "num_attention_heads": own["num_heads"],
        "joint_attention_dim": own["context_width"],
        "pooled_projection_dim": own["vector_width"],
        "guidance_embeds": own["guidance"],
        "axes_dims_rope": list(own["axes_dims"]),
    }


def _names(double: int, single: int) -> dict[str, tuple[str, ...]]:
    """Original key -> diffusers keys, for the given numbers of blocks."""
    places: list[tuple[str, str, Mapping[str, tuple[str, ...]]]] = [("", "", _ENDS)]
    places += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", _DOUBLE) for i in range(double)]
    places += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", _SINGLE) for i in range(single)]
    table = {}
    for original, diffusers, paths in places:
        for path, theirs in paths.items():
            for leaf, their_leaf in _SCALE if path.endswith("_norm") else _LINEAR:
                table[f"{original}{path}.{leaf}"] = tuple(f"{diffusers}{name}.{their_leaf}" for name in theirs)
    return table


def _refuse_unknown(keys: set[str], source: str) -> None:
    if keys:
        raise ValueError(
            f"{source}: {len(keys)} keys do not belong to a FLUX transformer: {', '.join(sorted(keys)[:10])}."
        )



def _rows(begin: int, end: int | None) -> Operation:
    return lambda tensor: tensor[begin:end].clone()
