"""Which files in a directory are images, and whether they can be read: by their headers, or decoded in full."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from library.data.formats import image_suffixes, unused_suffixes
from library.data.image_memory import Facts, ImageMemory, stamp_of
from library.data.images import ImageError, check_decodes, image_size
from library.data.threads import map_files
from library.options.errors import UserError

__all__ = ["BadImagesError", "decode_images", "image_suffixes", "list_images", "read_image_sizes"]

logger = logging.getLogger(__name__)


class BadImagesError(UserError):
    """Every image or caption file that cannot be used; `files` maps its path to a line that says why."""

    def __init__(self, files: Mapping[str, str]) -> None:
        first = f"{len(files)} file(s) of the training data cannot be used; repair or remove them:"
        super().__init__([first, *(f"  {line}" for line in files.values())])
        self.files = dict(files)


def list_images(directory: str) -> list[str]:
    """`directory`/name of each image file directly in the directory, sorted as strings; any case of the ending.

    Pictures of other formats are counted in a warning.
    """
    wanted, unused = image_suffixes(), unused_suffixes()
    names, others = [], Counter[str]()
    with os.scandir(directory) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in wanted:
                if not entry.is_dir():
                    names.append(entry.name)
            elif suffix in unused:
                others[suffix] += 1
    for suffix, count in sorted(others.items()):
        _report_unused(os.path.abspath(directory), suffix, count)
    return sorted(os.path.join(directory, name) for name in names)


@cache
def _report_unused(directory: str, suffix: str, count: int) -> None:
    """Once per process: a directory is listed several times."""
    logger.warning("%s: %d files are left out: %s", directory, count, unused_suffixes()[suffix])


def read_image_sizes(
    paths: Iterable[str], memory: ImageMemory | None = None
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(path -> (width, height) after EXIF orientation, path -> line about a file that is unreadable).

    Only files that `memory` (by default the user's) does not know are opened.
    """
    paths, memory = list(paths), memory or ImageMemory()
    absolute = [os.path.abspath(path) for path in paths]
    stamps = [stamp_of(path) for path in absolute]
    known = [memory.recall(path, stamp) for path, stamp in zip(absolute, stamps, strict=True)]
    unknown = [index for index, facts in enumerate(known) if facts is None]
    results = map_files(_size_or_problem, [paths[index] for index in unknown], "reading image sizes")
    bad: dict[str, str] = {}
    for index, result in zip(unknown, results, strict=True):
        stamp = stamps[index]
        if isinstance(result, str):
            bad[paths[index]] = result
        elif stamp is not None:
            known[index] = facts = Facts(result, is_decoded=False)
            memory.remember(absolute[index], stamp, facts)
    memory.save()
    sizes = {path: facts.size for path, facts in zip(paths, known, strict=True) if facts is not None}
    return sizes, bad


def decode_images(paths: Sequence[str]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Decode every image: (path -> (width, height), path -> line about a file that cannot be decoded)."""
    results = dict(zip(paths, map_files(_decoded_or_problem, paths, "checking images"), strict=True))
    sizes = {path: result for path, result in results.items() if not isinstance(result, str)}
    return sizes, {path: result for path, result in results.items() if isinstance(result, str)}


def _size_or_problem(path: str) -> tuple[int, int] | str:
    try:
        return image_size(path)
    except ImageError as error:
        return str(error)


def _decoded_or_problem(path: str) -> tuple[int, int] | str:
    try:
        return check_decodes(path)
    except ImageError as error:
        return str(error)
