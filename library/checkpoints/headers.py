"""What a model file says about itself before anything of it is read: keys, shapes and metadata, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Header:
    """Key -> shape, and the text metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def peek(path: str | Path) -> Header | None:
    """The header of a safetensors file; None for a pickle, a folder, a missing or a damaged file.

    Only the first bytes are read. What is wrong with a damaged file says `checkpoints.tensors`, which reads it.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = file.read(1)
            if not 2 <= length <= _LIMIT or start != b"{":
                return None
            entries = json.loads(start + file.read(length - 1))
        metadata = entries.pop("__metadata__", None) or {}
        shapes = {str(key): tuple(entry["shape"]) for key, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Header(shapes, {str(key): str(value) for key, value in metadata.items()})


def read_json(path: Path) -> Mapping[str, Any]:
    """The settings in a JSON file of a model folder; empty if there are none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
