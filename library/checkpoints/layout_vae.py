"""VAE key names: CompVis, diffusers' `AutoencoderKL` (old and new attention names), and dimensions from shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.checkpoints.tensors import Operation, RenamedTensors, Shapes, shapes_of

VAE_PREFIXES = ("first_stage_model.", "vae.")

_TO_DIFFUSERS = (
    (re.compile(r"^encoder\.down\.(\d+)\.block\.(\d+)\."), r"encoder.down_blocks.\1.resnets.\2."),
    (re.compile(r"^encoder\.down\.(\d+)\.downsample\.conv\."), r"encoder.down_blocks.\1.downsamplers.0.conv."),
)
_UP_BLOCK = re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\.")
_UP_SAMPLE = re.compile(r"^decoder\.up\.(\d+)\.upsample\.conv\.")
_MIDDLE = re.compile(r"^(encoder|decoder)\.mid\.block_(\d+)\.")
_ATTENTION = re.compile(r"^(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.")
_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = re.compile(r"^((?:encoder|decoder)\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.")
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION_WEIGHT = re.compile(r"mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight$")


def level_count(keys: Mapping[str, Any]) -> int:
    """Number of resolution levels in a VAE of either layout."""
    found = {int(m[1]) for key in keys if (m := re.match(r"^encoder\.down(?:_blocks)?\.(\d+)\.", key))}
    return max(found, default=-1) + 1


def compvis_name_to_diffusers(key: str, levels: int) -> str:
    """The diffusers name of one CompVis key."""
    for pattern, replacement in _TO_DIFFUSERS:
        key = pattern.sub(replacement, key)
    key = _UP_BLOCK.sub(lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}.", key)
    key = _UP_SAMPLE.sub(lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.conv.", key)
    key = _MIDDLE.sub(lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.", key)
    key = _ATTENTION.sub(lambda m: f"{m[1]}.mid_block.attentions.0.{_ATTENTION_NAMES[m[2]]}.", key)
    key = key.replace(".nin_shortcut.", ".conv_shortcut.")
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def diffusers_name_to_compvis(key: str, levels: int) -> str:
    """The CompVis name of one (new-style) diffusers key."""
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2.", key)
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
    key = re.sub(
        r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.",
        lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}.", key,
    )  # fmt: skip
    key = re.sub(
        r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample.", key
    )
    key = re.sub(
        r"^(encoder|decoder)\.mid_block\.resnets\.(\d+)\.", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}.", key
    )
    for compvis, diffusers in _ATTENTION_NAMES.items():
        old = re.escape(diffusers)
        key = re.sub(rf"^(encoder|decoder)\.mid_block\.attentions\.0\.{old}\.", rf"\1.mid.attn_1.{compvis}.", key)
    key = key.replace(".conv_shortcut.", ".nin_shortcut.")
    return re.sub(r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out.", key)


def _squeeze(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], weight.shape[1])


def _unsqueeze(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], weight.shape[1], 1, 1)


def to_diffusers(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """VAE tensors of either layout (no outer prefix) under today's diffusers names.

    Attention weights become [c,c], whether they were 1x1 convolutions or not; `loss.*` (training files) is left out.
    """
    shapes = shapes_of(tensors)
    levels = level_count(shapes)
    plan: dict[str, tuple[str, Operation | None]] = {}
    for key, shape in shapes.items():
        if key.startswith("loss."):
            continue
        name = compvis_name_to_diffusers(key, levels)
        name = _OLD_ATTENTION.sub(lambda m: f"{m[1]}{_OLD_ATTENTION_NAMES[m[2]]}.", name)
        squeeze = _ATTENTION_WEIGHT.search(name) and len(shape) > 2
        plan[name] = (key, _squeeze if squeeze else None)
    return RenamedTensors(tensors, plan)


def to_compvis(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """Diffusers-layout VAE tensors under CompVis names, attention weights as [c,c,1,1]."""
    shapes = shapes_of(tensors)
    levels = level_count(shapes)
    plan: dict[str, tuple[str, Operation | None]] = {}
    for key in shapes:
        unsqueeze = _ATTENTION_WEIGHT.search(key)
        plan[diffusers_name_to_compvis(key, levels)] = (key, _unsqueeze if unsqueeze else None)
    return RenamedTensors(tensors, plan)


def vae_config(shapes: Shapes, *, scaling_factor: float = 0.18215, shift_factor: float | None = None) -> dict[str, Any]:
    """Constructor arguments of diffusers' `AutoencoderKL` for diffusers-layout shapes."""
    levels = level_count(shapes)
    if not levels or "decoder.conv_in.weight" not in shapes:
        raise ValueError("These are not the weights of a VAE with encoder and decoder.")
    channels = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
    layers = len({k.split(".")[4] for k in shapes if k.startswith("encoder.down_blocks.0.resnets.")})
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": math.gcd(32, channels[0]),
        "sample_size": 512,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }
