"""Which files in a directory are images, and whether they can be read: by their headers, or decoded in full."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from PIL import features

from library.data.images import ImageError, image_size, load_image
from library.options.errors import UserError

_JXL_PLUGINS = ("pillow_jxl", "jxlpy")  # importing one registers it with Pillow


class BadImagesError(UserError):
    """Every image or caption file that cannot be used; `files` maps its path to a line that says why."""

    def __init__(self, files: Mapping[str, str]) -> None:
        first = f"{len(files)} file(s) of the training data cannot be used; repair or remove them:"
        super().__init__([first, *(f"  {line}" for line in files.values())])
        self.files = dict(files)


@cache
def image_suffixes() -> tuple[str, ...]:
    """Lower-case file name endings of images, in the order in which a bare stem is resolved."""
    suffixes = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]
    if features.check("avif"):
        suffixes.append(".avif")
    for plugin in _JXL_PLUGINS:
        try:
            importlib.import_module(plugin)
        except ImportError:
            continue
        suffixes.append(".jxl")
        break
    return tuple(suffixes)


def list_images(directory: str) -> list[str]:
    """`directory`/name of each image file directly in the directory, sorted as strings; any case of the ending."""
    with os.scandir(directory) as entries:
        names = [
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in image_suffixes() and not entry.is_dir()
        ]
    return sorted(os.path.join(directory, name) for name in names)


def read_image_sizes(paths: Iterable[str]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(path -> (width, height) after EXIF orientation, path -> line about a file that is unreadable)."""
    sizes: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}
    for path in paths:
        try:
            sizes[path] = image_size(path)
        except ImageError as error:
            bad[path] = str(error)
        if path in bad and os.path.isfile(path) and os.path.getsize(path) == 0:
            bad[path] = f"{path}: the file is empty (0 bytes)"
    return sizes, bad


def undecodable(paths: Sequence[str]) -> dict[str, str]:
    """Decode every image; path -> line about a file that cannot be decoded."""
    from tqdm import tqdm

    def problem(path: str) -> str:
        try:
            load_image(path)
        except ImageError as error:
            return str(error)
        return ""

    if not paths:
        return {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = list(tqdm(pool.map(problem, paths), total=len(paths), desc="checking images", unit="image"))
    return {path: line for path, line in zip(paths, problems, strict=True) if line}
