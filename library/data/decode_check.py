"""Decode every image of a run once before training, so that a broken file is reported now and not in hour three."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from library.checkpoints.tensors import atomic_write
from library.data.dataset import DatasetGroup
from library.data.image_files import BadImagesError, undecodable

logger = logging.getLogger(__name__)


def default_memory() -> Path:
    """The user's file that remembers which images have been decoded: path -> [file size, modification time in ns]."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-scripts" / "decoded_images.json"


def check_images(group: DatasetGroup, memory: Path | None = None) -> int:
    """Decode all images and conditioning images that have no cached latents; returns how many were decoded.

    Files of unchanged size and time that an earlier run decoded are skipped. Raises BadImagesError listing every
    broken file. Call it in the main process only.
    """
    memory = memory or default_memory()
    known = _read(memory)
    stamps = {path: _stamp(path) for path in _paths(group)}
    waiting = [path for path, stamp in stamps.items() if stamp is None or known.get(path) != stamp]
    bad = undecodable(waiting)
    known |= {path: stamp for path in waiting if path not in bad and (stamp := stamps[path]) is not None}
    if waiting:
        _write(memory, known)
    if bad:
        raise BadImagesError(bad)
    return len(waiting)


def _paths(group: DatasetGroup) -> Iterable[str]:
    for dataset in group.datasets:
        for record in dataset.records:
            if record.path is not None and record.latents is None and record.latents_path is None:
                yield os.path.abspath(record.path)
            if record.conditioning_path is not None:
                yield os.path.abspath(record.conditioning_path)


def _stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read(memory: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(memory: Path, known: dict[str, list[int]]) -> None:
    try:
        with atomic_write(memory) as file:
            file.write(json.dumps(known).encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s): images are decoded again at the next start", memory, error)
