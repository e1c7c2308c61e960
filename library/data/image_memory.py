"""What earlier runs found out about image files, so that an unchanged file is not opened at every start.

A file counts as unchanged while its size and its modification time (to the nanosecond) are the same. Being wrong here
is never silent: a picture whose size differs from the remembered one is an error when it is loaded.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from library.data.buckets import Size

logger = logging.getLogger(__name__)


class Stamp(NamedTuple):
    """What changes when a file is changed."""

    bytes: int
    modified: int  # ns


class Facts(NamedTuple):
    """(width, height) after EXIF orientation, and whether the whole picture has been decoded without an error."""

    size: Size
    is_decoded: bool


def default_root() -> Path:
    """The user's folder with one file per image directory; deleting it only costs time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-scripts" / "images"


def stamp_of(path: str) -> Stamp | None:
    """The present stamp of a file; None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


class ImageMemory:
    """Facts by absolute path. Nothing is written before `save`; each directory is read when first asked about."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or default_root()
        self._folders: dict[str, dict[str, list[int]]] = {}
        self._changed: set[str] = set()

    def recall(self, path: str, stamp: Stamp | None) -> Facts | None:
        """What is known about the file with this stamp; None when it is unknown or has changed."""
        folder, _, name = path.rpartition(os.sep)
        entry = self._entries(folder).get(name)
        if stamp is None or entry is None:
            return None
        try:
            size, modified, width, height, is_decoded = entry
            is_sound = size == stamp[0] and modified == stamp[1] and width > 0 and height > 0
        except (TypeError, ValueError):  # not what `remember` writes
            return None
        return Facts((width, height), is_decoded == 1) if is_sound else None

    def remember(self, path: str, stamp: Stamp, facts: Facts) -> None:
        """To be recalled after `save`."""
        folder, _, name = path.rpartition(os.sep)
        self._entries(folder)[name] = [*stamp, *facts.size, int(facts.is_decoded)]
        self._changed.add(folder)

    def save(self) -> None:
        """Write what has changed, without the files that are gone; a folder that cannot be written is a warning."""
        for folder in sorted(self._changed):
            try:
                present = set(os.listdir(folder or os.sep))
                entries = {name: entry for name, entry in self._folders[folder].items() if name in present}
                replace_text(self._file(folder), json.dumps({"directory": folder, "files": entries}))
            except OSError as error:
                message = "%s cannot be written (%s): the images of %s are read again at the next start"
                logger.warning(message, self._file(folder), error, folder)
        self._changed.clear()

    def _file(self, folder: str) -> Path:
        return self._root / f"{blake2b(os.fsencode(folder), digest_size=16).hexdigest()}.json"

    def _entries(self, folder: str) -> dict[str, list[int]]:
        if folder not in self._folders:
            self._folders[folder] = self._read(folder)
        return self._folders[folder]

    def _read(self, folder: str) -> dict[str, list[int]]:
        try:
            content = json.loads(self._file(folder).read_bytes())
        except (OSError, ValueError):
            return {}
        files = content.get("files") if isinstance(content, Mapping) and content.get("directory") == folder else None
        return files if isinstance(files, dict) else {}


def replace_text(path: Path, text: str) -> None:
    """Put `text` in the place of a file in one step; several processes may do so at once. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
