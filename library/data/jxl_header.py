"""The size of a JPEG XL picture from its first bytes; Pillow's plug-ins decode the whole picture to know it.

Formats: ISO/IEC 18181-1 (size header and image metadata of the codestream) and 18181-2 (boxes of the container).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from library.data.buckets import Size

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
_SIDE_BITS = (9, 13, 18, 30)


def jxl_size(path: str | Path) -> Size | None:
    """(width, height) as shown, after the orientation that the codestream names; None for other or damaged files."""
    with open(path, "rb") as file:
        start = _codestream_start(file)
    if len(start) < 12 or start[:2] != _CODESTREAM:
        return None
    size, orientation = _read_header(int.from_bytes(start[2:], "little"))
    return size[::-1] if orientation >= 5 else size


def _codestream_start(file: BinaryIO) -> bytes:
    """The first bytes of the codestream: of the file itself, or of its first `jxlc` or `jxlp` box."""
    start = file.read(16)
    if start[:12] != _CONTAINER:
        return start
    file.seek(12)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if length == 1:
            length = int.from_bytes(file.read(8), "big") - 8
        if kind == b"jxlc":
            return file.read(16)
        if kind == b"jxlp":
            return file.read(20)[4:]
        if length < 8:
            break
        file.seek(length - 8, 1)
    return b""


def _read_header(bits: int) -> tuple[Size, int]:
    """((width, height) as stored, EXIF-like orientation); the bits are read from the lowest on."""

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    is_small = take(1)
    height = _side(take, is_small=bool(is_small))
    ratio = take(3)
    width = height * _RATIOS[ratio][0] // _RATIOS[ratio][1] if ratio else _side(take, is_small=bool(is_small))
    is_all_default = take(1)
    has_extra_fields = not is_all_default and take(1)
    return (width, height), take(3) + 1 if has_extra_fields else 1


def _side(take: Callable[[int], int], *, is_small: bool) -> int:
    return (take(5) + 1) * 8 if is_small else take(_SIDE_BITS[take(2)]) + 1
