"""Decode every image of a run once before training, so that a broken file is reported now and not in hour three."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from library.data.dataset import DatasetGroup
from library.data.image_files import BadImagesError, decode_images
from library.data.image_memory import Facts, ImageMemory, stamp_of


def check_images(group: DatasetGroup, memory: Path | None = None, *, conditioning_only: bool = False) -> int:
    """Decode all images and conditioning images that have no cached latents; returns how many were decoded.

    Files that an earlier run decoded and that have not changed since are skipped: see `image_memory`, whose folder
    `memory` is. Raises BadImagesError listing every broken file. Call it in the main process only.
    """
    known = ImageMemory(memory)
    stamps = {path: stamp_of(path) for path in _paths(group, conditioning_only=conditioning_only)}
    waiting = [
        path for path, stamp in stamps.items()
        if (facts := known.recall(path, stamp)) is None or not facts.is_decoded
    ]  # fmt: skip
    sizes, bad = decode_images(waiting)
    for path, size in sizes.items():
        if (stamp := stamps[path]) is not None:
            known.remember(path, stamp, Facts(size, is_decoded=True))
    known.save()
    if bad:
        raise BadImagesError(bad)
    return len(waiting)


def _paths(group: DatasetGroup, *, conditioning_only: bool) -> Iterable[str]:
    for dataset in group.datasets:
        for record in dataset.records:
            if record.conditioning_path is not None:
                yield os.path.abspath(record.conditioning_path)
            is_cached = record.latents is not None or record.latents_path is not None
            if record.path is not None and not is_cached and not conditioning_only:
                yield os.path.abspath(record.path)
