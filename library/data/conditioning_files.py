"""Conditioning and mask images of ControlNet-type datasets: exactly one for each training image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.config_schema import DatasetConfig
from library.data.image_files import BadImagesError, list_images, read_image_sizes
from library.data.records import ImageRecord
from library.options.errors import UserError


def pair_conditioning_images(dataset: DatasetConfig, records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The records with `conditioning_path`: the file of the same stem in their subset's `conditioning_data_dir`.

    Raises UserError that lists images without a partner, partners without an image and, with bucketing, partners
    of another size; BadImagesError for partners that cannot be read.
    """
    partners: dict[str, str] = {}  # absolute path without ending -> file
    for subset in dataset.subsets:
        if subset.num_repeats > 0 and subset.conditioning_data_dir is not None:
            for path in list_images(subset.conditioning_data_dir):
                partners.setdefault(_stem(path), path)
    paired, missing, used = [], [], set()
    for record in records:
        folder = dataset.subsets[record.subset_index].conditioning_data_dir
        stem = os.path.join(os.path.abspath(folder or ""), os.path.splitext(os.path.basename(record.key))[0])
        if stem in partners:
            used.add(stem)
            paired.append(replace(record, conditioning_path=Path(os.path.abspath(partners[stem]))))
        else:
            missing.append(f"{record.key}: no conditioning image of this name in {folder}")
    extra = [f"{path}: no training image has this name" for stem, path in partners.items() if stem not in used]
    if missing or extra:
        raise UserError([f"{dataset.location}: images and conditioning images do not match", *missing, *extra])
    sizes, bad = read_image_sizes(str(record.conditioning_path) for record in paired)
    if bad:
        raise BadImagesError(bad)
    if dataset.enable_bucket:
        _check_sizes(paired, sizes)
    return paired


def _stem(path: str) -> str:
    return os.path.splitext(os.path.abspath(path))[0]


def _check_sizes(records: Sequence[ImageRecord], sizes: dict[str, tuple[int, int]]) -> None:
    problems = []
    for record in records:
        own, partner = record.image_size, sizes[str(record.conditioning_path)]
        if own != partner:
            problems.append(
                f"{record.conditioning_path}: size of conditioning image is not match: {partner[0]}x{partner[1]}, "
                f"but {record.key} has {own[0]}x{own[1]} pixels; with enable_bucket they must be equal"
            )
    if problems:
        raise UserError(problems)
