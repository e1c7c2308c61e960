"""Dataset configuration: a TOML/JSON file or folders, over command-line values -> validated frozen records."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from library.config_schema import (
    DATASET_KEYS,
    KEYS,
    SUBSET_KEYS,
    ConfigError,
    DataConfig,
    DatasetConfig,
    Key,
    Kind,
    SubsetConfig,
    SupportedKinds,
    shown,
)
from library.config_sources import (
    folder_configuration,
    read_dataset_file,
    warn_about_ignored_options,
)
from library.config_validation import CheckedDataset, Validator, Values
from library.options.dataset import DatasetOptions

if TYPE_CHECKING:
    from library.data.records import ImageRecord

__all__ = [
    "ConfigError",
    "DataConfig",
    "DatasetConfig",
    "SubsetConfig",
    "SupportedKinds",
    "describe",
    "load_data_config",
    "unsupported_data",
]

logger = logging.getLogger(__name__)

_FOLDER_OPTIONS = {
    "image_dir": "--train_data_dir", "metadata_file": "--in_json", "conditioning_data_dir": "--conditioning_data_dir"
}  # fmt: skip
_SIZE_KEYS = {
    "resolution",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
}


def load_data_config(
    dataset_options: Any,
    supported: SupportedKinds,
    *,
    bucket_step: int,
    resolution_step: int = 8,
    validation_split: float | None = None,
    validation_seed: int | None = None,
) -> DataConfig:
    """The datasets that the options (`options.dataset`) describe, with every value decided.

    A value comes from the first place that has it: subset, dataset, `[general]`, command line, built-in default.
    `bucket_step` is the unit that `bucket_reso_steps` must be a multiple of, `resolution_step` the unit of an
    un-bucketed resolution; `validation_seed` is the option, or `--seed` without it. Raises ConfigError with every
    problem of the source.
    """
    path = getattr(dataset_options, "dataset_config", None)
    if path:
        warn_about_ignored_options(dataset_options)
        raw, source = read_dataset_file(path), str(path)
    else:
        raw, source = folder_configuration(dataset_options, supported)
    validator = Validator(source, supported)
    overrides = {"validation_split": validation_split, "validation_seed": validation_seed}
    command_line = validator.command_line(_option_values(dataset_options) | overrides)
    general, checked = validator.read(raw)
    datasets = []
    for index, entry in enumerate(checked):
        if entry.kind is not None:
            location = f"{source}, datasets[{index}]" if path else ""
            datasets.append(_decide(entry, entry.kind, [general, command_line], location))
    for dataset in datasets:
        if not validator.invalid & _SIZE_KEYS:
            validator.problems += _size_problems(dataset, bucket_step, resolution_step)
        validator.problems += _subset_problems(dataset, from_file=bool(path))
    if validator.problems:
        raise ConfigError(validator.problems)
    if path:
        _warn_about_overruled(dataset_options, general, checked, source)
    for dataset in datasets:
        _warn(dataset)
    return DataConfig(tuple(_align_bucket_range(dataset) for dataset in datasets), source, from_file=bool(path))


def unsupported_data(config: DataConfig) -> list[str]:
    """One sentence if subsets ask for what does not work yet."""
    asking = [subset for dataset in config.datasets for subset in dataset.subsets if subset.validation_split > 0]
    if not asking:
        return []
    more = f" (and {len(asking) - 1} more)" if len(asking) > 1 else ""
    return [
        f"{asking[0].location}{more}: validation_split = {asking[0].validation_split:g}: validation is not supported "
        "yet, and these images would not be trained; leave the key out."
    ]


def describe(config: DataConfig, records: Sequence[Sequence[ImageRecord]]) -> str:
    """A text for the log: every dataset with its settings, every subset with its options and its images.

    `records[i]` are those of dataset i.
    """
    lines = [f"{len(config.datasets)} dataset(s) from {config.source}"]
    for index, (dataset, images) in enumerate(zip(config.datasets, records, strict=True)):
        width, height = dataset.resolution
        lines.append(f"[dataset {index}] {dataset.kind}")
        lines.append(f"  batch_size: {dataset.batch_size}, resolution: {width}x{height}")
        lines.append(f"  resize_interpolation: {dataset.resize_interpolation or 'area or lanczos'}")
        if dataset.enable_bucket and dataset.bucket_no_upscale:
            lines.append(f"  buckets: sizes of the images, steps of {dataset.bucket_reso_steps}, no upscaling")
        elif dataset.enable_bucket:
            limits = f"{dataset.min_bucket_reso} to {dataset.max_bucket_reso}"
            lines.append(f"  buckets: {limits}, steps of {dataset.bucket_reso_steps}")
        else:
            lines.append("  buckets: off")
        if dataset.network_multiplier != 1:
            lines.append(f"  network_multiplier: {dataset.network_multiplier}")
        counts = Counter(record.subset_index for record in images)
        for number, subset in enumerate(dataset.subsets):
            place = subset.image_dir or subset.metadata_file
            lines.append(f"  [subset {number}] {counts[number]} images x {subset.num_repeats} repeats in {place}")
            lines += [f"    {name}: {value!r}" for name, value in _changed_values(subset).items()]
    return "\n".join(lines)


def _changed_values(subset: SubsetConfig) -> dict[str, Any]:
    default = SubsetConfig()
    shown_already = ("kind", "image_dir", "num_repeats", "location")
    values = {item.name: getattr(subset, item.name) for item in fields(subset) if item.name not in shown_already}
    if not subset.validation_split:
        del values["validation_seed"]
    return {name: value for name, value in values.items() if (value or None) != (getattr(default, name) or None)}


def _warn_about_overruled(options: Any, general: Values, checked: list[CheckedDataset], source: str) -> None:
    """One warning for the given options that all datasets, or all subsets, of the file set otherwise."""
    default = DatasetOptions()
    overruled = []
    for name, key in KEYS.items():
        given = getattr(options, key.option, None) if key.option else None
        if given is None or given == getattr(default, key.option or "", None):
            continue
        layers = [{**general, **entry.values} for entry in checked]
        if name not in DATASET_KEYS:
            layers = [{**layer, **own} for layer, entry in zip(layers, checked, strict=True) for own in entry.subsets]
        if layers and all(layer.get(name) not in (None, given) for layer in layers):
            overruled.append(f"--{key.option}")
    if overruled:
        logger.warning("%s has no effect: %s sets it, which counts", ", ".join(overruled), source)


def _option_values(options: Any) -> dict[str, Any]:
    values = {name: getattr(options, key.option, None) for name, key in KEYS.items() if key.option}
    misspelt = getattr(options, "caption_extention", None)
    return values | ({"caption_extension": misspelt} if misspelt else {})


# --- from layers to records -----------------------------------------------------------------------------------


def _decide(entry: CheckedDataset, kind: Kind, wider: list[Values], location: str) -> DatasetConfig:
    """The dataset with each value from the nearest layer; a missing resolution becomes (0, 0).

    `location` is the place in the dataset file; without one, the directories name the subsets in messages.
    """
    layers = [entry.values, *wider]
    subsets = tuple(
        SubsetConfig(
            kind=kind,
            location=f"{location}.subsets[{index}]" if location else own.get("image_dir") or own["metadata_file"],
            **_first(SUBSET_KEYS, kind, [own, *layers]),
        )
        for index, own in enumerate(entry.subsets)
    )
    values: Values = {"resolution": (0, 0)} | _first(DATASET_KEYS, kind, layers)
    return DatasetConfig(kind=kind, location=location or "command line", subsets=subsets, **values)


def _first(keys: Mapping[str, Key], kind: Kind, layers: list[Values]) -> Values:
    """For each key that the kind has, the first value that is present; `false`, `0` and `""` are present."""
    values: Values = {}
    for name, key in keys.items():
        if kind in key.kinds:
            values |= next(({name: layer[name]} for layer in layers if layer.get(name) is not None), {})
    return values


# --- checks of the whole --------------------------------------------------------------------------------------


def _subset_problems(dataset: DatasetConfig, *, from_file: bool) -> list[str]:
    problems: list[str] = []
    for subset in dataset.subsets:
        if subset.num_repeats > 0:
            problems += _missing_places(subset, from_file=from_file)
        if subset.kind == "controlnet" and subset.random_crop:
            problems.append(f"{subset.location}: random_crop cannot be used with conditioning_data_dir")
        if subset.face_crop_aug_range and dataset.enable_bucket:
            problems.append(f"{subset.location}: face_crop_aug_range works only with enable_bucket = false")
    if dataset.kind == "controlnet":
        problems += _repeated_directories(dataset)
    return problems


def _size_problems(dataset: DatasetConfig, bucket_step: int, resolution_step: int) -> list[str]:
    where, (width, height), steps = dataset.location, dataset.resolution, dataset.bucket_reso_steps
    if not width:
        return [f"{where}: resolution is required: give --resolution, or set it in [general] or [[datasets]]"]
    if not dataset.enable_bucket:
        if width % resolution_step or height % resolution_step:
            size = f"resolution {width}x{height}"
            return [f"{where}: {size} must be divisible by {resolution_step} when enable_bucket is false"]
        return []
    problems = []
    if steps % bucket_step:
        problems.append(f"{where}: bucket_reso_steps {steps} must be a multiple of {bucket_step} for this model")
    if not dataset.bucket_no_upscale:
        aligned = _align_bucket_range(dataset)
        low, high = aligned.min_bucket_reso, aligned.max_bucket_reso
        if low > min(width, height):
            side = f"the smallest side of resolution {width}x{height}"
            problems.append(f"{where}: min_bucket_reso {low} must not exceed {side}; lower it")
        if high < max(width, height):
            side = f"the largest side of resolution {width}x{height}"
            problems.append(f"{where}: max_bucket_reso {high} must be at least {side}; raise it")
    return problems


def _align_bucket_range(dataset: DatasetConfig) -> DatasetConfig:
    """Minimum lowered and maximum raised to multiples of the steps (the minimum to one step at least)."""
    if not dataset.enable_bucket:
        return dataset
    steps = dataset.bucket_reso_steps
    low = max(steps, dataset.min_bucket_reso // steps * steps)
    high = -(-dataset.max_bucket_reso // steps) * steps
    return replace(dataset, min_bucket_reso=low, max_bucket_reso=high)


def _missing_places(subset: SubsetConfig, *, from_file: bool) -> list[str]:
    def named(key: str) -> str:
        return f"{subset.location}.{key}" if from_file else _FOLDER_OPTIONS[key]

    problems = []
    for name in ("image_dir", "conditioning_data_dir"):
        folder = getattr(subset, name)
        if folder is not None and not os.path.isdir(folder):
            problems.append(f"{named(name)}: there is no such directory: {_shown(folder)}")
    if subset.metadata_file is not None and not os.path.isfile(subset.metadata_file):
        problems.append(f"{named('metadata_file')}: there is no such file: {_shown(subset.metadata_file)}")
    return problems


def _shown(path: str) -> str:
    name = path if path.isprintable() and len(path) <= 1000 else shown(path)
    return name if os.path.isabs(path) else f"{name} (relative to the working directory {os.getcwd()})"


def _repeated_directories(dataset: DatasetConfig) -> list[str]:
    seen: dict[str, SubsetConfig] = {}
    problems = []
    for subset in dataset.subsets:
        if subset.image_dir is None or subset.num_repeats < 1:
            continue
        first = seen.setdefault(os.path.realpath(subset.image_dir), subset)
        if first is not subset:
            place = _shown(subset.image_dir)
            problems.append(f"{subset.location}: duplicate image_dir {place}, already in {first.location}")
    return problems


def _warn(dataset: DatasetConfig) -> None:
    """Warnings about settings that do something else than they say."""
    aligned = _align_bucket_range(dataset)
    if not dataset.bucket_no_upscale:
        for name in ("min_bucket_reso", "max_bucket_reso"):
            given, used, steps = getattr(dataset, name), getattr(aligned, name), dataset.bucket_reso_steps
            if given != used:
                message = "%s: %s %d is not a multiple of bucket_reso_steps %d; using %d"
                logger.warning(message, dataset.location, name, given, steps, used)
    for subset in dataset.subsets:
        if (subset.keep_tokens > 0 or subset.keep_tokens_separator) and not subset.processes_tags:
            logger.warning(
                "%s: keep_tokens and keep_tokens_separator do nothing without shuffle_caption, token_warmup_step or "
                "caption_tag_dropout_rate; a separator in a caption stays there and is trained",
                subset.location,
            )
