"""CLIP text-encoder key names: Hugging Face, OpenCLIP, their many prefixes, and dimensions from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.tensors import Operation, RenamedTensors, Shapes

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": TOKEN_TABLE,
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_LAYER = re.compile(r"^text_model\.encoder\.layers\.(\d+)\.(.+)$")
_BARE_ROOTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_WRAPPERS = re.compile(
    r"^(?:cond_stage_model\.(?:transformer|model)\.|conditioner\.embedders\.\d+\.(?:transformer|model)\."
    r"|text_encoders\.[a-z0-9_]+\.(?:transformer\.)?|(?:clip_l|clip_g)\.(?:transformer\.)?)"
)


def strip_wrapper(key: str) -> str:
    """The key without the prefix of whatever file it was embedded in; `transformer.` goes too, unless OpenCLIP's."""
    key = _WRAPPERS.sub("", key, count=1)
    if key.startswith("transformer.") and not key.startswith("transformer.resblocks."):
        key = key.removeprefix("transformer.")
    return key


def is_openclip(keys: Mapping[str, Any]) -> bool:
    """Whether keys without outer prefix are OpenCLIP's."""
    return any(key.startswith("transformer.resblocks.") for key in keys)


# --- Hugging Face ----------------------------------------------------------------------------------------------
def normalize_hf_name(key: str) -> str | None:
    """The key with the `text_model.` level, or None for what a text encoder does not hold (ids, vision, scale)."""
    key = key.replace("text_model.encoder.text_model.", "text_model.")
    if key.endswith("position_ids") or key.startswith(("vision_model.", "visual_projection.")):
        return None
    if key in ("logit_scale", "text_model.logit_scale"):
        return None
    if key.startswith(_BARE_ROOTS):
        return f"text_model.{key}"
    return key


def normalize_hf(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """Hugging Face CLIP text tensors (no outer prefix) under `text_model.…` names."""
    plan = {name: (key, None) for key in tensors if (name := normalize_hf_name(key)) is not None}
    return RenamedTensors(tensors, plan)


# --- OpenCLIP --------------------------------------------------------------------------------------------------
def _third(index: int) -> Operation:
    def take(tensor: Tensor) -> Tensor:
        size = tensor.shape[0] // 3
        return tensor[index * size : (index + 1) * size].clone()

    return take


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def openclip_layer_count(shapes: Shapes) -> int:
    """How many transformer blocks an OpenCLIP text tower has."""
    return len({match[1] for key in shapes if (match := _BLOCK.match(key))})


def openclip_to_hf(
    tensors: Mapping[str, Tensor], *, layers: int | None = None, projection: bool = False
) -> RenamedTensors:
    """OpenCLIP text tensors (no outer prefix) under Hugging Face names.

    `layers`: how many blocks to use from the first on (all by default). `projection`: also `text_projection.weight`,
    which is the transpose of OpenCLIP's matrix (a `text_projection.weight` is a Linear's already and stays).
    Raises ValueError for unknown parts of a block.
    """
    plan: dict[str, tuple[str, Operation | None]] = {}
    for key in tensors:
        if key in _ENDS:
            plan[_ENDS[key]] = (key, None)
        elif match := _BLOCK.match(key):
            if layers is not None and int(match[1]) >= layers:
                continue
            prefix = f"text_model.encoder.layers.{match[1]}."
            part, _, leaf = match[2].rpartition(".")
            if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                leaf = match[2].rpartition("_")[2]
                for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    plan[f"{prefix}self_attn.{name}.{leaf}"] = (key, _third(index))
            elif part in _LAYER_PARTS:
                plan[f"{prefix}{_LAYER_PARTS[part]}.{leaf}"] = (key, None)
            else:
                source = getattr(tensors, "source", "the given tensors")
                raise ValueError(f"{source}: {key} is not part of an OpenCLIP text encoder.")
        elif projection and key == "text_projection":
            plan["text_projection.weight"] = (key, _transpose)
        elif projection and key == "text_projection.weight":
            plan["text_projection.weight"] = (key, None)
    return RenamedTensors(tensors, plan)


def hf_to_openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face text tensors (`text_model.…` names) in OpenCLIP's layout; q, k, v are joined."""
    inner = {b: a for a, b in _LAYER_PARTS.items()}
    ends = {b: a for a, b in _ENDS.items()}
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if key in ends:
            result[ends[key]] = tensors[key]
        elif key == "text_projection.weight":
            result["text_projection"] = _transpose(tensors[key])
        elif match := _LAYER.match(key):
            prefix = f"transformer.resblocks.{match[1]}."
            part, _, leaf = match[2].rpartition(".")
            if part in inner:
                result[f"{prefix}{inner[part]}.{leaf}"] = tensors[key]
            else:
                joined.setdefault(f"{prefix}attn.in_proj_{leaf}", {})[part.rpartition(".")[2]] = tensors[key]
        else:
            raise ValueError(f"{key} has no place in OpenCLIP's layout.")
    for key, parts in joined.items():
        result[key] = torch.cat([parts[name] for name in ("q_proj", "k_proj", "v_proj")])
    return result


# --- dimensions ------------------------------------------------------------------------------------------------
def clip_config(shapes: Shapes, *, activation: str, heads: int | None = None) -> dict[str, Any]:
    """Arguments of transformers' `CLIPTextConfig` for Hugging Face shapes (`text_model.…` names).

    `activation` goes by role: quick_gelu (SD1, CLIP-L) or gelu (OpenCLIP). The end token is taken to be the last
    entry of the vocabulary, the start token the one before, as in every published CLIP.
    """
    vocabulary, hidden = shapes[TOKEN_TABLE]
    layers = {match[1] for key in shapes if (match := _LAYER.match(key))}
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads or hidden // next(w for w in (64, 32, 16, 8, 4, 2, 1) if hidden % w == 0),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }
    projection = shapes.get("text_projection.weight")
    config["projection_dim"] = projection[0] if projection else hidden
    return config

