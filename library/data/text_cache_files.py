"""Text cache files: the encoders' outputs for one image's caption, and what they were made from.

A file lies beside its image and holds the arrays and flags of a `TextCacheSpec`, `caption_sha256`, and `identity`
(encoders, checksums). Files of other programs lack the last two.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.npz_files import (
    DAMAGED,
    USABLE,
    CacheError,
    SpoiltEntryError,
    State,
    array_shapes,
    mismatch,
    pack_identity,
    parse_identity,
    read_array,
    write_arrays,
)
from library.data.records import TextCacheSpec

_VERSION = 1


@dataclass(frozen=True)
class TextEntry:
    """What the cache must hold for one image: where it lies, and what it must have been made from."""

    path: Path
    caption: str  # as it is encoded
    encoders: str  # identity of the text encoders; empty: not compared
    is_trusted: bool = False  # `--skip_cache_check`: origins are not compared


def text_cache_path(image: Path, spec: TextCacheSpec) -> Path:
    """`<stem><suffix>` beside the image."""
    return image.with_name(image.stem + spec.suffix)


def check(entry: TextEntry, spec: TextCacheSpec, example: Mapping[str, Tensor]) -> tuple[State, str]:
    """Whether the file holds a usable entry, with the reason if not. `example`: what the encoders give for a caption.

    The whole file is read and compared with its checksums: to make an entry anew once training runs is slow.
    """
    try:
        with zipfile.ZipFile(entry.path) as archive:
            found = array_shapes(archive)
            for name in spec.arrays:
                if name not in found:
                    return State.STALE, f"`{name}` is missing"
                if found[name] != tuple(example[name].shape):
                    return State.STALE, f"`{name}` has the shape {list(found[name])}, not {list(example[name].shape)}"
            if any(found.get(name) != () for name in spec.flags):
                return State.STALE, f"{', '.join(f'`{name}`' for name in spec.flags)} missing"
            arrays = {name: read_array(archive, name) for name in found}
        for name in spec.arrays:
            allowed = "f" if example[name].is_floating_point() else "fiub"
            if arrays[name].dtype.kind not in allowed:
                return State.STALE, f"`{name}` holds {arrays[name].dtype}"
        return _compare(arrays, entry, spec)
    except FileNotFoundError:
        return State.MISSING, ""
    except (OSError, *DAMAGED) as error:
        return State.DAMAGED, f"unreadable ({error})"


def _compare(arrays: Mapping[str, np.ndarray], entry: TextEntry, spec: TextCacheSpec) -> tuple[State, str]:
    """What the values of a file say about its origin."""
    for name, value in spec.flags.items():
        if bool(arrays[name]) != value:
            return State.STALE, f"made with {name} = {bool(arrays[name])}"
    identity = parse_identity(arrays["identity"]) if "identity" in arrays else None
    if identity is not None:
        wrong = mismatch({name: array for name, array in arrays.items() if name != "identity"}, identity)
        if wrong is not None:
            return State.DAMAGED, f"`{wrong}` does not match its checksum"
    if "caption_sha256" in arrays and not np.array_equal(arrays["caption_sha256"], _caption_hash(entry.caption)):
        return State.STALE, "the caption has changed"
    if identity is None:
        return State.UNVERIFIED, ""
    if identity.get("version") != _VERSION or "caption_sha256" not in arrays:
        return State.STALE, "written by another version"
    if entry.encoders and identity.get("encoders") != entry.encoders:
        return State.STALE, "made with other text encoders"
    return State.VALID, ""


def read(entry: TextEntry, spec: TextCacheSpec) -> dict[str, Tensor]:
    """The arrays of an entry, float32, with checksums verified and origin compared again.

    Raises SpoiltEntryError naming file and array.
    """
    try:
        with zipfile.ZipFile(entry.path) as archive:
            found = array_shapes(archive)
            missing = [name for name in spec.arrays if name not in found]
            if missing:
                raise SpoiltEntryError(entry.path, f"{', '.join(missing)} missing")
            arrays = {name: read_array(archive, name) for name in found}
        reason = _unfit(arrays, entry, spec)
    except FileNotFoundError as error:
        raise SpoiltEntryError(entry.path, "the file is gone") from error
    except CacheError:
        raise
    except (OSError, *DAMAGED) as error:
        raise SpoiltEntryError(entry.path, f"unreadable: {error}") from error
    if reason:
        raise SpoiltEntryError(entry.path, reason)
    return {name: torch.from_numpy(arrays[name]).float() for name in spec.arrays}


def _unfit(arrays: Mapping[str, np.ndarray], entry: TextEntry, spec: TextCacheSpec) -> str:
    """Why the arrays that were read cannot be used, or nothing."""
    for name, length in spec.lengths.items():
        if arrays[name].shape[:1] != (length,):
            return f"`{name}` has the shape {list(arrays[name].shape)} and not {length} rows"
    for name in spec.arrays:
        if arrays[name].dtype.kind not in "fiub" or not np.isfinite(arrays[name]).all():
            return f"`{name}` holds values that are no finite numbers"
    if not entry.is_trusted:
        state, reason = _compare(arrays, entry, spec)
        return "" if state in USABLE else reason
    identity = parse_identity(arrays["identity"]) if "identity" in arrays else None
    wrong = mismatch({name: arrays[name] for name in spec.arrays}, identity) if identity is not None else None
    return f"`{wrong}` does not match its checksum" if wrong is not None else ""


def write(entry: TextEntry, spec: TextCacheSpec, outputs: Mapping[str, Tensor]) -> None:
    """Put one caption's outputs into the file, which is replaced in one step. Raises OSError if that is impossible."""
    arrays = {name: _as_array(outputs[name]) for name in spec.arrays}
    arrays |= {name: np.array(value) for name, value in spec.flags.items()}
    arrays["caption_sha256"] = _caption_hash(entry.caption)
    facts = {"version": _VERSION, "encoders": entry.encoders}
    write_arrays(entry.path, {**arrays, "identity": pack_identity(facts, arrays)})


def _caption_hash(caption: str) -> np.ndarray:
    """The SHA-256 of the text, uint8 [32]."""
    return np.frombuffer(hashlib.sha256(caption.encode()).digest(), dtype=np.uint8)


def _as_array(tensor: Tensor) -> np.ndarray:
    """float16 stays; bfloat16 and narrower floats, which npz files cannot hold, become float32."""
    has_numpy_dtype = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
    return (tensor if has_numpy_dtype else tensor.float()).cpu().numpy()
