"""The header of a safetensors file, read once and checked completely before anything believes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

METADATA = "__metadata__"
#: bytes of one element
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_LENGTH_LIMIT = 100_000_000  # bytes of a header; the format's own limit
_SIDES_LIMIT = 64  # dimensions of a tensor, as in torch
_EMPTY_LIMIT = 1 << 24  # product of the other sides of a tensor without elements: nothing in the file vouches for them
_SHOWN = 100  # characters of a name in a message


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor: `begin` and `end` count from the file's first byte."""

    dtype: str  # the format's name, perhaps unknown here
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Everything that a file says about itself."""

    metadata: dict[str, str]
    entries: dict[str, HeaderEntry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        return {key: entry.shape for key, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """Raises ValueError, naming file and defect, unless every offset and size is what it must be.

    A dtype that is not known here is no defect; its tensor cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LENGTH_LIMIT):
            raise ValueError(
                f"{path} is not a complete safetensors file: its header should have {length} bytes, the file has "
                f"{size}. Copy or download it again."
            )
        content = _parse(path, file.read(length))
    metadata = _metadata(path, content.pop(METADATA, None))
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in content.items()}
    _check_places(path, entries, 8 + length, size)
    return Header(metadata, entries)


# --- the text --------------------------------------------------------------------------------------------------
def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{path} is not a safetensors file: its header is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is a {type(content).__name__}, not a table.")
    for name in content:
        if not _is_text(name):
            _refuse(path, name, "the name is not valid text")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{_shown(name)} is there twice")
            seen.add(name)
    return table


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A name in a message: on one line, printable, not endless."""
    text = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
    return text if text.isprintable() else ascii(text)


def _refuse(path: Path, name: str, defect: str) -> NoReturn:
    raise ValueError(f"{path} is damaged: {_shown(name)}: {defect}. Copy or download it again.")


# --- what it says ----------------------------------------------------------------------------------------------
def _metadata(path: Path, content: Any) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        _refuse(path, METADATA, f"it is a {type(content).__name__}, not a table of texts")
    return {key: value if isinstance(value, str) else str(value) for key, value in content.items()}


def _entry(path: Path, name: str, content: Any, data_start: int) -> HeaderEntry:
    if not isinstance(content, dict):
        _refuse(path, name, f"it is described by a {type(content).__name__}, not by a table")
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in content]
    if missing:
        _refuse(path, name, f"its {' and '.join(missing)} is missing")
    dtype, shape, offsets = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str):
        _refuse(path, name, f"its dtype is a {type(dtype).__name__}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > _SIDES_LIMIT:
        _refuse(path, name, f"its shape is {_brief(shape)}; sizes from 0 on are needed")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        _refuse(path, name, f"its data_offsets are {_brief(offsets)}; two numbers from 0 on are needed")
    begin, end = offsets
    if begin > end:
        _refuse(path, name, f"its data_offsets {offsets} run backwards")
    if dtype in ITEM_SIZES:
        _check_size(path, name, shape, dtype, end - begin)
    return HeaderEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _brief(value: Any) -> str:
    return _shown(repr(value))


def _check_size(path: Path, name: str, shape: list[int], dtype: str, found: int) -> None:
    others = 1
    for side in shape:
        others *= side or 1
        if others >= 1 << 63:
            _refuse(path, name, f"no tensor has the shape {_brief(shape)}")
    needed = 0 if 0 in shape else others * ITEM_SIZES[dtype]
    if needed != found:
        _refuse(path, name, f"{_brief(shape)} of {dtype} needs {needed} bytes, its data_offsets give it {found}")
    if not needed and others > _EMPTY_LIMIT:
        _refuse(path, name, f"it has no elements, but the shape {_brief(shape)}")


def _check_places(path: Path, entries: Mapping[str, HeaderEntry], data_start: int, size: int) -> None:
    """The tensors must fill the file from the header to the last byte, without gaps and without sharing bytes."""
    needed = max((entry.end for entry in entries.values()), default=data_start)
    if needed > size:
        raise ValueError(f"{path} is incomplete: {size} bytes of {needed}. Copy or download it again.")
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            _refuse(path, name, f"its bytes overlap another tensor's by {position - entry.begin}")
        if entry.begin > position:
            _refuse(path, name, f"there is a gap of {entry.begin - position} bytes before it")
        position = entry.end
    if position != size:
        raise ValueError(
            f"{path} is damaged: {size - position} bytes after its last tensor belong to nothing. Copy or download it "
            "again."
        )
