"""The `ss_*` entries of saved networks: how they were trained, as other programs look it up."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config_schema import DatasetConfig, SubsetConfig
from library.data.metadata_file import read_metadata_file
from library.hashes import file_sha256, legacy_file_hash
from library.model_spec import CHECKPOINT, model_spec, program_revision
from library.optimizers import is_schedule_free

if TYPE_CHECKING:
    from library.data.dataset import BucketDataset, DatasetGroup
    from library.data.records import ImageRecord
    from library.methods.base import TrainingMethod
    from library.options import Options

#: What `--no_metadata` leaves.
MINIMUM_KEYS = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip

#: Settings of subsets that have entries of their own.
_SUBSET_SETTINGS = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
_SUBSET_SETTINGS_OF_ALL_FILES = (
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "face_crop_aug_range",
    "resize_interpolation",
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """What a run knows only after its set-up."""

    started_at: float  # Unix time
    seed: int
    batches_per_epoch: int  # per process
    epochs: int  # planned
    max_steps: int
    optimizer: str  # module.Class
    optimizer_args: str  # "k=v,k=v" or empty
    learning_rate: float | None  # None: the optimizer finds its own
    lr_scheduler: str
    group_learning_rates_removed: bool = False
    num_processes: int = 1
    num_validation_images: int = 0
    session_id: int = field(default_factory=lambda: random.SystemRandom().randint(0, 2**32))


class TrainingMetadata:
    """The metadata of every file that one run saves. What stays the same is computed here; model files are hashed."""

    def __init__(self, options: Options, group: DatasetGroup, method: TrainingMethod, facts: RunFacts) -> None:
        self._options = options
        self._method = method
        self._base: dict[str, str] = {}
        self._resolution = trained_resolution(group)
        if method.writes_training_metadata:
            further = method.family.model_metadata() | method.metadata()
            self._base = training_metadata(options, group, facts, further)

    def at(self, *, epoch: int, steps: int, saved_at: float | None = None) -> dict[str, str]:
        """For a file saved after `steps` steps: `epoch` is as `step_metadata` wants it, `saved_at` is now."""
        saved_at = time.time() if saved_at is None else saved_at
        entries: dict[str, str] = {}
        if self._method.writes_training_metadata:
            entries = step_metadata(self._base, epoch=epoch, steps=steps, finished_at=saved_at)
            if self._options.saving.no_metadata:
                entries = {key: value for key, value in entries.items() if key in MINIMUM_KEYS}
        model_type = self._method.metadata().get("model_type", CHECKPOINT)
        if model_type is not None:
            spec = model_spec(self._options, self._method.family.model_metadata(), model_type, self._resolution)
            entries |= spec.entries(saved_at)
        return entries


def trained_resolution(group: DatasetGroup | None) -> tuple[int, int] | None:
    """(width, height) of the dataset with the most pixels; None without datasets (a class of the user's)."""
    resolutions = [dataset.config.resolution for dataset in group.datasets if dataset.records] if group else []
    return max(resolutions, key=lambda size: size[0] * size[1], default=None)


def step_metadata(base: Mapping[str, str], *, epoch: int, steps: int, finished_at: float) -> dict[str, str]:
    """`base` for one file: `epoch` is the number of completed epochs (at the end: the planned number)."""
    return {
        **base,
        "ss_training_finished_at": str(finished_at),
        "ss_steps": str(steps),
        "ss_epoch": str(epoch),
    }


def training_metadata(
    options: Options, group: DatasetGroup, facts: RunFacts, further: Mapping[str, Any]
) -> dict[str, str]:
    """Every `ss_*` entry that does not change from save to save.

    `further` holds what family and method know; its `ss_*` values win. Every value is the `str()` of a Python value;
    tables are JSON texts. Model files are hashed here, which takes a while.
    """
    entries = {
        **_run_entries(options, group, facts),
        **_option_entries(options),
        **_network_entries(options, facts),
        **_data_entries(options, group, facts),
        **_file_entries("sd_model", options.model.pretrained_model_name_or_path),
        **_file_entries("vae", options.model.vae),
        **{key: value for key, value in further.items() if key.startswith("ss_")},
    }
    return {key: str(value) for key, value in entries.items()}


# --- the run and its options ----------------------------------------------------------------------------------


def _run_entries(options: Options, group: DatasetGroup, facts: RunFacts) -> dict[str, Any]:
    optimizer = facts.optimizer + (f"({facts.optimizer_args})" if facts.optimizer_args else "")
    schedule = options.optimizer.lr_scheduler_type or facts.lr_scheduler
    has_no_schedule = is_schedule_free(facts.optimizer)
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": options.saving.output_name,
        "ss_learning_rate": facts.learning_rate,
        "ss_num_train_images": group.num_train_images,
        "ss_num_validation_images": facts.num_validation_images,
        "ss_num_reg_images": group.num_reg_images,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.max_steps,
        "ss_lr_scheduler": "constant" if has_no_schedule else schedule,
        "ss_lr_warmup_steps": 0 if has_no_schedule else options.optimizer.lr_warmup_steps,
        "ss_optimizer": optimizer,
        "ss_seed": facts.seed,
        "ss_sd_scripts_commit_hash": program_revision() or "(unknown)",
    }


def _option_entries(options: Options) -> dict[str, Any]:
    training, device, model, cache = options.training, options.device, options.model, options.cache
    noise, loss, data, validation = options.noise, options.loss, options.dataset, options.validation
    return {
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_lowram": training.lowram,
        "ss_max_grad_norm": options.optimizer.max_grad_norm,
        "ss_mixed_precision": device.mixed_precision,
        "ss_full_fp16": device.full_fp16,
        "ss_fp8_base": device.fp8_base,
        "ss_fp8_base_unet": device.fp8_base_unet,
        "ss_v2": model.v2,
        "ss_clip_skip": model.clip_skip,
        "ss_max_token_length": model.max_token_length,
        "ss_cache_latents": cache.cache_latents or cache.cache_latents_to_disk,
        "ss_noise_offset": noise.noise_offset,
        "ss_noise_offset_random_strength": noise.noise_offset_random_strength,
        "ss_multires_noise_iterations": noise.multires_noise_iterations,
        "ss_multires_noise_discount": noise.multires_noise_discount,
        "ss_adaptive_noise_scale": noise.adaptive_noise_scale,
        "ss_zero_terminal_snr": noise.zero_terminal_snr,
        "ss_ip_noise_gamma": noise.ip_noise_gamma,
        "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random_strength,
        "ss_training_comment": options.saving.training_comment,
        "ss_caption_dropout_rate": data.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": data.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": data.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": data.face_crop_aug_range,
        "ss_resize_interpolation": data.resize_interpolation,
        "ss_prior_loss_weight": loss.prior_loss_weight,
        "ss_min_snr_gamma": loss.min_snr_gamma,
        "ss_debiased_estimation": loss.debiased_estimation_loss,
        "ss_loss_type": loss.loss_type,
        "ss_huber_schedule": loss.huber_schedule,
        "ss_huber_scale": loss.huber_scale,
        "ss_huber_c": loss.huber_c,
        "ss_validation_seed": validation.validation_seed,
        "ss_validation_split": validation.validation_split,
        "ss_max_validation_steps": validation.max_validation_steps,
        "ss_validate_every_n_epochs": validation.validate_every_n_epochs,
        "ss_validate_every_n_steps": validation.validate_every_n_steps,
    }


def _network_entries(options: Options, facts: RunFacts) -> dict[str, Any]:
    network = options.network
    text_rates: Any = None if network.text_encoder_lr is None else list(network.text_encoder_lr)
    if text_rates is not None and len(text_rates) == 1:
        text_rates = text_rates[0]
    is_removed = facts.group_learning_rates_removed
    return {
        "ss_text_encoder_lr": None if is_removed else text_rates,
        "ss_unet_lr": None if is_removed else network.unet_lr,
        "ss_network_module": network.network_module,
        "ss_network_dim": network.network_dim,
        "ss_network_alpha": network.network_alpha,
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": network.scale_weight_norms,
    }


def _file_entries(kind: str, path: str | None) -> dict[str, str]:
    """Name and hashes of a model file; only the name, as given, when nothing is there (a hub name)."""
    if not path:
        return {}
    if not os.path.exists(path):
        return {f"ss_{kind}_name": path}
    return {
        f"ss_{kind}_name": _base_name(path),
        f"ss_{kind}_hash": legacy_file_hash(path),
        f"ss_new_{kind}_hash": file_sha256(path),
    }


# --- the data -------------------------------------------------------------------------------------------------


def _data_entries(options: Options, group: DatasetGroup, facts: RunFacts) -> dict[str, Any]:
    own = group.facts()
    if own is not None:
        return own
    entries = _common_entries(options, group, facts) | _subset_entries(group)
    if not options.dataset.dataset_config:
        [dataset] = group.datasets
        return entries | _directory_entries(group) | {"ss_tag_frequency": json.dumps(tag_frequencies(dataset))}
    tag_frequency: dict[str, dict[str, int]] = {}
    for dataset in group.datasets:
        for name, counts in tag_frequencies(dataset).items():
            tag_frequency.setdefault(name, counts)
    return entries | _directory_entries(group) | {
        "ss_datasets": json.dumps([_dataset_table(dataset) for dataset in group.datasets]),
        "ss_tag_frequency": json.dumps(tag_frequency),
    }  # fmt: skip


def _directory_entries(group: DatasetGroup) -> dict[str, str]:
    """Images and repeats of every directory; repeated names are numbered."""
    directories: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
    for dataset in group.datasets:
        for subset, records in _filled_subsets(dataset):
            name = _free_name(_subset_name(subset), directories[subset.is_reg])
            directories[subset.is_reg][name] = {"n_repeats": subset.num_repeats, "img_count": len(records)}
    return {"ss_dataset_dirs": json.dumps(directories[False]), "ss_reg_dataset_dirs": json.dumps(directories[True])}


def _common_entries(options: Options, group: DatasetGroup, facts: RunFacts) -> dict[str, Any]:
    """What is the same for all datasets; other programs look for it at the top level."""
    tables = [_dataset_entries(options, dataset, facts) for dataset in group.datasets]
    common = {key: value for key, value in tables[0].items() if all(table[key] == value for table in tables)}
    if len(tables) > 1:
        common.pop("ss_bucket_info", None)  # counts images of one dataset
    return common


def _dataset_entries(options: Options, dataset: BucketDataset, facts: RunFacts) -> dict[str, Any]:
    config = dataset.config
    smallest, largest = _bucket_range(config)
    accumulation = options.training.gradient_accumulation_steps
    return {
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * facts.num_processes * accumulation,
        "ss_resolution": config.resolution,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": smallest,
        "ss_max_bucket_reso": largest,
        "ss_bucket_info": json.dumps(dataset.bucket_statistics()),
    }


def _subset_entries(group: DatasetGroup) -> dict[str, Any]:
    """The settings of the subsets, where they agree; the entries that every file has are None where they do not."""
    subsets = [subset for dataset in group.datasets for subset, _ in _filled_subsets(dataset)]
    entries: dict[str, Any] = {}
    for names, is_always in ((_SUBSET_SETTINGS, False), (_SUBSET_SETTINGS_OF_ALL_FILES, True)):
        for name in names:
            values = [getattr(subset, name) for subset in subsets]
            is_common = all(value == values[0] for value in values)
            if is_common or is_always:
                entries[f"ss_{name}"] = values[0] if is_common else None
    return entries


def _dataset_table(dataset: BucketDataset) -> dict[str, Any]:
    config = dataset.config
    smallest, largest = _bucket_range(config)
    return {
        "is_dreambooth": config.kind != "fine_tuning",
        "batch_size_per_device": config.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "min_bucket_reso": smallest,
        "max_bucket_reso": largest,
        "tag_frequency": tag_frequencies(dataset),
        "bucket_info": dataset.bucket_statistics(),
        "resize_interpolation": config.resize_interpolation,
        "subsets": [_subset_table(subset, len(records)) for subset, records in _filled_subsets(dataset)],
    }


def _subset_table(subset: SubsetConfig, count: int) -> dict[str, Any]:
    table: dict[str, Any] = {
        "img_count": count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator or "",
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir:
        table["image_dir"] = _base_name(subset.image_dir)
    if subset.kind == "fine_tuning":
        table["metadata_file"] = _base_name(subset.metadata_file or "")
    else:
        table |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return table


def tag_frequencies(dataset: BucketDataset) -> dict[str, dict[str, int]]:
    """{directory or metadata file: {lower-case tag: number of images}}; repeats do not count."""
    frequencies: dict[str, dict[str, int]] = {}
    for subset, records in _filled_subsets(dataset):
        counts = frequencies.setdefault(_subset_name(subset), {})
        for text in _tag_texts(subset, records):
            for tag in filter(None, (part.strip().lower() for part in text.split(","))):
                counts[tag] = counts.get(tag, 0) + 1
    return frequencies


def _tag_texts(subset: SubsetConfig, records: Sequence[ImageRecord]) -> Iterable[str]:
    """Captions; of metadata files only the tags."""
    if subset.kind != "fine_tuning":
        return (record.caption for record in records)
    keys = {record.key.removeprefix(f"{subset.metadata_file}:") for record in records}
    entries = read_metadata_file(subset.metadata_file or "")
    return (entry.tags for entry in entries if entry.tags and entry.key in keys)


def _filled_subsets(dataset: BucketDataset) -> Iterable[tuple[SubsetConfig, list[ImageRecord]]]:
    """Every subset that has images, with its records."""
    for index, subset in enumerate(dataset.config.subsets):
        records = [record for record in dataset.records if record.subset_index == index]
        if records:
            yield subset, records


def _bucket_range(config: DatasetConfig) -> tuple[int | None, int | None]:
    return (config.min_bucket_reso, config.max_bucket_reso) if config.enable_bucket else (None, None)


def _subset_name(subset: SubsetConfig) -> str:
    return _base_name((subset.metadata_file if subset.kind == "fine_tuning" else subset.image_dir) or "")


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or `name (2)`, `name (3)`, ..."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name} ({number})", number + 1
    return candidate


def _base_name(path: str) -> str:
    return Path(path).name
