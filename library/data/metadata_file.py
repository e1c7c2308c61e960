"""Metadata files of fine-tuning datasets (`metadata_file`, `--in_json`): their entries, captions and images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config_schema import SubsetConfig
from library.data.image_files import image_suffixes
from library.options.errors import UserError

_SIZES = ("image_size", "train_resolution")


@dataclass(frozen=True)
class MetadataEntry:
    """One image of a metadata file; sizes are (width, height) as the file says."""

    key: str
    caption: str | None = None
    tags: str | None = None
    image_size: tuple[int, int] | None = None
    train_resolution: tuple[int, int] | None = None  # the bucket that an older tool has put the image into


@dataclass(frozen=True)
class LocatedImage:
    """Where an entry's image is. Without an image file, `latents_path` names the cache that replaces it."""

    path: str
    latents_path: str | None = None
    size_from_cache: tuple[int, int] | None = None


def read_metadata_file(path: str) -> list[MetadataEntry]:
    """The entries in the file's order: `.jsonl` has one object per line, everything else is one JSON object.

    Raises UserError that lists every malformed entry with the file's name.
    """
    entries, problems = [], []
    for key, value in _raw_entries(path):
        problem = _entry_problem(value)
        if problem:
            problems.append(f"{path}: {key}: {problem}")
        else:
            sizes = (tuple(size) if size else None for size in map(value.get, _SIZES))
            entries.append(MetadataEntry(key, value.get("caption"), value.get("tags"), *sizes))
    if problems:
        raise UserError(problems)
    return entries


def merge_caption(entry: MetadataEntry, subset: SubsetConfig) -> str:
    """The stored caption: caption and tags joined by `caption_separator`.

    With `enable_wildcard` every non-blank line gets the tags, otherwise the first line, which is the one used.
    """
    separator = subset.caption_separator
    lines = (entry.caption or "").split("\n")
    if subset.enable_wildcard:
        lines = [line for line in lines if line.strip()]
        tags = (entry.tags or "").replace("\n", separator)
        return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines) if lines else tags
    tags = entry.tags or ""
    if tags:
        lines[0] = f"{lines[0]}{separator}{tags}" if lines[0] or len(lines) > 1 else tags
    return "\n".join(lines)


class ImageLocator:
    """Finds the image file of metadata keys below one `image_dir`, listing each directory once."""

    def __init__(self, subset: SubsetConfig, latents_suffix: str | None) -> None:
        self._image_dir = subset.image_dir
        self._latents_suffix = latents_suffix
        self._listings: dict[str, dict[str, list[str]]] = {}

    def locate(self, key: str) -> LocatedImage:
        """The file of a key: absolute, relative to `image_dir`, or a stem without its ending.

        Raises ValueError that names the key and where it was looked for.
        """
        path = self.place_of(key)
        image = self.image_at(path)
        located = LocatedImage(image) if image is not None else self._cached_latents(path)
        if located is None:
            raise ValueError(f"{path}: there is no image for the metadata key {key!r}")
        return located

    def place_of(self, key: str) -> str:
        """The key as a path, with or without an ending. Raises ValueError if only `image_dir` could tell."""
        if os.path.isabs(key):
            return key
        if self._image_dir is None:
            raise ValueError(f"{key}: the key is a relative path; give image_dir (--train_data_dir)")
        return os.path.join(self._image_dir, key)

    def image_at(self, path: str) -> str | None:
        """The file of that name, or else of that name and the first known ending."""
        if os.path.isfile(path):
            return path
        folder, name = os.path.split(path)
        known = [
            (image_suffixes().index(suffix), candidate)
            for candidate in self._listing(folder).get(name, [])
            if (suffix := os.path.splitext(candidate)[1].lower()) in image_suffixes()
        ]
        return os.path.join(folder, min(known)[1]) if known else None

    def _cached_latents(self, path: str) -> LocatedImage | None:
        if self._latents_suffix is None:
            return None
        folder, name = os.path.split(path)
        stem = os.path.basename(without_image_ending(path))
        pattern = re.compile(re.escape(stem) + r"_(\d{4,})x(\d{4,})" + re.escape(self._latents_suffix))
        for candidate in sorted(file for files in self._listing(folder).values() for file in files):
            if match := pattern.fullmatch(candidate):
                size = (int(match[1]), int(match[2]))
                return LocatedImage(os.path.join(folder, name), os.path.join(folder, candidate), size)
        return None

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """Stem -> file names."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            names = os.listdir(folder) if os.path.isdir(folder) else []
            for name in names:
                listing.setdefault(os.path.splitext(name)[0], []).append(name)
            self._listings[folder] = listing
        return self._listings[folder]


def without_image_ending(path: str) -> str:
    """The path without the ending of an image format, if it has one; other dots are part of the name."""
    base, ending = os.path.splitext(path)
    return base if ending.lower() in image_suffixes() else path


def _raw_entries(path: str) -> Iterator[tuple[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the metadata file is not UTF-8 text ({error})") from error
    if not path.lower().endswith(".jsonl"):
        content = _parse(text, path) if text.strip() else {}
        if not isinstance(content, dict):
            raise UserError(f"{path}: the metadata file must hold one object whose keys are the images")
        yield from content.items()
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value = _parse(line, f"{path}, line {number}")
            if not isinstance(value, dict) or not isinstance(value.get("image_path"), str):
                raise UserError(f"{path}, line {number}: an object with the text `image_path` is expected")
            yield value["image_path"], value


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error


def _entry_problem(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"an object is expected, got {value!r}"
    for name in ("caption", "tags"):
        if value.get(name) is not None and not isinstance(value[name], str):
            return f"`{name}` must be a text, got {value[name]!r}"
    for name in _SIZES:
        size = value.get(name)
        is_pair = isinstance(size, list) and len(size) == 2
        if size is not None and not (is_pair and all(type(side) is int and side > 0 for side in size)):
            return f"`{name}` must be [width, height], got {size!r}"
    return ""
