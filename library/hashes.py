"""Hashes of model files and of tensors about to be saved, as other programs look them up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

#: The legacy hash covers these bytes of a file only.
LEGACY_OFFSET = 0x100000
LEGACY_LENGTH = 0x10000

NO_FILE = "NOFILE"
IS_A_DIRECTORY = "IsADirectory"

_CHUNK = 1 << 20

#: The order of dtypes in a safetensors file, widest last (they are written in descending order, then by name),
#: with their names there.
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_DTYPE_ORDER = {dtype: index for index, dtype in enumerate(_DTYPES)}


# --- files -------------------------------------------------------------------------------------------------
def legacy_file_hash(path: str | Path) -> str:
    """First 8 hex digits of the SHA-256 of 64 KiB at offset 1 MiB (of nothing for shorter files).

    `NOFILE` for a missing file, `IsADirectory` for a folder or a file that may not be read.
    """

    def digest(file: BufferedReader) -> str:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]

    return _of_file(path, digest)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a whole file, 64 hex digits; the same words as `legacy_file_hash` where there is no file."""
    return _of_file(path, lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def _of_file(path: str | Path, digest: Callable[[BufferedReader], str]) -> str:
    try:
        with open(path, "rb") as file:
            return digest(file)
    except FileNotFoundError:
        return NO_FILE
    except (IsADirectoryError, PermissionError):
        return IS_A_DIRECTORY


# --- tensors about to be saved -----------------------------------------------------------------------------
@dataclass(frozen=True)
class SshsHashes:
    """Values of the metadata keys `sshs_model_hash` and `sshs_legacy_hash`."""

    model_hash: str
    legacy_hash: str


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> SshsHashes:
    """Hashes of the safetensors file that these tensors and the `ss_` part of the metadata would make.

    model_hash: SHA-256 of the tensor data, independent of the metadata. legacy_hash: as `legacy_file_hash`; it depends
    on the header's length. Tensors are hashed one after another, nothing is serialised as a whole.
    """
    layout = _file_order(tensors)
    kept = {key: value for key, value in (metadata or {}).items() if key.startswith("ss_")}
    model, window = hashlib.sha256(), _Window(LEGACY_OFFSET, LEGACY_LENGTH)
    window.feed(_header(layout, kept))
    for _, tensor in layout:
        for chunk in _chunks(tensor):
            model.update(chunk)
            window.feed(chunk)
    return SshsHashes(model.hexdigest(), hashlib.sha256(window.bytes).hexdigest()[:8])


class _Window:
    """Keeps the bytes of a stream between two offsets."""

    def __init__(self, offset: int, length: int) -> None:
        self.start, self.stop = offset, offset + length
        self.position = 0
        self.bytes = bytearray()

    def feed(self, chunk: bytes | memoryview) -> None:
        low, high = max(self.start - self.position, 0), max(self.stop - self.position, 0)
        self.bytes += chunk[low:high]
        self.position += len(chunk)


def _file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors in the order in which safetensors writes their data."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"The tensor {name} has the dtype {tensor.dtype}, which safetensors files cannot hold.")
    return sorted(tensors.items(), key=lambda item: (-_DTYPE_ORDER[item[1].dtype], item[0].encode()))


def _header(layout: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """The file's first bytes: length of the header, the header, spaces up to a multiple of 8."""
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in layout:
        start, end = end, end + tensor.numel() * tensor.element_size()
        content[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    if data.numel() == 0:
        return
    view = data.view(torch.uint8).numpy().data
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]
