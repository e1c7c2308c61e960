"""Cache files of arrays (.npz): headers, checksums, the record of what they were made from, safe writing.

What we write carries `identity`, JSON that says what the arrays were made from, with a checksum of each. Files of other
programs have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from library.options.errors import UserError

#: what reading a damaged file may raise besides OSError
DAMAGED = (
    ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, TypeError, SyntaxError, struct.error,
    OverflowError, MemoryError, SystemError,  # the last one from Python's own parser, for a header that is nonsense
)  # fmt: skip


_ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more


class CacheError(UserError):
    """A cache entry that cannot be used; the message names the file."""


class SpoiltEntryError(CacheError):
    """An entry that was damaged, removed or replaced after the start-up check; it can be made anew."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: the cache is spoilt ({reason}). Delete it and start again: it is made anew.")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # on its way from a data worker


class State(Enum):
    """What a start-up check found."""

    VALID = "valid"
    UNVERIFIED = "valid in shape and keys; its origin is not recorded"
    MISSING = "missing"
    STALE = "made from something else"
    DAMAGED = "damaged"


USABLE = (State.VALID, State.UNVERIFIED)


class ArrayShapes(Mapping[str, tuple[int, ...]]):
    """Key -> shape of every array in an archive; a header is read when it is asked for.

    Asking may raise OSError or one of DAMAGED.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = {name.removesuffix(".npy"): name for name in archive.namelist()}

    def __getitem__(self, key: str) -> tuple[int, ...]:
        return self.header(key)[0]

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """(shape, dtype) of an array."""
        with self._archive.open(self._members[key]) as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(member)
            return shape, dtype

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def array_shapes(archive: zipfile.ZipFile) -> ArrayShapes:
    """The shapes of the arrays in an open npz file."""
    return ArrayShapes(archive)


def read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array, its CRC verified. Raises OSError or one of DAMAGED.

    Nothing is reserved for a header that claims more than the archive holds.
    """
    shape, dtype = ArrayShapes(archive).header(key)
    if math.prod(shape) * dtype.itemsize > archive.getinfo(f"{key}.npy").file_size:
        raise ValueError(f"`{key}` is shorter than its header says")
    with archive.open(f"{key}.npy") as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # this also makes zipfile compare the CRC of an empty array
            raise ValueError(f"`{key}` is longer than its header says")
    return array


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the file in one step; a kill leaves the previous one. Raises OSError when it cannot be written.

    Nothing waits for the disk: what a power failure leaves behind, checksums find out. Several processes may write the
    same file; the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete the unfinished cache files that killed processes left in `folders` more than an hour ago."""
    for folder in folders:
        for leftover in folder.glob(".*.npz.*.tmp"):
            try:
                if time.time() - leftover.stat().st_mtime > _ABANDONED:
                    leftover.unlink()
            except OSError:  # another process was faster, or the folder is read-only
                continue


def checksum(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and content."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def pack_identity(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The `identity` array (uint8) of `arrays`: JSON of `facts` and the checksums."""
    identity = {**facts, "sha256": {name: checksum(array) for name, array in arrays.items()}}
    return np.frombuffer(json.dumps(identity, sort_keys=True).encode(), dtype=np.uint8)


def parse_identity(array: np.ndarray) -> dict[str, Any]:
    """The facts in an `identity` array. Raises ValueError."""
    identity = json.loads(array.astype(np.uint8).tobytes())
    if not isinstance(identity, dict):
        raise ValueError("the recorded identity is not a table")
    return identity


def mismatch(arrays: Mapping[str, np.ndarray], identity: Mapping[str, Any]) -> str | None:
    """The first of `arrays` that is not what its checksum says."""
    checksums = identity.get("sha256", {})
    return next((name for name, array in arrays.items() if checksums.get(name) != checksum(array)), None)
