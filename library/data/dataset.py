"""The datasets of a run as one map from batch requests to batches; all randomness is from (seed, epoch, sample)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from library.config_schema import DataConfig, DatasetConfig
from library.data import buckets
from library.data.batch import collate
from library.data.buckets import Bucketing, Placement, Size, cover
from library.data.captions import CaptionContext, process_caption, random_stream
from library.data.images import image_size
from library.data.records import Batch, BatchRequest, ImageRecord, LatentSpec, TextCacheSpec
from library.data.samples import SampleMaker
from library.data.text_cache_files import TextEntry
from library.data.text_cache_files import read as read_text_outputs
from library.options.errors import UserError

logger = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]


class BucketDataset:
    """One dataset of the configuration: its records, its buckets, and how they are cut into batches.

    A record with n repeats is n samples. Samples are numbered through the whole group, from `first_sample` on, in
    the order of the records; the number is what per-sample randomness depends on.
    """

    def __init__(
        self, config: DatasetConfig, records: Sequence[ImageRecord], *, spec: LatentSpec, first_sample: int,
        is_validation: bool,
    ) -> None:
        self.records = list(records)
        if any(record.train_resolution for record in self.records):  # these are buckets, whatever the settings say
            config = replace(config, enable_bucket=True)
        self.config = config
        self.bucketing = Bucketing(
            config.resolution, enabled=config.enable_bucket, minimum=config.min_bucket_reso,
            maximum=config.max_bucket_reso, step=config.bucket_reso_steps, no_upscale=config.bucket_no_upscale,
        )
        self.sample_maker = SampleMaker(config, spec, is_augmented=not is_validation)
        self.first_sample = first_sample
        self._placements = _place(self.records, self.bucketing, config)
        self._sample_records = [i for i, record in enumerate(self.records) for _ in range(record.num_repeats)]
        self._buckets = self._fill_buckets()

    @property
    def num_train_images(self) -> int:
        """Images times repeats, without regularisation images."""
        return sum(record.num_repeats for record in self.records if not record.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images times repeats."""
        return sum(record.num_repeats for record in self.records if record.is_reg)

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return len(self._sample_records)

    def __len__(self) -> int:
        """Batches per epoch: buckets are never mixed, and the last batch of each may be short."""
        size = self.config.batch_size
        return sum(-(-len(samples) // size) for samples in self._buckets.values())

    def bucket_statistics(self) -> dict[str, Any] | None:
        """The `ss_bucket_info` table; None without bucketing."""
        if not self.config.enable_bucket:
            return None
        repeats = (record.num_repeats for record in self.records)
        return buckets.statistics(zip(self._placements, repeats, strict=True))

    def batches(self, rng: random.Random | None) -> Iterator[tuple[int, ...]]:
        """The samples (numbers) of each batch, buckets in sorted order; shuffled within each bucket by `rng`."""
        for samples in self._buckets.values():
            order = list(samples)
            if rng is not None:
                rng.shuffle(order)
            for start in range(0, len(order), self.config.batch_size):
                yield tuple(order[start : start + self.config.batch_size])

    def record_of(self, sample: int) -> ImageRecord:
        """The record that a sample number stands for."""
        return self.records[self._sample_records[sample - self.first_sample]]

    def _fill_buckets(self) -> dict[Size, list[int]]:
        filled: dict[Size, list[int]] = {}
        for number, record_index in enumerate(self._sample_records, start=self.first_sample):
            filled.setdefault(self.records[record_index].bucket_size, []).append(number)
        return dict(sorted(filled.items()))


class DatasetGroup(Dataset[Batch]):
    """All datasets of a run: `group[BatchRequest(epoch, index, step)]` is a whole batch.

    Set `max_train_steps`, `caption_replacements`, `text_cache` and `needs_tokens` before the first batch is asked for
    (worker processes get a copy).
    """

    def __init__(
        self, datasets: Sequence[BucketDataset], *, spec: LatentSpec, tokenize: Tokenize | None, seed: int,
        prior_loss_weight: float = 1.0, is_validation: bool = False,
    ) -> None:
        self.datasets = list(datasets)
        self.spec = spec
        self.seed = seed
        self.is_validation = is_validation
        self.max_train_steps = 0
        self.caption_replacements: Mapping[str, str | list[str]] = {}
        self.text_cache: TextCacheSpec | None = None  # set once text-encoder outputs are cached
        self.text_encoders = ""  # their identity, which cache files must have; empty: not compared
        self.trusts_text_caches = False  # `--skip_cache_check`
        self.needs_tokens = True  # false when every text encoder's outputs are cached
        self._tokenize = tokenize
        self._prior_loss_weight = prior_loss_weight
        self._plan: tuple[int, list[tuple[int, tuple[int, ...]]]] | None = None

    @property
    def batch_sizes(self) -> list[int]:
        """Of each dataset."""
        return [dataset.config.batch_size for dataset in self.datasets]

    @property
    def num_train_images(self) -> int:
        """Images times repeats of all datasets, without regularisation images."""
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images times repeats of all datasets."""
        return sum(dataset.num_reg_images for dataset in self.datasets)

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, request: BatchRequest) -> Batch:
        dataset_index, samples = self._epoch_samples(request.epoch)[request.index]
        return self.make_batch(dataset_index, samples, epoch=request.epoch, step=request.step)

    def epoch_plan(self, epoch: int) -> list[tuple[int, tuple[str, ...]]]:
        """(dataset index, image keys) of every batch of an epoch (1-based), in the order of `BatchRequest.index`."""
        return [
            (index, tuple(self.datasets[index].record_of(sample).key for sample in samples))
            for index, samples in self._epoch_samples(epoch)
        ]

    def source_of(self, request: BatchRequest) -> tuple[BucketDataset, list[ImageRecord]] | None:
        """The dataset of a batch and the record of each of its rows; None where a class of the user's makes batches."""
        dataset_index, samples = self._epoch_samples(request.epoch)[request.index]
        dataset = self.datasets[dataset_index]
        return dataset, [dataset.record_of(sample) for sample in samples]

    def make_batch(self, dataset_index: int, samples: Sequence[int], *, epoch: int, step: int) -> Batch:
        """A batch of the given samples (numbers, see `BucketDataset`) of one dataset and one bucket."""
        dataset = self.datasets[dataset_index]
        records = [dataset.record_of(sample) for sample in samples]
        made = [
            dataset.sample_maker.make(record, random_stream(self.seed, epoch, sample, "image"))
            for record, sample in zip(records, samples, strict=True)
        ]
        captions = [
            self._caption(dataset, record, sample, epoch=epoch, step=step)
            for record, sample in zip(records, samples, strict=True)
        ]
        return collate(
            records, made, captions, [dataset.config.subsets[record.subset_index] for record in records],
            network_multiplier=dataset.config.network_multiplier, prior_loss_weight=self._prior_loss_weight,
            tokens=self._tokenize(captions) if self._tokenize and self.needs_tokens else None,
            text_outputs=[
                self._text_outputs(record, caption) for record, caption in zip(records, captions, strict=True)
            ],
        )

    def facts(self) -> dict[str, Any] | None:
        """The metadata about the data, where a class of the user's knows it; None: read it off `datasets`."""
        return None

    def check_bucket_sizes(self, unit: int | None = None) -> None:
        """Raise UserError when a side of a used bucket is not a multiple of `unit` pixels (default: one latent)."""
        unit = unit or self.spec.downsample
        problems = []
        for dataset in self.datasets:
            used = sorted({record.bucket_size for record in dataset.records})
            wrong = [f"{width}x{height}" for width, height in used if width % unit or height % unit]
            if wrong:
                setting = "bucket_reso_steps" if dataset.config.enable_bucket else "resolution"
                problems.append(
                    f"{_place_name(dataset.config)}image sizes must be multiples of {unit}, but {', '.join(wrong)} "
                    f"would be trained. Change {setting}."
                )
        if problems:
            raise UserError(problems)

    def fixed_caption(self, dataset: BucketDataset, record: ImageRecord) -> str:
        """The caption of a record with every random step off: what is encoded for a cache."""
        context = CaptionContext(0, 0, is_training=False, replacements=self.caption_replacements)
        return process_caption(record.caption, dataset.config.subsets[record.subset_index], random.Random(0), context)

    def text_entry(self, path: Path, caption: str) -> TextEntry:
        """What the text cache file `path` must hold."""
        return TextEntry(path, caption, self.text_encoders, self.trusts_text_caches)

    def _text_outputs(self, record: ImageRecord, caption: str) -> Mapping[str, Any] | None:
        if record.text_outputs is None and record.text_outputs_path is not None and self.text_cache is not None:
            return read_text_outputs(self.text_entry(record.text_outputs_path, caption), self.text_cache)
        return record.text_outputs

    def _caption(self, dataset: BucketDataset, record: ImageRecord, sample: int, *, epoch: int, step: int) -> str:
        if self.is_validation or self.text_cache is not None:
            return self.fixed_caption(dataset, record)
        context = CaptionContext(
            epoch, step, max_train_steps=self.max_train_steps, replacements=self.caption_replacements
        )
        subset = dataset.config.subsets[record.subset_index]
        return process_caption(record.caption, subset, random_stream(self.seed, epoch, sample, "caption"), context)

    def _epoch_samples(self, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
        """(dataset index, sample numbers) of every batch: shuffled within buckets, then all batches permuted."""
        if self._plan is not None and self._plan[0] == epoch:
            return self._plan[1]
        rng = None if self.is_validation else random_stream(self.seed, epoch, 0, "order")
        plan = [(index, batch) for index, dataset in enumerate(self.datasets) for batch in dataset.batches(rng)]
        if rng is not None:
            rng.shuffle(plan)
        self._plan = epoch, plan
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}


def build_group(
    config: DataConfig, records_per_dataset: Sequence[Sequence[ImageRecord]], *, spec: LatentSpec,
    tokenize: Tokenize | None, seed: int, prior_loss_weight: float = 1.0, is_validation: bool = False,
) -> DatasetGroup:
    """The datasets of `config` with their records put into buckets (sizes are written into the records).

    `is_validation`: a fixed order and nothing random. Raises UserError listing every image or option that does not fit.
    """
    if not is_validation:
        _check_face_crop(config)
        if any(subset.color_aug for dataset in config.datasets for subset in dataset.subsets):
            logger.info("color_aug: gamma changes colours by a few percent; older versions changed brightness by 30 %%")
    datasets: list[BucketDataset] = []
    first_sample = 0
    for dataset_config, records in zip(config.datasets, records_per_dataset, strict=True):
        dataset = BucketDataset(
            dataset_config, records, spec=spec, first_sample=first_sample, is_validation=is_validation
        )
        datasets.append(dataset)
        first_sample += dataset.num_samples
    if first_sample == 0 and not is_validation:
        raise UserError(f"No data found: no image of {config.source} can be used for training.")
    group = DatasetGroup(
        datasets, spec=spec, tokenize=tokenize, seed=seed, prior_loss_weight=prior_loss_weight,
        is_validation=is_validation,
    )
    group.check_bucket_sizes()
    return group


def _place(records: Sequence[ImageRecord], bucketing: Bucketing, config: DatasetConfig) -> list[Placement]:
    """Give every record its bucket and resize target."""
    placements, problems = [], []
    known: dict[tuple[Size, Size | None], Placement] = {}  # many pictures have few sizes
    for record in records:
        try:
            if record.image_size == (0, 0) and record.path is not None:
                record.image_size = image_size(record.path)
            fixed = record.train_resolution
            question = record.image_size, fixed
            if question not in known:
                known[question] = cover(record.image_size, fixed) if fixed else bucketing.place(record.image_size)
            placement = known[question]
        except ValueError as error:
            problems.append(f"{_place_name(config)}{record.path or record.key}: {error}")
            continue
        record.bucket_size, record.resized_size = placement.bucket, placement.resized
        placements.append(placement)
    if problems:
        raise UserError(problems)
    return placements


def _check_face_crop(config: DataConfig) -> None:
    problems = []
    for dataset in config.datasets:
        for subset in dataset.subsets:
            if subset.face_crop_aug_range is None:
                continue
            where = f" ({subset.location})" if subset.location else ""
            if dataset.enable_bucket:
                problems.append(f"face_crop_aug_range{where} has no effect with enable_bucket. Remove one of them.")
            if subset.conditioning_data_dir is not None:
                problems.append(
                    f"face_crop_aug_range{where} cannot be combined with conditioning_data_dir: the conditioning image "
                    "would not follow the crop. Remove one of them."
                )
    if problems:
        raise UserError(problems)


def _place_name(config: DatasetConfig) -> str:
    return f"{config.location}: " if config.location else ""
