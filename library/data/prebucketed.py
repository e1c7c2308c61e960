"""Metadata datasets whose latents an older tool chain prepared: `train_resolution` and `<stem>.npz` for every image."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from library.config_schema import DatasetConfig, SubsetConfig
from library.data.buckets import cover
from library.data.cache_files import Entry, Terms, check
from library.data.metadata_file import ImageLocator, MetadataEntry, merge_caption, without_image_ending
from library.data.npz_files import DAMAGED, USABLE, array_shapes, read_array
from library.data.records import ImageRecord, LatentSpec
from library.options.errors import UserError

logger = logging.getLogger(__name__)

Entries = Sequence[tuple[int, SubsetConfig, list[MetadataEntry]]]  # subset index, subset, its metadata


def prepared_records(dataset: DatasetConfig, subsets: Entries, spec: LatentSpec) -> list[ImageRecord] | None:
    """The records of a dataset that trains from prepared latents in their own buckets; images may be absent.

    None when not all images have a `train_resolution` and a fitting `<stem>.npz`, or when pixels change with every
    fetch: the dataset is then like any other. Raises UserError with `bucket_no_upscale`, which such buckets exclude.
    """
    entries = [entry for _, _, found in subsets for entry in found]
    if not entries or not all(entry.train_resolution for entry in entries):
        return None
    records, unfit = [], []
    for index, subset, found in subsets:
        locator = ImageLocator(subset, None)
        for entry in found:
            record, reason = _prepared(entry, subset, index, locator, spec)
            records.append(record)
            unfit += [reason] if reason else []
    if len(unfit) == len(records):
        return None
    changing = [name for name in ("color_aug", "random_crop") for _, subset, _ in subsets if getattr(subset, name)]
    if unfit or changing:
        reason = f"{changing[0]} changes the images" if changing else f"{len(unfit)} images lack them: {unfit[0]}"
        logger.warning("%s: latents prepared by an older tool are ignored, because %s", dataset.location, reason)
        return None
    if dataset.bucket_no_upscale:
        raise UserError(
            f"{dataset.location}: bucket_no_upscale cannot be used with prepared latents, whose buckets are fixed "
            f"(train_resolution in {subsets[0][1].metadata_file}, {records[0].latents_path}); leave it out"
        )
    logger.warning(
        "%s: training from prepared latents (%d files like %s) in the buckets of train_resolution; which model made "
        "them is not recorded", dataset.location, len(records), records[0].latents_path,
    )  # fmt: skip
    return records


def _prepared(
    entry: MetadataEntry, subset: SubsetConfig, index: int, locator: ImageLocator, spec: LatentSpec
) -> tuple[ImageRecord, str]:
    """The record, and why its latents cannot be used, or nothing."""
    record = ImageRecord(
        key=entry.key, path=None, caption=merge_caption(entry, subset), subset_index=index,
        num_repeats=subset.num_repeats, train_resolution=entry.train_resolution,
    )  # fmt: skip
    bucket = entry.train_resolution
    if bucket is None:
        return record, f"{entry.key} has no train_resolution"
    try:
        place = locator.place_of(entry.key)
    except ValueError as error:
        return record, str(error)
    latents = Path(os.path.abspath(without_image_ending(place) + ".npz"))
    record.path = Path(os.path.abspath(locator.image_at(place) or place))
    record.latents_path = latents
    try:
        record.image_size = _recorded_size(latents, bucket, spec)
        placement = cover(record.image_size, bucket)
    except FileNotFoundError:
        return record, f"there is no {latents}"
    except (OSError, *DAMAGED) as error:
        return record, f"{latents} cannot be read ({error})"
    record.bucket_size, record.resized_size = bucket, placement.resized
    wanted = Entry.of(
        record, latents, spec, Terms(), interpolation=subset.resize_interpolation, wants_flipped=subset.flip_aug,
        wants_mask=subset.alpha_mask,
    )  # fmt: skip
    state, reason = check(wanted)
    return record, "" if state in USABLE else f"{latents}: {reason}"


def _recorded_size(latents: Path, bucket: tuple[int, int], spec: LatentSpec) -> tuple[int, int]:
    """(width, height) of the image that the latents were made from. Raises OSError or one of DAMAGED."""
    sized = f"original_size_{bucket[1] // spec.downsample}x{bucket[0] // spec.downsample}"
    with zipfile.ZipFile(latents) as archive:
        shapes = array_shapes(archive)
        names = [name for name in ("original_size", sized) if name in shapes]
        if not names:
            raise ValueError("it has no `original_size`")
        width, height = (int(side) for side in read_array(archive, names[-1]))
    return width, height
