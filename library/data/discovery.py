"""From a dataset's configuration to its image records: files, captions, sizes, repeats, validation split."""

from __future__ import annotations

import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data.caption_files import read_captions
from library.data.conditioning_files import pair_conditioning_images
from library.data.image_files import BadImagesError, decode_images, list_images, read_image_sizes
from library.data.info_cache import FILE_NAME, read_info_cache, write_info_cache
from library.data.metadata_file import (
    ImageLocator,
    MetadataEntry,
    merge_caption,
    read_metadata_file,
)
from library.data.prebucketed import prepared_records
from library.data.records import ImageRecord, LatentSpec
from library.options.errors import UserError

logger = logging.getLogger(__name__)

Found = dict[str, tuple[str, tuple[int, int]]]  # image path -> (caption, (width, height))


@dataclass(frozen=True)
class DatasetRecords:
    """The two parts of one dataset; regularisation images are in `training`, with balanced repeats."""

    training: list[ImageRecord]
    validation: list[ImageRecord]


@dataclass(frozen=True)
class Surroundings:
    """What discovery needs beside the configuration.

    `latent` (a family's) lets metadata entries without an image file use its latent caches; only the main process
    writes `metadata_cache.json`.
    """

    latent: LatentSpec | None = None
    is_main_process: bool = True


def discover(
    dataset: DatasetConfig, dataset_index: int, surroundings: Surroundings | None = None
) -> list[ImageRecord]:
    """The records that a dataset trains with: `discover_parts(...).training`."""
    return discover_parts(dataset, dataset_index, surroundings).training


def discover_parts(
    dataset: DatasetConfig, dataset_index: int, surroundings: Surroundings | None = None
) -> DatasetRecords:
    """Training and validation records of one dataset, ready for bucketing.

    Raises BadImagesError that lists every unusable file, UserError when nothing is left to train with.
    """
    records = find_images(dataset, surroundings or Surroundings())
    if all(record.is_reg for record in records):
        places = ", ".join(str(subset.image_dir or subset.metadata_file) for subset in dataset.subsets)
        raise UserError(f"No data found: datasets[{dataset_index}] ({dataset.location}) has no images in {places}")
    training, validation = split_validation(dataset, records)
    return DatasetRecords(balance_regularization(training), validation)


def discover_all(config: DataConfig, surroundings: Surroundings | None = None) -> list[DatasetRecords]:
    """`discover_parts` of every dataset, with one report of the unusable files of all.

    Raises UserError also when the validation split leaves nothing to train with.
    """
    found: list[DatasetRecords] = []
    bad: dict[str, str] = {}
    for index, dataset in enumerate(config.datasets):
        try:
            found.append(discover_parts(dataset, index, surroundings))
        except BadImagesError as error:
            bad |= error.files
    if bad:  # the run ends here, so take the time to find files with a good header and a broken body too
        folders = {subset.image_dir for dataset in config.datasets for subset in dataset.subsets if subset.image_dir}
        listed = [path for directory in sorted(folders) for path in list_images(directory)]
        raise BadImagesError(bad | decode_images([path for path in listed if path not in bad])[1])
    if not any(parts.training for parts in found):
        raise UserError(f"No data found: validation_split leaves no image of {config.source} for training")
    return found


def find_images(dataset: DatasetConfig, surroundings: Surroundings) -> list[ImageRecord]:
    """Every image of every subset, in subset order, before splitting and balancing."""
    records: list[ImageRecord] = []
    bad: dict[str, str] = {}
    active = list(_active_subsets(dataset))
    entries = {index: _entries(subset) for index, subset in active if subset.kind == "fine_tuning"}
    if entries and surroundings.latent is not None:
        tables = [(index, subset, entries[index]) for index, subset in active]
        prepared = prepared_records(dataset, tables, surroundings.latent)
        if prepared is not None:
            return _unique(prepared, dataset)
    for index, subset in active:
        if subset.kind == "fine_tuning":
            found, unusable = _metadata_records(subset, index, entries[index], surroundings)
        else:
            found, unusable = _directory_records(subset, index, surroundings)
        if not found and not unusable:
            place = subset.image_dir if subset.kind != "fine_tuning" else subset.metadata_file
            logger.warning("%s: no images in %s (sub-directories are not searched); ignored", subset.location, place)
        if (subset.caption_prefix or subset.caption_suffix) and any("\n" in record.caption for record in found):
            message = "%s: caption_prefix and caption_suffix are added to whichever line of a caption is used"
            logger.info(message, subset.location)
        records += found
        bad |= unusable
    if bad:
        raise BadImagesError(bad)
    return pair_conditioning_images(dataset, records) if dataset.kind == "controlnet" else _unique(records, dataset)


def _active_subsets(dataset: DatasetConfig) -> Iterable[tuple[int, SubsetConfig]]:
    seen: dict[str, SubsetConfig] = {}
    for index, subset in enumerate(dataset.subsets):
        place = subset.metadata_file if subset.kind == "fine_tuning" else subset.image_dir
        if subset.num_repeats < 1:
            logger.warning("%s: ignored because num_repeats is 0: %s", subset.location, place)
            continue
        first = seen.setdefault(os.path.realpath(place or ""), subset)
        if first is not subset:
            logger.warning("%s: ignored because %s is already in %s", subset.location, place, first.location)
            continue
        yield index, subset


# --- directories of images ------------------------------------------------------------------------------------


def _directory_records(
    subset: SubsetConfig, index: int, surroundings: Surroundings
) -> tuple[list[ImageRecord], dict[str, str]]:
    found, bad = _directory_images(subset, surroundings)
    absolute = {path: os.path.abspath(path) for path in found}
    records = [
        ImageRecord(
            key=absolute[path],
            path=Path(absolute[path]),
            caption=caption,
            subset_index=index,
            num_repeats=subset.num_repeats,
            is_reg=subset.is_reg,
            image_size=size,
        )
        for path, (caption, size) in found.items()
    ]
    return records, bad


def _directory_images(subset: SubsetConfig, surroundings: Surroundings) -> tuple[Found, dict[str, str]]:
    image_dir = subset.image_dir or ""
    paths = list_images(image_dir)
    remembered = read_info_cache(image_dir) if subset.cache_info else None
    if remembered is not None:
        return _remembered_images(subset, remembered, listed=len(paths))
    _report_mixed_case(subset, paths)
    sizes, bad_images = read_image_sizes(paths)
    captions, bad_captions = read_captions(subset, paths)
    found = {path: (captions[path], sizes[path]) for path in paths if path in captions and path in sizes}
    bad = bad_images | bad_captions
    if subset.cache_info and surroundings.is_main_process and found and not bad:
        write_info_cache(image_dir, found)
    return found, bad


def _remembered_images(subset: SubsetConfig, remembered: Found, *, listed: int) -> tuple[Found, dict[str, str]]:
    """The images and captions of `metadata_cache.json`; sizes are those of the files."""
    place = os.path.join(subset.image_dir or "", FILE_NAME)
    logger.info("%s: images and captions are taken from %s", subset.location, place)
    if listed != len(remembered):
        message = "%s: %s lists %d images, but the directory holds %d; delete the file to have it rebuilt"
        logger.warning(message, subset.location, place, len(remembered), listed)
    sizes, bad = read_image_sizes(remembered)
    changed = [path for path in sizes if sizes[path] != remembered[path][1]]
    if changed:
        message = "%s: %d images have another size than %s says (the files are right), e.g. %s"
        logger.warning(message, subset.location, len(changed), place, changed[0])
    return {path: (remembered[path][0], size) for path, size in sizes.items()}, bad


def _report_mixed_case(subset: SubsetConfig, paths: Sequence[str]) -> None:
    endings = [os.path.splitext(path)[1] for path in paths]
    mixed = sum(ending not in (ending.lower(), ending.upper()) for ending in endings)
    if mixed:
        message = "%s: %d images are used whose file name ending has mixed case, such as .Jpg"
        logger.info(message, subset.location, mixed)


# --- metadata files -------------------------------------------------------------------------------------------


def _entries(subset: SubsetConfig) -> list[MetadataEntry]:
    """In order of descending key length (stable)."""
    entries = sorted(read_metadata_file(subset.metadata_file or ""), key=lambda entry: -len(entry.key))
    _report_joined_tags(subset, entries)
    return entries


def _metadata_records(
    subset: SubsetConfig, index: int, entries: Sequence[MetadataEntry], surroundings: Surroundings
) -> tuple[list[ImageRecord], dict[str, str]]:
    """Records in the order of the entries."""
    latent = surroundings.latent
    locator = ImageLocator(subset, None if latent is None else latent.cache_suffix)
    located, bad = {}, {}
    for entry in entries:
        try:
            located[entry.key] = locator.locate(entry.key)
        except ValueError as error:
            bad[entry.key] = str(error)
    sizes, unreadable = read_image_sizes(image.path for image in located.values() if image.latents_path is None)
    records = []
    for entry in entries:
        image = located.get(entry.key)
        if image is None or image.path in unreadable:
            continue
        records.append(
            ImageRecord(
                key=entry.key,
                path=Path(os.path.abspath(image.path)),
                caption=merge_caption(entry, subset),
                subset_index=index,
                num_repeats=subset.num_repeats,
                image_size=sizes.get(image.path) or entry.image_size or image.size_from_cache or (0, 0),
                latents_path=None if image.latents_path is None else Path(os.path.abspath(image.latents_path)),
            )
        )
    return records, bad | unreadable


def _report_joined_tags(subset: SubsetConfig, entries: Sequence[MetadataEntry]) -> None:
    if not subset.enable_wildcard and any(entry.tags and "\n" in (entry.caption or "") for entry in entries):
        logger.info("%s: tags are added to the first line of captions, which is the one used", subset.location)


def _unique(records: Sequence[ImageRecord], dataset: DatasetConfig) -> list[ImageRecord]:
    """The records; a key that an earlier metadata file has too is prefixed by its own file."""
    owners: dict[str, int] = {}
    return [
        record
        if owners.setdefault(record.key, record.subset_index) == record.subset_index
        else replace(record, key=f"{dataset.subsets[record.subset_index].metadata_file}:{record.key}")
        for record in records
    ]


# --- arithmetic on records ------------------------------------------------------------------------------------


def split_validation(
    dataset: DatasetConfig, records: Sequence[ImageRecord]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(training, validation): per subset, the images sorted by key and shuffled by `validation_seed` (0 if unset);
    the first ceil(n (1 - validation_split)) train, the others validate with one repeat each.

    Regularisation images always train.
    """
    training: list[ImageRecord] = []
    validation: list[ImageRecord] = []
    for index, subset in enumerate(dataset.subsets):
        own = [record for record in records if record.subset_index == index]
        if subset.is_reg or subset.validation_split <= 0:
            training += own
            continue
        own.sort(key=lambda record: record.key)
        random.Random(subset.validation_seed or 0).shuffle(own)
        count = math.ceil(len(own) * (1 - subset.validation_split))
        if own and count == 0:
            logger.warning("%s: validation_split leaves no image for training", subset.location)
        training += own[:count]
        validation += [replace(record, num_repeats=1) for record in own[count:]]
    return training, validation


def balance_regularization(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Training images, then regularisation images repeated until they count as much as the training images do.

    The first pass takes each with its own repeats until the count is reached; further passes add one to each.
    """
    training = [record for record in records if not record.is_reg]
    regularization = [record for record in records if record.is_reg]
    wanted = sum(record.num_repeats for record in training)
    used: list[ImageRecord] = []
    count = 0
    for record in regularization:
        if count >= wanted:
            break
        used.append(record)
        count += record.num_repeats
    if len(used) < len(regularization):
        message = "%d of %d regularisation images are not used: the training images count only %d (with repeats)"
        logger.warning(message, len(regularization) - len(used), len(regularization), wanted)
    if count < wanted and used:
        every, rest = divmod(wanted - count, len(used))
        used = [
            replace(record, num_repeats=record.num_repeats + every + (position < rest))
            for position, record in enumerate(used)
        ]
    return training + used


def tag_frequency(dataset: DatasetConfig, records: Sequence[ImageRecord]) -> dict[str, dict[str, int]]:
    """Name of the image directory (or metadata file) -> tag -> number of images, without repeats (`ss_tag_frequency`).

    Tags are the comma-separated parts of captions, lower-cased; of metadata files only the tags count.
    """
    counters: dict[str, Counter[str]] = {}
    for index, subset in enumerate(dataset.subsets):
        keys = {record.key for record in records if record.subset_index == index}
        if not keys:
            continue
        if subset.metadata_file is not None:
            name = Path(subset.metadata_file).name
            texts = [entry.tags or "" for entry in read_metadata_file(subset.metadata_file)]
        else:
            name = Path(os.path.abspath(subset.image_dir or "")).name
            texts = [record.caption for record in records if record.subset_index == index]
        counter = counters.setdefault(name, Counter())
        for text in texts:
            counter.update(tag for part in text.split(",") if (tag := part.strip().lower()))
    return {name: dict(counter) for name, counter in counters.items()}
