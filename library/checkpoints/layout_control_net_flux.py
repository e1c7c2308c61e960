"""Key names and sizes of FLUX ControlNets: their own files, and diffusers' `FluxControlNetModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from library.checkpoints import layout_flux
from library.checkpoints.layout_control_net import OPTION, hint_layer
from library.checkpoints.recognition import UNET_PREFIX
from library.checkpoints.tensors import LazyTensors, RenamedTensors, Shapes, TensorDict

HINT_PREFIX = "input_hint_block."
HINT_LAYERS = 8  # convolutions of the hint network
#: beginnings of the keys that the transformer does not have -> the same in diffusers' naming
_OWN = {
    **{f"{HINT_PREFIX}{2 * index}.": f"{HINT_PREFIX}{hint_layer(index)}." for index in range(HINT_LAYERS)},
    "pos_embed_input.": "controlnet_x_embedder.",
    "controlnet_blocks.": "controlnet_blocks.",
    "controlnet_blocks_for_single.": "controlnet_single_blocks.",
}


def control_net_tensors(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A ControlNet of either naming under its own names, without a prefix. Raises ValueError if it is none."""
    source = getattr(tensors, "source", "the given tensors")
    part: LazyTensors = RenamedTensors(tensors, {key.removeprefix(UNET_PREFIX): (key, None) for key in tensors})
    if "controlnet_x_embedder.weight" in part:
        part = _translated(part, {theirs: own for own, theirs in _OWN.items()}, layout_flux.to_original)
    for key in (f"{HINT_PREFIX}0.weight", "pos_embed_input.weight", "img_in.weight"):
        if key not in part:
            found = ", ".join(list(tensors)[:5]) or "nothing"
            raise ValueError(f"{OPTION} {source} is no ControlNet of this kind: {key} is missing (keys: {found}).")
    return part


def to_diffusers(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A ControlNet under the names of diffusers' `FluxControlNetModel`; q, k, v become tensors of their own."""
    return _translated(tensors, _OWN, layout_flux.to_diffusers)


def _translated(
    tensors: Mapping[str, Tensor], own: Mapping[str, str], trunk: Callable[[Mapping[str, Tensor]], LazyTensors]
) -> LazyTensors:
    """Keys that begin as `own` says under their new beginnings, all others through `trunk`."""
    begins = {key: next((start for start in own if key.startswith(start)), None) for key in tensors}
    rest = trunk(RenamedTensors(tensors, {key: (key, None) for key, start in begins.items() if start is None}))
    found = {
        own[start] + key.removeprefix(start): tensors[key] for key, start in begins.items() if start is not None
    }
    both = {**{key: rest[key] for key in rest}, **found}
    return TensorDict(both, source=getattr(tensors, "source", "the given tensors"))


def control_net_config(shapes: Shapes, *, axes_dims: Sequence[int]) -> dict[str, Any]:
    """The fields of `models.flux.FluxParams` for a ControlNet; `axes_dims` are the base model's, shapes cannot tell.

    Raises ValueError if a key that tells a size is missing, or if widths do not fit each other.
    """
    hidden, in_channels = shapes["img_in.weight"]
    with_output = {**shapes, "final_layer.linear.weight": (in_channels, hidden)}  # a ControlNet has no output layer
    return layout_flux.transformer_config(with_output, axes_dims=axes_dims)


def hint_channels(shapes: Shapes) -> tuple[int, ...]:
    """Widths of the hint network's convolutions, the pixels' first. Raises ValueError if one is missing."""
    keys = [f"{HINT_PREFIX}{2 * index}.weight" for index in range(HINT_LAYERS)]
    missing = [key for key in keys if key not in shapes]
    if missing:
        raise ValueError(f"{OPTION}: the ControlNet's hint network lacks {', '.join(missing)}.")
    return (shapes[keys[0]][1], *(shapes[key][0] for key in keys))


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a folder with such a ControlNet; `config` as `control_net_config` gives it."""
    return {
        "_class_name": "FluxControlNetModel",
        "patch_size": 2,  # of the hint's features; latents come packed
        "in_channels": config["in_channels"],
        "num_layers": config["double_depth"],
        "num_single_layers": config["single_depth"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_attention_heads": config["num_heads"],
        "joint_attention_dim": config["context_width"],
        "pooled_projection_dim": config["vector_width"],
        "guidance_embeds": config["guidance"],
        "axes_dims_rope": list(config["axes_dims"]),
        "num_mode": None,
        "conditioning_embedding_channels": config["in_channels"] // 4,
    }
