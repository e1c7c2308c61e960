"""Encode every caption once before training: text-encoder outputs in memory, or in files beside the images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.cache import CacheReport
from library.data.captions import has_choices
from library.data.dataset import BucketDataset, DatasetGroup
from library.data.npz_files import USABLE, State, remove_leftovers
from library.data.records import ImageRecord, TextCacheSpec
from library.data.text_cache_files import TextEntry, check, text_cache_path, write
from library.options.errors import UserError

logger = logging.getLogger(__name__)

#: captions -> the arrays of a TextCacheSpec, each with the batch in front
EncodeCaptions = Callable[[Sequence[str]], Mapping[str, Tensor]]

_RANDOM_CAPTION_OPTIONS = (
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "shuffle_caption", "token_warmup_step",
    "caption_tag_dropout_rate",
)  # fmt: skip


@dataclass(frozen=True)
class TextCacheOptions:
    """How text-encoder outputs are cached."""

    to_disk: bool = False
    batch_size: int | None = None  # captions per call; None: the dataset's batch size
    skip_check: bool = False  # accept existing files unopened
    encoders: str = ""  # identity of the encoders, recorded in files


@dataclass(frozen=True)
class _Job:
    """One caption to encode, and where its outputs go."""

    caption: str
    batch_size: int
    records: list[ImageRecord]  # memory
    entries: list[TextEntry]  # disk


def text_cache_problems(group: DatasetGroup) -> list[str]:
    """Why captions of this data cannot be encoded once for all; each sentence names option and subset."""
    if group.is_validation:
        return []
    problems = [
        f"--cache_text_encoder_outputs cannot be combined with textual inversion templates for '{old}': they change "
        "with every fetch."
        for old, new in group.caption_replacements.items()
        if isinstance(new, list) and len(set(new)) > 1
    ]
    for index, dataset in enumerate(group.datasets):
        for number, subset in enumerate(dataset.config.subsets):
            where = subset.location or f"datasets[{index}].subsets[{number}]"
            problems += _subset_problems(dataset, number, subset, where)
    return problems


def _subset_problems(dataset: BucketDataset, number: int, subset: SubsetConfig, where: str) -> Iterator[str]:
    used = [name for name in _RANDOM_CAPTION_OPTIONS if getattr(subset, name) > 0]
    if used:
        yield (
            f"--cache_text_encoder_outputs cannot be combined with {', '.join(used)} ({where}): cached captions never "
            "change. Remove one of them."
        )
    chosen = [r.key for r in dataset.records if r.subset_index == number and has_choices(r.caption, subset)]
    if chosen:
        yield (
            f"--cache_text_encoder_outputs cannot be combined with enable_wildcard ({where}): {len(chosen)} caption(s) "
            f"have several lines or options to choose from, for example {chosen[0]}. Remove one of them."
        )


@torch.no_grad()
def cache_text_outputs(
    group: DatasetGroup, encode: EncodeCaptions, *, spec: TextCacheSpec, options: TextCacheOptions, rank: int = 0,
    world_size: int = 1,
) -> CacheReport:
    """Fill `text_outputs` (memory) or `text_outputs_path` (disk) of every record; bad files are made anew.

    Captions are processed with every random step off; equal ones are encoded once. Files are shared out among
    `world_size` processes: wait for all of them before training; in memory every process keeps all.
    Raises UserError for data that excludes caching (`text_cache_problems`), outputs that are not finite, images that
    would share a file, and files that cannot be written.
    """
    problems = text_cache_problems(group)
    if problems:
        raise UserError(problems)
    group.text_cache, group.text_encoders, group.trusts_text_caches = spec, options.encoders, options.skip_check
    report = CacheReport("text-encoder outputs")
    encoder = _Encoder(encode, spec)
    if options.to_disk:
        jobs = _disk_jobs(group, encoder, options, report, rank=rank, world_size=world_size)
    else:
        jobs = _memory_jobs(group, options, report)
    _report_processed(group)
    _encode_all(jobs, encoder, report, is_shown=rank == 0)
    return report


@torch.no_grad()
def remake_text_outputs(group: DatasetGroup, path: Path, encode: EncodeCaptions) -> bool:
    """Make one text cache file anew while a run trains; False if the group does not use it."""
    spec = group.text_cache
    for _, record, caption in _captions(group):
        if spec is not None and record.text_outputs is None and record.text_outputs_path == path:
            [outputs] = _Encoder(encode, spec)([caption])
            _write(group.text_entry(path, caption), spec, outputs)
            return True
    return False


@dataclass(frozen=True)
class _Encoder:
    """The family's encoding of captions, checked."""

    encode: EncodeCaptions
    spec: TextCacheSpec

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """What one caption gives."""
        return self([""])[0]

    def __call__(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """One table of arrays per caption, on the CPU."""
        outputs = self.encode(captions)
        for name in self.spec.arrays:
            finite = outputs[name].isfinite().flatten(1).all(dim=1)
            if not finite.all():
                bad = captions[int((~finite).nonzero()[0])]
                raise UserError(
                    f"The text encoders gave NaN or infinite values (`{name}`) for the caption {bad!r}. Use another "
                    "precision: --mixed_precision bf16 or no."
                )
        arrays = {name: outputs[name].cpu() for name in self.spec.arrays}
        return [{name: array[row].clone() for name, array in arrays.items()} for row in range(len(captions))]


def _captions(group: DatasetGroup) -> Iterator[tuple[BucketDataset, ImageRecord, str]]:
    """Every record in the order of registration, with the caption that is encoded for it."""
    for dataset in group.datasets:
        for record in dataset.records:
            yield dataset, record, group.fixed_caption(dataset, record)


def _batch_size(dataset: BucketDataset, options: TextCacheOptions) -> int:
    return options.batch_size or dataset.config.batch_size


def _memory_jobs(group: DatasetGroup, options: TextCacheOptions, report: CacheReport) -> list[_Job]:
    jobs: dict[str, _Job] = {}
    for dataset, record, caption in _captions(group):
        if record.text_outputs is not None:
            report.reused += 1
            continue
        job = jobs.setdefault(caption, _Job(caption, _batch_size(dataset, options), [], []))
        job.records.append(record)
    return list(jobs.values())


def _disk_jobs(
    group: DatasetGroup, encoder: _Encoder, options: TextCacheOptions, report: CacheReport, *, rank: int,
    world_size: int,
) -> list[_Job]:
    """The entries that this process must make; every record learns its file."""
    entries: dict[Path, tuple[TextEntry, int]] = {}
    for dataset, record, caption in _captions(group):
        if record.path is None:
            raise UserError(f"{record.key}: there is no image file beside which its text cache could lie")
        entry = group.text_entry(text_cache_path(record.path, encoder.spec), caption)
        first, _ = entries.setdefault(entry.path, (entry, _batch_size(dataset, options)))
        if first != entry:
            raise UserError(
                f"{record.path}: another image or subset uses the text cache file {entry.path} with another caption. "
                "Rename one image, give both the same caption, or cache in memory (--cache_text_encoder_outputs "
                "without --cache_text_encoder_outputs_to_disk)."
            )
        record.text_outputs_path = entry.path
    if rank == 0:
        remove_leftovers(dict.fromkeys(path.parent for path in entries))
    own = list(entries.values())[rank::world_size]
    states = _check_all([entry for entry, _ in own], encoder, options, is_shown=rank == 0)
    jobs: dict[str, _Job] = {}
    unverified: list[Path] = []
    for (entry, batch_size), (state, reason) in zip(own, states, strict=True):
        if state is State.UNVERIFIED:
            unverified.append(entry.path)
        if state in USABLE:
            report.reused += 1
            continue
        if state is not State.MISSING:
            report.remade += 1
            level = logging.WARNING if state is State.DAMAGED else logging.INFO
            logger.log(level, "%s: the text cache is made anew: %s", entry.path, reason)
        jobs.setdefault(entry.caption, _Job(entry.caption, batch_size, [], [])).entries.append(entry)
    if unverified:
        report.unverified = len(unverified)
        logger.warning(
            "%d text cache file(s) do not say what they were made from, for example %s: keys and shapes fit, so they "
            "are used. Delete them if captions or text encoders have changed.", len(unverified), unverified[0],
        )
    return list(jobs.values())


def _check_all(
    entries: Sequence[TextEntry], encoder: _Encoder, options: TextCacheOptions, *, is_shown: bool
) -> list[tuple[State, str]]:
    """What each entry's file is worth, with the reason if it is worth nothing; see `text_cache_files.check`."""
    existing = [entry for entry in entries if entry.path.exists()]
    if options.skip_check or not existing:
        found = dict.fromkeys((entry.path for entry in existing), (State.VALID, ""))
    else:
        from tqdm import tqdm

        spec, example = encoder.spec, encoder.example
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="check-cache") as pool:
            states = pool.map(lambda entry: check(entry, spec, example), existing)
            shown = tqdm(states, total=len(existing), desc="checking text caches", unit="file", disable=not is_shown)
            found = {entry.path: state for entry, state in zip(existing, shown, strict=True)}
    return [found.get(entry.path, (State.MISSING, "")) for entry in entries]


def _report_processed(group: DatasetGroup) -> None:
    """Other programs cache captions as they are stored; say so where that makes a difference."""
    if any(caption != record.caption for _, record, caption in _captions(group)):
        logger.info("captions are encoded as they are trained: with prefix, suffix, separators and first lines applied")


def _encode_all(jobs: Sequence[_Job], encoder: _Encoder, report: CacheReport, *, is_shown: bool) -> None:
    if not jobs:
        return
    from tqdm import tqdm

    with tqdm(total=len(jobs), desc="caching captions", unit="caption", smoothing=0.1, disable=not is_shown) as bar:
        for batch in _batches(jobs):
            for job, outputs in zip(batch, encoder([job.caption for job in batch]), strict=True):
                for record in job.records:
                    record.text_outputs = outputs
                for entry in job.entries:
                    _write(entry, encoder.spec, outputs)
                report.encoded += len(job.records) + len(job.entries)
            bar.update(len(batch))


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """At most `batch_size` consecutive jobs."""
    batch: list[_Job] = []
    for job in jobs:
        if batch and len(batch) >= min(batch[0].batch_size, job.batch_size):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _write(entry: TextEntry, spec: TextCacheSpec, outputs: Mapping[str, Tensor]) -> None:
    try:
        write(entry, spec, outputs)
    except OSError as error:
        raise UserError(
            f"{entry.path}: the text cache cannot be written ({error}). Make the folder writable, or cache in memory "
            "(--cache_text_encoder_outputs without --cache_text_encoder_outputs_to_disk)."
        ) from error
