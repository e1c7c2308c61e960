"""What a model file says about itself before anything of it is read: keys, shapes and metadata, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.safetensors_header import Header, read_header


def peek(path: str | Path) -> Header | None:
    """The header of a safetensors file; None for a pickle, a folder, a missing or a damaged file.

    What is wrong with a damaged file says `checkpoints.tensors`, which reads it.
    """
    try:
        return read_header(Path(path))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Mapping[str, Any]:
    """The settings in a JSON file of a model folder; empty if there are none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
