"""Files of Textual Inversion: the embeddings of a new word, for one text encoder, for several, or one set per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.file_kind import holds_safetensors
from library.checkpoints.finite import check_finite
from library.checkpoints.tensors import cast, is_safetensors, load_tensors, save_pickle, save_tensors
from library.checkpoints.unpickle import load_pickle

#: key of the only text encoder's embeddings; several encoders have a key each
SINGLE_KEY = "emb_params"
#: one key per cross-attention of the U-Net in forward order: encoder, middle, decoder
LAYER_KEYS = (
    "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID",
    "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
)  # fmt: skip


def read_embeddings(path: str | Path, encoders: Sequence[str]) -> dict[str, Tensor]:
    """Encoder name -> embeddings [n,d] of a `.safetensors` file or a pickle (also with `string_to_param`).

    For one encoder: `emb_params`, else the encoder's own key, else the first tensor. For several: those that have a
    key in the file. A single vector becomes one row.
    Raises ValueError, naming keys and shapes, if the file holds none of these.
    """
    tensors = _read(path)
    if len(encoders) > 1:
        found = [name for name in encoders if name in tensors]
        if not found:
            raise ValueError(
                f"{path}: no embeddings for {' or '.join(encoders)} (keys: {_shown(tensors)}). It was made for a "
                "model with another number of text encoders."
            )
        return {name: _rows(path, name, tensors[name]) for name in found}
    if not tensors or tensors.keys() >= set(LAYER_KEYS):
        raise ValueError(f"{path}: no embeddings of a word for all layers (keys: {_shown(tensors)}).")
    [encoder] = encoders
    key = next((key for key in (SINGLE_KEY, encoder) if key in tensors), next(iter(tensors)))
    return {encoder: _rows(path, key, tensors[key])}


def write_embeddings(
    path: str | Path, embeddings: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes embeddings [n,d] by encoder name, atomically; a file for one encoder has the key `emb_params`.

    `.safetensors` carries the metadata; every other name becomes a pickled dictionary without it.
    """
    tensors = dict(embeddings) if len(embeddings) > 1 else {SINGLE_KEY: next(iter(embeddings.values()))}
    _write(path, tensors, dtype=dtype, metadata=metadata)


def read_layer_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Layer key -> embeddings [n,d] of a `.safetensors` file or a pickle, in the order of `LAYER_KEYS`.

    Raises ValueError for missing or unknown keys and different shapes.
    """
    tensors = _read(path)
    if tensors.keys() != set(LAYER_KEYS):
        raise ValueError(f"{path}: the keys must be {', '.join(LAYER_KEYS)}; found: {_shown(tensors)}.")
    layers = {key: _rows(path, key, tensors[key]) for key in LAYER_KEYS}
    if len({tuple(rows.shape) for rows in layers.values()}) > 1:
        raise ValueError(f"{path}: the layers have embeddings of different shapes: {_shown(tensors)}.")
    return layers


def write_layer_embeddings(
    path: str | Path, layers: Tensor, *, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Writes embeddings [L,n,d], L = len(LAYER_KEYS), one key per layer; otherwise like `write_embeddings`."""
    _write(path, dict(zip(LAYER_KEYS, layers, strict=True)), dtype=dtype, metadata=metadata)


def _read(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such embedding file.")
    return load_tensors(path) if holds_safetensors(path) else load_pickle(path, entry="string_to_param").tensors


def _write(path: str | Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Any) -> None:
    whole = {key: cast(value.detach(), dtype=dtype, device="cpu").clone() for key, value in tensors.items()}
    if is_safetensors(path):
        save_tensors(path, whole, metadata=metadata)
    else:
        save_pickle(path, whole)


def _rows(path: str | Path, key: str, tensor: Tensor) -> Tensor:
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}; embeddings are vectors [n, width].")
    check_finite(str(path), {key: rows})
    return rows


def _shown(tensors: Mapping[str, Tensor]) -> str:
    """Keys and shapes for messages."""
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:20]) or "none"
