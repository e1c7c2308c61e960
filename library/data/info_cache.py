"""`metadata_cache.json`: captions and sizes of one image directory, remembered from an earlier run (`cache_info`)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.data.image_memory import replace_text
from library.options.errors import UserError

logger = logging.getLogger(__name__)

FILE_NAME = "metadata_cache.json"


def read_info_cache(image_dir: str) -> dict[str, tuple[str, tuple[int, int]]] | None:
    """Image path -> (caption, (width, height)), in the file's order; None when there is no such file.

    A path that does not exist any more is looked for in `image_dir` by its name, so a folder may move.
    Raises UserError naming the file when its content is not of that form.
    """
    path = os.path.join(image_dir, FILE_NAME)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            content = json.load(file)
        return {_present(key, image_dir): _entry(value) for key, value in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"not a file that --cache_info wrote ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {reason}; delete it to have it rebuilt") from error


def _present(key: str, image_dir: str) -> str:
    if os.path.isfile(key):
        return key
    return os.path.join(image_dir, os.path.basename(key.replace("\\", "/")))


def _entry(value: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    caption, (width, height) = value["caption"], value["resolution"]
    if not isinstance(caption, str):
        raise TypeError(f"caption {caption!r} is not a text")
    return caption, (int(width), int(height))


def write_info_cache(image_dir: str, entries: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
    """Write the file in one step; a directory that cannot be written to is only a warning."""
    content = {path: {"caption": caption, "resolution": list(size)} for path, (caption, size) in entries.items()}
    path = os.path.join(image_dir, FILE_NAME)
    try:
        replace_text(Path(path), json.dumps(content, ensure_ascii=False, indent=2))
    except OSError as error:
        logger.warning("%s could not be written (%s); the images are read again next time", path, error)
