"""Where a model's text encoders come from (a file, a folder, inside the model's own file or folder), read when used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import layout_clip
from library.checkpoints.folders import part_file, read_config
from library.checkpoints.recognition import check_not_quantised
from library.checkpoints.tensors import LazyTensors, RenamedTensors, open_tensors, select
from library.models.t5 import build_t5
from library.models.text_encoders import build_clip

EMBEDDED = "text_encoders."  # prefix of text encoders inside a model file, followed by the encoder's name
_CONFIG_KEYS = ("hidden_act", "num_attention_heads")


@dataclass(frozen=True)
class EncoderKind:
    """One text encoder of a family. Its option is `--<name>`.

    `normalize` gives tensors without outer prefix the names that modules are filled by. Without `activation` it is a
    T5 encoder, else a CLIP encoder with this activation unless a config.json says otherwise.
    """

    name: str
    folder: str  # in a Diffusers folder
    normalize: Callable[[LazyTensors], LazyTensors]
    activation: str | None = None


@dataclass(frozen=True)
class EncoderSource:
    """One text encoder as it is stored: its tensors under transformers' names, and settings that shapes cannot tell."""

    kind: EncoderKind
    tensors: LazyTensors
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Any:
        """The encoder as a module in eval mode without gradients; a dtype of None keeps the file's."""
        if self.kind.activation is None:
            return build_t5(self.tensors, dtype=dtype, device=device)
        return build_clip(
            self.tensors, activation=self.kind.activation, component=f"text encoder {self.kind.name}", dtype=dtype,
            device=device, overrides=self.settings,
        )  # fmt: skip


def find_encoder(
    kind: EncoderKind, given: str | None, location: Path, tensors: LazyTensors | None
) -> EncoderSource | None:
    """The encoder of its own option (`given`), else the one in the model's file or folder; None if there is none.

    `location` is the model's file or folder, `tensors` the opened file. Only names and shapes are looked at. Raises
    FileNotFoundError or ValueError for an option that names no such encoder.
    """
    option = f"--{kind.name}"
    if given:
        return _from_option(kind, Path(given), option)
    if tensors is not None:
        return _embedded(kind, tensors) if is_embedded(kind, tensors) else None
    folder = location / kind.folder
    return _from_folder(kind, folder) if folder.is_dir() else None


def is_embedded(kind: EncoderKind, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model file holds this encoder."""
    prefix = f"{EMBEDDED}{kind.name}."
    return any(key.startswith(prefix) for key in tensors)


def _from_option(kind: EncoderKind, path: Path, option: str) -> EncoderSource:
    if path.is_dir():
        inner = path / kind.folder
        return _from_folder(kind, inner if inner.is_dir() else path)
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file or folder.")
    tensors = open_tensors(path)
    return _embedded(kind, tensors) if is_embedded(kind, tensors) else EncoderSource(kind, _alone(kind, tensors))


def _from_folder(kind: EncoderKind, folder: Path) -> EncoderSource:
    settings: dict[str, Any] = {}
    if kind.activation is not None:
        settings = {key: value for key, value in read_config(folder).items() if key in _CONFIG_KEYS}
    return EncoderSource(kind, _alone(kind, open_tensors(part_file(folder, kind.folder))), settings)


def _alone(kind: EncoderKind, tensors: LazyTensors) -> LazyTensors:
    """An encoder that is all of a file, whatever prefix its keys have."""
    if kind.activation is None:
        return kind.normalize(tensors)
    check_not_quantised(tensors.shapes, source=f"--{kind.name} {tensors.source}")
    bare = RenamedTensors(tensors, {layout_clip.strip_wrapper(key): (key, None) for key in tensors})
    part = kind.normalize(bare)
    if layout_clip.TOKEN_TABLE not in part:
        found = ", ".join(list(tensors)[:5]) or "nothing"
        raise ValueError(f"--{kind.name} {tensors.source} holds no CLIP text encoder (keys: {found}).")
    return part


def _embedded(kind: EncoderKind, tensors: LazyTensors) -> EncoderSource:
    return EncoderSource(kind, _alone(kind, select(tensors, f"{EMBEDDED}{kind.name}.")))
