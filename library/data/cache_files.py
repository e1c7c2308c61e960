"""Latent cache files: names, keys, what an entry was made from, and reading and writing them safely.

A file belongs to one image and holds one entry per latent size. The arrays of an entry share a key ending: none, or
`_<h>x<w>` in latent units. Our entries carry `identity` (JSON: source, geometry, VAE, checksums); entries of other
programs do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.checkpoints.tensors import atomic_write
from library.data.buckets import Size, crop_ltrb
from library.data.records import LatentSpec
from library.options.errors import UserError

_KEY = re.compile(r"(latents|latents_flipped|original_size|crop_ltrb|alpha_mask|identity)(_\d+x\d+)?")
_DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, TypeError)
_VERSION = 1


class CacheError(UserError):
    """A latent cache entry that cannot be used; the message names the file."""


@dataclass(frozen=True)
class LatentSample:
    """The latents of one fetched sample, in one orientation; the mask is never mirrored."""

    latents: Tensor  # [C,h,w] as cached
    original_size: Size
    crop_ltrb: tuple[float, float, float, float]
    alpha_mask: Tensor | None  # float32 [H,W] in [0,1], pixels


@dataclass(frozen=True)
class CachedLatents:
    """Everything that is cached for one image at one bucket size."""

    latents: Tensor  # [C,h,w]
    flipped: Tensor | None  # [C,h,w], the encoding of the mirrored image
    original_size: Size
    crop_ltrb: tuple[float, float, float, float]
    alpha_mask: Tensor | None = None  # float32 [H,W] in [0,1], unflipped

    def sample(self, *, is_flipped: bool) -> LatentSample:
        """One orientation; the flipped one must have been cached."""
        latents = self.flipped if is_flipped else self.latents
        if latents is None:
            raise CacheError("flipped latents were asked for but not cached; cache again with flip_aug on")
        return LatentSample(latents, self.original_size, self.crop_ltrb, self.alpha_mask)


@dataclass(frozen=True)
class Entry:
    """What the cache must hold for one image: where it lies, and what it must have been made from."""

    path: Path
    image: Path | None  # None: only the cache exists
    image_size: Size
    bucket: Size
    resized: Size
    interpolation: str | None
    wants_flipped: bool
    wants_mask: bool
    vae: str  # identity of the VAE; empty = not checked
    shape: tuple[int, int, int]  # latents [C,h,w]
    keys_have_size: bool

    @property
    def sized_ending(self) -> str:
        """The key ending that names the latent size."""
        return f"_{self.shape[1]}x{self.shape[2]}"

    def endings(self) -> tuple[str, ...]:
        """Key endings under which the entry may be found, in the order of preference."""
        return (self.sized_ending,) if self.keys_have_size else ("", self.sized_ending)

    def required_shapes(self, ending: str) -> dict[str, tuple[int, ...]]:
        """The arrays that must be there, with their shapes."""
        shapes: dict[str, tuple[int, ...]] = {
            f"latents{ending}": self.shape, f"original_size{ending}": (2,), f"crop_ltrb{ending}": (4,),
        }
        if self.wants_flipped:
            shapes[f"latents_flipped{ending}"] = self.shape
        if self.wants_mask:
            shapes[f"alpha_mask{ending}"] = (self.bucket[1], self.bucket[0])
        return shapes


class State(Enum):
    """What a start-up check found."""

    VALID = "valid"
    UNVERIFIED = "valid in shape and keys; its origin is not recorded"
    MISSING = "missing"
    STALE = "made from something else"
    DAMAGED = "damaged"


def cache_path(image: Path, image_size: Size, suffix: str) -> Path:
    """`<stem>_<W>x<H><suffix>` beside the image, with sizes of at least four digits."""
    return image.with_name(f"{image.stem}_{image_size[0]:04d}x{image_size[1]:04d}{suffix}")


def check(entry: Entry) -> tuple[State, str]:
    """Whether the file holds a usable entry, from array headers and the recorded identity; with the reason if not.

    Pixels are not read and checksums not computed; those are verified when an entry is read.
    """
    try:
        shapes = _array_shapes(entry.path)
    except FileNotFoundError:
        return State.MISSING, ""
    except (OSError, *_DAMAGED) as error:
        return State.DAMAGED, f"unreadable ({error})"
    ending = _find_ending(entry, shapes)
    if ending is None:
        return State.STALE, "no latents of the wanted size"
    for key, shape in entry.required_shapes(ending).items():
        if shapes.get(key) != shape:
            return State.STALE, f"`{key}` is missing or has the wrong shape"
    try:
        with np.load(entry.path, allow_pickle=False) as file:
            if f"identity{ending}" in shapes:
                reason = _difference(_parse_identity(file[f"identity{ending}"]), entry)
                return (State.STALE, reason) if reason else (State.VALID, "")
            reason = _value_difference(file[f"original_size{ending}"], file[f"crop_ltrb{ending}"], entry)
    except (OSError, *_DAMAGED) as error:
        return State.DAMAGED, f"unreadable ({error})"
    return (State.STALE, reason) if reason else (State.UNVERIFIED, "")


def read(path: Path, spec: LatentSpec, bucket: Size, *, is_flipped: bool, wants_mask: bool) -> LatentSample:
    """The entry for `bucket` in one orientation, float32, verified by its checksums.

    Raises CacheError naming file and key. A damaged file is removed, so that the next start makes it anew.
    """
    shape = spec.channels, bucket[1] // spec.downsample, bucket[0] // spec.downsample
    sized = f"_{shape[1]}x{shape[2]}"
    endings = (sized,) if spec.cache_keys_have_size else ("", sized)
    latents_key = "latents_flipped" if is_flipped else "latents"
    names = [latents_key, "original_size", "crop_ltrb", *(["alpha_mask"] if wants_mask else [])]
    try:
        with np.load(path, allow_pickle=False) as file:
            ending = next((e for e in endings if f"latents{e}" in file and file[f"latents{e}"].shape == shape), None)
            if ending is None:
                raise CacheError(f"{path}: no latents of shape {list(shape)} (bucket {bucket[0]}x{bucket[1]})")
            missing = [name + ending for name in names if name + ending not in file]
            if missing:
                raise CacheError(
                    f"{path}: {', '.join(missing)} missing; delete the file, or cache without --skip_cache_check"
                )
            arrays = {name: file[name + ending] for name in names}
            identity = _parse_identity(file["identity" + ending]) if "identity" + ending in file else None
    except FileNotFoundError as error:
        raise CacheError(f"{path}: the latent cache file is gone; start again to make it anew") from error
    except CacheError:
        raise
    except _DAMAGED as error:
        raise _discard(path, str(error)) from error
    if identity is not None:
        for name, array in arrays.items():
            if identity.get("sha256", {}).get(name) != _digest(array):
                raise _discard(path, f"`{name}{ending}` does not match its checksum")
    width, height = (int(side) for side in arrays["original_size"])
    left, top, right, bottom = (float(value) for value in arrays["crop_ltrb"])
    mask = torch.from_numpy(arrays["alpha_mask"]).float() if wants_mask else None
    latents = torch.from_numpy(arrays[latents_key]).float()
    return LatentSample(latents, (width, height), (left, top, right, bottom), mask)


def write(entry: Entry, cached: CachedLatents) -> None:
    """Put the entry into its file: other sizes of the same image stay, everything older of this size goes.

    The file is replaced in one step; a kill leaves the previous one. Raises OSError when it cannot be written.
    """
    kept, ending = _kept_arrays(entry)
    arrays: dict[str, np.ndarray] = {
        "latents": cached.latents.float().cpu().numpy(),
        "original_size": np.array(cached.original_size),
        "crop_ltrb": np.array(cached.crop_ltrb, dtype=np.float64),
    }
    if cached.flipped is not None:
        arrays["latents_flipped"] = cached.flipped.float().cpu().numpy()
    if cached.alpha_mask is not None:
        arrays["alpha_mask"] = cached.alpha_mask.float().cpu().numpy()
    identity = _identity(entry) | {"sha256": {name: _digest(array) for name, array in arrays.items()}}
    arrays["identity"] = np.frombuffer(json.dumps(identity, sort_keys=True).encode(), dtype=np.uint8)
    kept.update({name + ending: array for name, array in arrays.items()})
    with atomic_write(entry.path) as file:
        np.savez(file, **kept)


def _array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every array, from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shapes[name.removesuffix(".npy")] = read_header(member)[0]
    return shapes


def _find_ending(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next((e for e in entry.endings() if shapes.get(f"latents{e}") == entry.shape), None)


def _kept_arrays(entry: Entry) -> tuple[dict[str, Any], str]:
    """The arrays of an existing file that stay beside the entry, and the key ending that the entry gets."""
    try:
        with np.load(entry.path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, *_DAMAGED):
        arrays = {}
    for ending in {match[2] or "" for key in arrays if (match := _KEY.fullmatch(key))}:
        if not _is_of_same_image(arrays, ending, entry):
            arrays = _without(arrays, ending)
    ending = entry.sized_ending
    if not entry.keys_have_size:
        plain, sized = arrays.get("latents"), arrays.get(f"latents{ending}")
        if sized is None and (plain is None or plain.shape == entry.shape):
            ending = ""
        elif plain is not None and plain.shape == entry.shape:
            ending, arrays = "", _without(arrays, ending)
    return _without(arrays, ending), ending


def _without(arrays: Mapping[str, np.ndarray], ending: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in arrays.items() if not ((match := _KEY.fullmatch(k)) and (match[2] or "") == ending)}


def _is_of_same_image(arrays: Mapping[str, np.ndarray], ending: str, entry: Entry) -> bool:
    recorded = arrays.get(f"identity{ending}")
    if recorded is None or entry.image is None:
        return True
    try:
        return not _image_difference(_parse_identity(recorded), entry.image)
    except _DAMAGED:
        return False


def _identity(entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "version": _VERSION, "image_size": list(entry.image_size), "bucket": list(entry.bucket),
        "resized": list(entry.resized), "interpolation": entry.interpolation, "vae": entry.vae,
    }
    if entry.image is not None:
        status = entry.image.stat()
        facts |= {
            "file_size": status.st_size, "file_mtime_ns": status.st_mtime_ns, "file_sha256": _file_digest(entry.image),
        }
    return facts


def _difference(identity: Mapping[str, Any], entry: Entry) -> str:
    """What the recorded identity says differently, or nothing."""
    wanted = {
        "version": _VERSION, "image_size": list(entry.image_size), "bucket": list(entry.bucket),
        "resized": list(entry.resized), "interpolation": entry.interpolation,
    }
    for name, value in wanted.items():
        if identity.get(name) != value:
            return f"{name} was {identity.get(name)}, is {value}"
    if entry.vae and identity.get("vae") != entry.vae:
        return "made with another VAE"
    return _image_difference(identity, entry.image) if entry.image is not None else ""


def _image_difference(identity: Mapping[str, Any], image: Path) -> str:
    status = image.stat()
    if identity.get("file_size") != status.st_size:
        return "the image file has changed"
    if identity.get("file_mtime_ns") == status.st_mtime_ns or identity.get("file_sha256") == _file_digest(image):
        return ""  # a copied file has another time but the same content
    return "the image file has changed"


def _value_difference(original_size: np.ndarray, ltrb: np.ndarray, entry: Entry) -> str:
    """What can be told about an entry without identity from its own values."""
    if [int(side) for side in original_size] != list(entry.image_size):
        return f"made from an image of {original_size.tolist()}, is {list(entry.image_size)}"
    if not np.allclose(ltrb, crop_ltrb(entry.image_size, entry.bucket), atol=1e-3):
        return "its crop conditioning is different"
    return ""


def _parse_identity(array: np.ndarray) -> dict[str, Any]:
    identity = json.loads(array.astype(np.uint8).tobytes())
    if not isinstance(identity, dict):
        raise ValueError("the recorded identity is not a table")
    return identity


def _digest(array: np.ndarray) -> str:
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(path: Path, reason: str) -> CacheError:
    """Remove a damaged file; the error says what to do."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return CacheError(
        f"{path}: the latent cache is damaged ({reason}); the file has been removed. Start again: it is made anew."
    )
