"""Which file formats count as training images, and the Pillow plug-ins that read the rarer ones."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from PIL import Image

_COMMON = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class _Plugin:
    """A format that not every Pillow reads: modules that register it when imported, and the package to install."""

    modules: tuple[str, ...]
    package: str


_RARE = {
    ".avif": _Plugin(("pillow_avif",), "pillow-avif-plugin"),
    ".jxl": _Plugin(("pillow_jxl", "jxlpy.JXLImagePlugin"), "pillow-jxl-plugin"),
}
#: pictures that people have, and that no script of this collection trains on
_FOREIGN = (".gif", ".heic", ".heif", ".tif", ".tiff")


@cache
def image_suffixes() -> tuple[str, ...]:
    """Lower-case file name endings of images, in the order in which a bare stem is resolved.

    The first call in a process registers the plug-ins that are installed with Pillow.
    """
    Image.init()
    return (*_COMMON, *(suffix for suffix, plugin in _RARE.items() if _is_readable(suffix, plugin)))


def _is_readable(suffix: str, plugin: _Plugin) -> bool:
    """Whether Pillow opens such files, by itself or after importing a plug-in."""
    for module in plugin.modules:
        if Image.EXTENSION.get(suffix) in Image.OPEN:
            break
        try:
            importlib.import_module(module)
        except ImportError:
            continue
    return Image.EXTENSION.get(suffix) in Image.OPEN


def missing_plugin(path: str | os.PathLike[str]) -> str:
    """What to install so that a file with this ending can be read; "" when that is not what it needs."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _RARE or suffix in image_suffixes():
        return ""
    return f"reading {suffix} files needs a plug-in for Pillow: pip install {_RARE[suffix].package}"


@cache
def unused_suffixes() -> Mapping[str, str]:
    """Lower-case endings of pictures that are not used -> why, and what to do."""
    foreign = {
        suffix: f"{suffix} files are not used for training; convert them to PNG, JPEG or WebP" for suffix in _FOREIGN
    }
    rare = {suffix: reason for suffix in _RARE if (reason := missing_plugin(f"x{suffix}"))}
    return foreign | rare
