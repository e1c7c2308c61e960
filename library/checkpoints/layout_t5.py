"""T5 encoder key names: the prefixes of the files that hold one, the token table under either name, dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.recognition import check_not_quantised
from library.checkpoints.tensors import RenamedTensors, Shapes, dtypes_of, shapes_of

TOKEN_TABLE = "shared.weight"
_COPY_OF_TOKEN_TABLE = "encoder.embed_tokens.weight"
_WRAPPERS = re.compile(r"^(?:(?:text_encoders\.)?t5xxl\.(?:transformer\.)?|transformer\.)")
_BLOCK = re.compile(r"^encoder\.block\.(\d+)\.")
_FIRST_ATTENTION = "encoder.block.0.layer.0.SelfAttention."
_FIRST_MLP = "encoder.block.0.layer.1.DenseReluDense."
_UNUSABLE_FLOATS = (torch.float8_e5m2,)


def encoder_tensors(tensors: Mapping[str, Tensor], *, option: str) -> RenamedTensors:
    """The encoder of a T5 file of any layout under transformers' names, the token table as `shared.weight`.

    Left out: prefixes, the decoder, the head, and keys of other models. Raises ValueError for quantised weights and
    for 8-bit floats other than e4m3fn; `option` is what the message calls the file.
    """
    source = getattr(tensors, "source", "the given tensors")
    check_not_quantised(shapes_of(tensors), source=f"{option} {source}")
    names = {_WRAPPERS.sub("", key, count=1): key for key in tensors}
    plan = {name: (key, None) for name, key in names.items() if name.startswith("encoder.") or name == TOKEN_TABLE}
    copy = plan.pop(_COPY_OF_TOKEN_TABLE, None)
    if copy is not None:
        plan.setdefault(TOKEN_TABLE, copy)
    part = RenamedTensors(tensors, plan)
    if TOKEN_TABLE not in part or f"{_FIRST_ATTENTION}q.weight" not in part:
        found = ", ".join(list(tensors)[:5]) or "nothing"
        raise ValueError(f"{option} {source} holds no T5 encoder (keys: {found}).")
    for key, dtype in dtypes_of(part).items():
        if dtype in _UNUSABLE_FLOATS:
            raise ValueError(f"{option} {source}: {key} is {dtype}; of 8-bit weights only float8_e4m3fn can be used.")
    return part


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of transformers' `T5Config` for the shapes of `encoder_tensors`.

    Raises ValueError if the numbers of the blocks have a gap.
    """
    vocabulary, width = shapes[TOKEN_TABLE]
    layers = {int(match[1]) for key in shapes if (match := _BLOCK.match(key))}
    if layers != set(range(len(layers))):
        missing = sorted(set(range(max(layers))) - layers)
        raise ValueError(f"T5 encoder: blocks up to {max(layers)}, but none of {missing[:10]}.")
    buckets, heads = shapes[f"{_FIRST_ATTENTION}relative_attention_bias.weight"]
    is_gated = f"{_FIRST_MLP}wi_0.weight" in shapes
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{_FIRST_ATTENTION}q.weight"][0] // heads,
        "d_ff": shapes[f"{_FIRST_MLP}{'wi_0' if is_gated else 'wi'}.weight"][0],
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
