"""What a file is by its first bytes, whatever its name says; what only looks like a model is named as what it is."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

_START = 512  # bytes that are looked at
_LEGACY_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"

#: (first bytes, what such a file is and what to do); nothing of this is a model file
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file"),
    (b"GGUF", "a GGUF file; only safetensors and torch files with float weights are read"),
    (b"\x93NUMPY", "a NumPy array; only safetensors and torch files are read"),
    (b"\x1f\x8b", "a compressed archive (gzip); unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a compressed archive (7z); unpack it"),
    (b"Rar!", "a compressed archive (RAR); unpack it"),
    (b"\x89HDF\r\n", "an HDF5 file; only safetensors and torch files are read"),
    (b"\x89PNG", "a picture; the model is another file"),
    (b"\xff\xd8\xff", "a picture; the model is another file"),
    (b"%PDF", "a PDF document, not a model"),
)
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script")


class FileKind(Enum):
    """How tensors are stored in a file."""

    SAFETENSORS = "safetensors"
    PICKLE = "pickle"


def file_kind(path: str | Path) -> FileKind:
    """How the tensors of a file are stored, by its content; its name only decides where the content says nothing.

    Raises FileNotFoundError, or ValueError that says what the file is instead: empty, a folder, a Git LFS pointer, a
    web page, a picture, an archive.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is needed here.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as file:
        start = file.read(_START)
    if not start:
        raise ValueError(f"{path} is empty (0 bytes). Copy or download it again.")
    if start.startswith((_ZIP, _LEGACY_PICKLE)):
        return FileKind.PICKLE
    if start[8:9] == b"{":
        return FileKind.SAFETENSORS
    _refuse_others(path, start)
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return FileKind.PICKLE
    return FileKind.SAFETENSORS if is_named_safetensors(path) else FileKind.PICKLE


def _refuse_others(path: Path, start: bytes) -> None:
    """Raises ValueError for a file that surely holds no tensors."""
    for first, what in _OTHERS:
        if start.startswith(first):
            _refuse(path, what)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_HTML):
        _refuse(path, "a web page (HTML), not a model: download the file itself")
    if text.startswith((b"{", b"[")):
        _refuse(path, "a text (JSON), not a model")
    if start[257:262] == b"ustar":
        _refuse(path, "a tar archive, which is not read; unpack it, or convert it to .safetensors")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ValueError(f"{path} is {what}.")


def is_named_safetensors(path: str | Path) -> bool:
    """Whether the name says safetensors (`.safetensors` or `.sft`, any case), as it does for files to be written."""
    return Path(path).suffix.lower() in (".safetensors", ".sft")


def holds_safetensors(path: str | Path) -> bool:
    """Whether a file is safetensors by its content. Raises like `file_kind`."""
    return file_kind(path) is FileKind.SAFETENSORS


def read_json_table(path: str | Path) -> dict[str, Any]:
    """The settings that stand beside tensors (config.json, an index of shards). Raises ValueError that names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of settings.")
    return content
