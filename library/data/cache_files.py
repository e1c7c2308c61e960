"""Latent cache files: names, keys, what an entry was made from, and reading and writing them safely.

A file belongs to one image and holds one entry per latent size. The arrays of an entry share a key ending: none, or
`_<h>x<w>` in latent units. Our entries carry `identity` (JSON: source, geometry, VAE, checksums); entries of other
programs do not.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import Size, crop_ltrb
from library.data.npz_files import (
    DAMAGED,
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
from library.data.records import ImageRecord, LatentSpec

_KEY = re.compile(r"(latents|latents_flipped|original_size|crop_ltrb|alpha_mask|identity)(_\d+x\d+)?")
_VERSION = 1


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
class Terms:
    """What a run asks of its latent caches besides the geometry of each image."""

    vae: str = ""  # identity of the VAE; empty: not compared
    is_trusted: bool = False  # `--skip_cache_check`: origins are not compared


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
    terms: Terms
    shape: tuple[int, int, int]  # latents [C,h,w]
    keys_have_size: bool

    @classmethod
    def of(
        cls, record: ImageRecord, path: Path, spec: LatentSpec, terms: Terms, *, interpolation: str | None,
        wants_flipped: bool, wants_mask: bool,
    ) -> Entry:
        """The entry of a record that has its bucket, in the file `path`."""
        width, height = record.bucket_size
        return cls(
            path=path, image=record.path if record.path is not None and record.path.exists() else None,
            image_size=record.image_size, bucket=record.bucket_size, resized=record.resized_size,
            interpolation=interpolation, wants_flipped=wants_flipped, wants_mask=wants_mask, terms=terms,
            shape=(spec.channels, height // spec.downsample, width // spec.downsample),
            keys_have_size=spec.cache_keys_have_size,
        )

    @property
    def sized_ending(self) -> str:
        """The key ending that names the latent size."""
        return f"_{self.shape[1]}x{self.shape[2]}"

    def endings(self) -> tuple[str, ...]:
        """Key endings under which the entry may be found, in the order of preference."""
        return (self.sized_ending,) if self.keys_have_size else ("", self.sized_ending)

    def required_shapes(self, ending: str, *, is_flipped: bool | None = None) -> dict[str, tuple[int, ...]]:
        """The arrays that must be there, with their shapes; `is_flipped` asks for the flipped latents anyway."""
        shapes: dict[str, tuple[int, ...]] = {
            f"latents{ending}": self.shape, f"original_size{ending}": (2,), f"crop_ltrb{ending}": (4,),
        }
        if self.wants_flipped or is_flipped:
            shapes[f"latents_flipped{ending}"] = self.shape
        if self.wants_mask:
            shapes[f"alpha_mask{ending}"] = (self.bucket[1], self.bucket[0])
        return shapes


def cache_path(image: Path, image_size: Size, suffix: str) -> Path:
    """`<stem>_<W>x<H><suffix>` beside the image, with sizes of at least four digits."""
    return image.with_name(f"{image.stem}_{image_size[0]:04d}x{image_size[1]:04d}{suffix}")


@dataclass(frozen=True)
class ImageFile:
    """Which content of an image file was encoded."""

    size: int  # bytes
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ImageFile:
        """The file as it is now; taken before its pixels are read, a later edit is noticed. Raises OSError."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, _digest(path, status.st_size, status.st_mtime_ns))


def check(entry: Entry) -> tuple[State, str]:
    """Whether the file holds a usable entry, from array headers and the recorded identity; with the reason if not.

    Pixels are not read and checksums not computed; those are verified when an entry is read.
    """
    try:
        with zipfile.ZipFile(entry.path) as archive:
            shapes = array_shapes(archive)
            ending = _find_ending(entry, shapes)
            if ending is None:
                return State.STALE, "no latents of the wanted size"
            for key, shape in entry.required_shapes(ending).items():
                if shapes.get(key) != shape:
                    return State.STALE, f"`{key}` is missing or has the wrong shape"
            if f"identity{ending}" in shapes:
                reason = _difference(parse_identity(read_array(archive, f"identity{ending}")), entry)
                return (State.STALE, reason) if reason else (State.VALID, "")
            original_size, ltrb = (read_array(archive, f"{name}{ending}") for name in ("original_size", "crop_ltrb"))
            reason = _value_difference(original_size, ltrb, entry)
    except FileNotFoundError:
        return State.MISSING, ""
    except (OSError, *DAMAGED) as error:
        return State.DAMAGED, f"unreadable ({error})"
    return (State.STALE, reason) if reason else (State.UNVERIFIED, "")


def read(entry: Entry, *, is_flipped: bool) -> LatentSample:
    """The entry in one orientation, float32, with its checksums verified and its origin compared again.

    Raises SpoiltEntryError naming file and key.
    """
    latents_key = "latents_flipped" if is_flipped else "latents"
    names = [latents_key, "original_size", "crop_ltrb", *(["alpha_mask"] if entry.wants_mask else [])]
    try:
        with zipfile.ZipFile(entry.path) as archive:
            shapes = array_shapes(archive)
            ending = _find_ending(entry, shapes)
            if ending is None:
                width, height = entry.bucket
                raise SpoiltEntryError(entry.path, f"no latents of shape {list(entry.shape)} (bucket {width}x{height})")
            required = entry.required_shapes(ending, is_flipped=is_flipped)
            missing = [name + ending for name in names if shapes.get(name + ending) != required[name + ending]]
            if missing:
                raise SpoiltEntryError(entry.path, f"{', '.join(missing)} missing or of the wrong shape")
            arrays = {name: read_array(archive, name + ending) for name in names}
            recorded = read_array(archive, f"identity{ending}") if f"identity{ending}" in shapes else None
        reason = _unfit(arrays, recorded, entry)
    except FileNotFoundError as error:
        raise SpoiltEntryError(entry.path, "the file is gone") from error
    except CacheError:
        raise
    except (OSError, *DAMAGED) as error:
        raise SpoiltEntryError(entry.path, f"unreadable: {error}") from error
    if reason:
        raise SpoiltEntryError(entry.path, reason)
    width, height = (int(side) for side in arrays["original_size"])
    left, top, right, bottom = (float(value) for value in arrays["crop_ltrb"])
    mask = torch.from_numpy(arrays["alpha_mask"]).float() if entry.wants_mask else None
    latents = torch.from_numpy(arrays[latents_key]).float()
    return LatentSample(latents, (width, height), (left, top, right, bottom), mask)


def write(entry: Entry, cached: CachedLatents, source: ImageFile) -> None:
    """Put the entry, made from `source`, into its file: other sizes of the same image stay, everything else goes.

    The file is replaced in one step; a kill leaves the previous one. Raises OSError when it cannot be written.
    """
    kept, ending = _kept_arrays(entry, source)
    arrays: dict[str, np.ndarray] = {
        "latents": cached.latents.float().cpu().numpy(),
        "original_size": np.array(cached.original_size),
        "crop_ltrb": np.array(cached.crop_ltrb, dtype=np.float64),
    }
    if cached.flipped is not None:
        arrays["latents_flipped"] = cached.flipped.float().cpu().numpy()
    if cached.alpha_mask is not None:
        arrays["alpha_mask"] = cached.alpha_mask.float().cpu().numpy()
    arrays["identity"] = pack_identity(_identity(entry, source), arrays)
    kept.update({name + ending: array for name, array in arrays.items()})
    write_arrays(entry.path, kept)


def _unfit(arrays: Mapping[str, np.ndarray], recorded: np.ndarray | None, entry: Entry) -> str:
    """Why the arrays that were read cannot be used, or nothing."""
    if recorded is not None:
        identity = parse_identity(recorded)
        wrong = mismatch(arrays, identity)
        if wrong is not None:
            return f"`{wrong}` does not match its checksum"
        return "" if entry.terms.is_trusted else _difference(identity, entry)
    for name, array in arrays.items():
        if name not in ("original_size", "crop_ltrb") and array.dtype.kind != "f":
            return f"`{name}` holds {array.dtype}"
        if not np.isfinite(array).all():
            return f"`{name}` holds NaN or infinite values"
    return "" if entry.terms.is_trusted else _value_difference(arrays["original_size"], arrays["crop_ltrb"], entry)


def _find_ending(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next((e for e in entry.endings() if shapes.get(f"latents{e}") == entry.shape), None)


def _kept_arrays(entry: Entry, source: ImageFile) -> tuple[dict[str, Any], str]:
    """The arrays of an existing file that stay beside the entry, and the key ending that the entry gets."""
    try:
        with np.load(entry.path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, *DAMAGED):
        arrays = {}
    for ending in {ending for key in arrays if (ending := _ending_of(key)) is not None}:
        if not _is_sound(arrays, ending, source):
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
    return {key: array for key, array in arrays.items() if _ending_of(key) != ending}


def _ending_of(key: str) -> str | None:
    """The key's ending; None for a key that no entry has."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[2] or ""


def _is_sound(arrays: Mapping[str, np.ndarray], ending: str, source: ImageFile) -> bool:
    """Whether the entry with this key ending is undamaged and of the same image; without identity nobody can tell."""
    if f"identity{ending}" not in arrays:
        return True
    own = {key.removesuffix(ending) if ending else key: arrays[key] for key in arrays if _ending_of(key) == ending}
    try:
        identity = parse_identity(own.pop("identity"))
    except DAMAGED:
        return False
    return identity.get("file_sha256") == source.sha256 and mismatch(own, identity) is None


def _identity(entry: Entry, source: ImageFile) -> dict[str, Any]:
    return {
        "version": _VERSION, "image_size": list(entry.image_size), "bucket": list(entry.bucket),
        "resized": list(entry.resized), "interpolation": entry.interpolation, "vae": entry.terms.vae,
        "file_size": source.size, "file_mtime_ns": source.mtime_ns, "file_sha256": source.sha256,
    }


def _difference(identity: Mapping[str, Any], entry: Entry) -> str:
    """What the recorded identity says differently, or nothing."""
    wanted = {
        "version": _VERSION, "image_size": list(entry.image_size), "bucket": list(entry.bucket),
        "resized": list(entry.resized), "interpolation": entry.interpolation,
    }
    for name, value in wanted.items():
        if identity.get(name) != value:
            return f"{name} was {identity.get(name)}, is {value}"
    if entry.terms.vae and identity.get("vae") != entry.terms.vae:
        return "made with another VAE"
    return _image_difference(identity, entry.image) if entry.image is not None else ""


def _image_difference(identity: Mapping[str, Any], image: Path) -> str:
    try:
        status = image.stat()
        if identity.get("file_size") == status.st_size and (
            identity.get("file_mtime_ns") == status.st_mtime_ns
            or identity.get("file_sha256") == _digest(image, status.st_size, status.st_mtime_ns)
        ):
            return ""  # a copied file has another time but the same content
    except FileNotFoundError:
        return ""  # removed since training began; its latents are what was asked for
    return "the image file has changed"


def _value_difference(original_size: np.ndarray, ltrb: np.ndarray, entry: Entry) -> str:
    """What can be told about an entry without identity from its own values."""
    if [int(side) for side in original_size] != list(entry.image_size):
        return f"made from an image of {original_size.tolist()}, is {list(entry.image_size)}"
    if not np.allclose(ltrb, crop_ltrb(entry.image_size, entry.bucket), atol=1e-3):
        return "its crop conditioning is different"
    return ""


@cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of the file; read once for each size and time that it has."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
