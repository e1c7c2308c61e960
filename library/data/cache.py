"""Encode every image once before training: latents in memory, or in files that know what they were made from."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data import images
from library.data.buckets import crop_ltrb
from library.data.cache_files import CachedLatents, Entry, ImageFile, Terms, cache_path, check, write
from library.data.dataset import BucketDataset, DatasetGroup
from library.data.image_files import BadImagesError
from library.data.images import ImageError
from library.data.npz_files import USABLE, CacheError, State, remove_leftovers
from library.data.records import ImageRecord, LatentSpec
from library.options.errors import UserError

__all__ = ["CacheOptions", "CacheReport", "CachedLatents", "cache_latents", "check_cacheable", "remake_latents"]

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]

_UNWRITTEN = 16  # entries that may wait for the disk


@dataclass(frozen=True)
class CacheOptions:
    """How latents are cached."""

    to_disk: bool = False
    vae_batch_size: int = 1
    skip_check: bool = False  # accept existing files unopened
    vae_identity: str = ""  # recorded in files; an entry of another VAE is made anew. Empty: not compared
    high_vram: bool = False  # leave freed GPU memory reserved between batches
    writes_oldest_name: bool = False  # files are called `<stem>.npz`
    overwrites: bool = False  # entries that fit are made again too


@dataclass
class CacheReport:
    """What this process did: `encoded` includes the `remade`, `reused` includes the `unverified`."""

    what: str = "latents"
    encoded: int = 0
    reused: int = 0
    remade: int = 0  # stale or damaged entries
    unverified: int = 0  # entries of other programs, whose origin is not recorded

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.encoded} encoded ({self.remade} of them replace stale or damaged entries), "
            f"{self.reused} reused"
        )


@dataclass(frozen=True)
class _Job:
    """One encoding, and the records that use it."""

    dataset: BucketDataset
    record: ImageRecord
    wants_flipped: bool
    wants_mask: bool
    entry: Entry | None  # None: kept in memory

    @property
    def needed(self) -> Entry:
        """The entry on disk. Raises ValueError for a job in memory."""
        if self.entry is None:
            raise ValueError(f"{self.record.key}: its latents are kept in memory")
        return self.entry

    @property
    def group_key(self) -> tuple[object, ...]:
        """Jobs with equal keys may share a VAE batch."""
        return self.record.bucket_size, self.wants_flipped, self.wants_mask

    def load(self) -> _Loaded:
        """The pixels, and of which file they are."""
        source = ImageFile.of(self.entry.image) if self.entry is not None and self.entry.image is not None else None
        return _Loaded(self, self.dataset.sample_maker.pixels(self.record), source)


@dataclass(frozen=True)
class _Loaded:
    """A job with the pixels in its bucket's size."""

    job: _Job
    pixels: np.ndarray  # uint8 [H,W,3 or 4]
    source: ImageFile | None  # None: nothing is written


def check_cacheable(group: DatasetGroup) -> None:
    """Raise UserError naming option and subset where pixels change with every fetch, so that latents cannot be kept."""
    problems = []
    for index, dataset in enumerate(group.datasets):
        for number, subset in enumerate(dataset.config.subsets):
            used = _random_pixel_options(subset)
            if used and not group.is_validation:
                where = subset.location or f"datasets[{index}].subsets[{number}]"
                problems.append(
                    f"--cache_latents cannot be combined with {', '.join(used)} ({where}): cached latents never "
                    "change. Remove one of them."
                )
    if problems:
        raise UserError(problems)


@torch.no_grad()
def cache_latents(
    group: DatasetGroup, encode: Encode, *, spec: LatentSpec, options: CacheOptions, rank: int = 0, world_size: int = 1,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> CacheReport:
    """Fill `latents` (memory) or `latents_path` (disk) of every record; stale and damaged files are made anew.

    `encode` takes images [B,3,H,W] in [-1,1] (`dtype`, on `device`) and returns what is cached [B,C,h,w]. Files are
    shared out among `world_size` processes: wait for all of them before training. Raises UserError for options that
    exclude caching, unreadable images (all in one list) and images whose latents are not finite.
    """
    check_cacheable(group)
    report = CacheReport()
    for dataset in group.datasets:
        dataset.sample_maker.cache_terms = Terms(options.vae_identity, is_trusted=options.skip_check)
    if options.to_disk:
        jobs = _disk_jobs(group, spec, options, report, rank=rank, world_size=world_size)
    else:
        jobs = _memory_jobs(group, report)
    _encode_all(jobs, encode, options, report, rank=rank, world_size=world_size, device=device, dtype=dtype)
    return report


@torch.no_grad()
def remake_latents(
    group: DatasetGroup, path: Path, encode: Encode, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> bool:
    """Make what the group needs of one cache file anew, while a run trains; False if the group does not use it.

    Raises CacheError where the image is gone, ImageError where it cannot be read.
    """
    jobs: dict[tuple[int, int, int], _Job] = {}
    for dataset in group.datasets:
        for record in dataset.records:
            if record.latents is None and record.latents_path == path:
                job = _disk_job(dataset, record, dataset.sample_maker.latent_entry(record, path))
                shape = job.needed.shape
                jobs[shape] = _merge(jobs[shape], job) if shape in jobs else job
    for job in jobs.values():
        if job.needed.image is None:
            raise CacheError(f"{path}: the latent cache is spoilt and its image is missing")
        loaded = job.load()
        [cached] = _encode_batch([loaded], encode, device=device, dtype=dtype)
        _write(loaded, cached)
    return bool(jobs)


def _random_pixel_options(subset: SubsetConfig) -> list[str]:
    used = [name for name in ("color_aug", "random_crop") if getattr(subset, name)]
    return used + (["face_crop_aug_range"] if subset.face_crop_aug_range is not None else [])


def _ordered(dataset: BucketDataset) -> list[ImageRecord]:
    """Equal buckets together: by area, width, height."""
    return sorted(dataset.records, key=lambda r: (r.bucket_size[0] * r.bucket_size[1], *r.bucket_size))


def _memory_jobs(group: DatasetGroup, report: CacheReport) -> list[_Job]:
    jobs = []
    for dataset in group.datasets:
        for record in _ordered(dataset):
            if record.latents is not None or record.latents_path is not None:
                report.reused += 1
                continue
            subset = dataset.config.subsets[record.subset_index]
            jobs.append(_Job(dataset, record, dataset.sample_maker.is_flippable(subset), subset.alpha_mask, None))
    return jobs


def _disk_jobs(
    group: DatasetGroup, spec: LatentSpec, options: CacheOptions, report: CacheReport, *, rank: int, world_size: int
) -> list[_Job]:
    """The entries that this process must make; every record learns its file."""
    merged: dict[tuple[Path, tuple[int, int, int]], _Job] = {}
    owners: dict[Path, int] = {}
    for dataset in group.datasets:
        for record in _ordered(dataset):
            entry = _entry(dataset, record, spec, options)
            record.latents_path = entry.path
            owners.setdefault(entry.path, len(owners) % world_size)
            job = _disk_job(dataset, record, entry)
            place = entry.path, entry.shape
            merged[place] = _merge(merged[place], job) if place in merged else job
    if rank == 0:
        remove_leftovers(dict.fromkeys(path.parent for path in owners))
    unverified: list[Path] = []
    jobs = [
        job
        for job in merged.values()
        if owners[job.needed.path] == rank and _must_encode(job.needed, options, report, unverified)
    ]
    if unverified:
        report.unverified = len(unverified)
        logger.warning(
            "%d latent cache file(s) do not say what they were made from, for example %s: shapes and keys fit, so they "
            "are used. Delete them if images, VAE or model family have changed.", len(unverified), unverified[0],
        )
    return jobs


def _disk_job(dataset: BucketDataset, record: ImageRecord, entry: Entry) -> _Job:
    return _Job(dataset, record, entry.wants_flipped, entry.wants_mask, entry)


def _entry(dataset: BucketDataset, record: ImageRecord, spec: LatentSpec, options: CacheOptions) -> Entry:
    if options.writes_oldest_name and record.path is not None:
        return dataset.sample_maker.latent_entry(record, record.path.with_suffix(".npz"))
    if record.path is not None and record.path.exists():
        path = cache_path(record.path, record.image_size, spec.cache_suffix)
    elif record.latents_path is not None:
        path = record.latents_path
    else:
        raise ImageError(record.path or record.key, "there is neither an image file nor a latent cache for it")
    return _prefer_legacy(dataset.sample_maker.latent_entry(record, path))


def _prefer_legacy(entry: Entry) -> Entry:
    """The entry in `<stem>.npz`, the oldest name, where only that file has it; caching never writes such files."""
    if entry.keys_have_size or entry.image is None:
        return entry
    legacy = replace(entry, path=entry.image.with_suffix(".npz"))
    if not legacy.path.exists():
        return entry
    if entry.terms.is_trusted:
        return entry if entry.path.exists() else legacy
    return entry if check(entry)[0] in USABLE or check(legacy)[0] not in USABLE else legacy


def _merge(first: _Job, second: _Job) -> _Job:
    """One encoding for two records that share an entry, as when two datasets train one image at one size."""
    a, b = first.needed, second.needed
    flipped, mask = a.wants_flipped or b.wants_flipped, a.wants_mask or b.wants_mask
    a, b = (replace(entry, wants_flipped=flipped, wants_mask=mask) for entry in (a, b))
    if a != b:
        raise UserError(
            f"{a.image or a.path} and {b.image or b.path} would share the latent cache file {a.path} but are prepared "
            "differently (another image of the same name, another resize_interpolation or other bucket rules). Rename "
            "one image, use the same settings, or cache in memory (--cache_latents without --cache_latents_to_disk)."
        )
    job = second if second.wants_mask and not first.wants_mask else first  # its subset loads the alpha channel
    return replace(job, wants_flipped=flipped, wants_mask=mask, entry=a)


def _must_encode(entry: Entry, options: CacheOptions, report: CacheReport, unverified: list[Path]) -> bool:
    if entry.terms.is_trusted and entry.path.exists():
        report.reused += 1
        return False
    found, reason = check(entry)
    if found in USABLE and not options.overwrites:
        report.reused += 1
        if found is State.UNVERIFIED:
            unverified.append(entry.path)
        return False
    if entry.image is None:
        raise CacheError(f"{entry.path}: the latent cache does not fit ({reason}) and its image is missing")
    if found is not State.MISSING:
        report.remade += 1
        level = logging.WARNING if found is State.DAMAGED else logging.INFO
        reason = reason or "that was asked for"
        logger.log(level, "%s: the latent cache is made anew: %s", entry.path, reason)
    return True


def _encode_all(
    jobs: Sequence[_Job], encode: Encode, options: CacheOptions, report: CacheReport, *, rank: int, world_size: int,
    device: torch.device | str, dtype: torch.dtype,
) -> None:
    """Images are loaded ahead and entries are written behind, both beside the work of the encoder."""
    if not jobs:
        return
    from tqdm import tqdm

    threads = max(1, min((os.cpu_count() or 1) // world_size, len(jobs)))
    bad: dict[str, str] = {}
    with (
        tqdm(total=len(jobs), desc="caching latents", unit="image", smoothing=0.1, disable=rank != 0) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="load-image") as loaders,
        ThreadPoolExecutor(1, thread_name_prefix="write-cache") as writer,  # one: entries of a file are written in turn
    ):
        unwritten: deque[Future[None]] = deque()
        batches = list(_vae_batches(jobs, options.vae_batch_size))
        for count, batch in _loaded(batches, loaders, bad, ahead=1 + -(-2 * threads // options.vae_batch_size)):
            if not bad:
                for item, cached in zip(batch, _encode_batch(batch, encode, device=device, dtype=dtype), strict=True):
                    if item.source is None:
                        item.job.record.latents = cached
                    else:
                        unwritten.append(writer.submit(_write, item, cached))
                report.encoded += len(batch)
            bar.update(count)
            while len(unwritten) > _UNWRITTEN:
                unwritten.popleft().result()
            if not options.high_vram and torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
        for writing in unwritten:
            writing.result()
    if bad:
        raise BadImagesError(bad)


def _vae_batches(jobs: Iterable[_Job], size: int) -> Iterator[list[_Job]]:
    """At most `size` consecutive jobs of equal bucket, flip and mask."""
    batch: list[_Job] = []
    for job in jobs:
        if batch and (len(batch) >= size or batch[0].group_key != job.group_key):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _loaded(
    batches: Iterable[list[_Job]], pool: ThreadPoolExecutor, bad: dict[str, str], *, ahead: int
) -> Iterator[tuple[int, list[_Loaded]]]:
    """(number of jobs, those whose image is readable) of each batch, loaded `ahead` batches ahead.

    Unreadable images are left out and collected in `bad`.
    """
    waiting: deque[list[Future[_Loaded]]] = deque()

    def finish(batch: list[Future[_Loaded]]) -> tuple[int, list[_Loaded]]:
        done = []
        for future in batch:
            try:
                done.append(future.result())
            except ImageError as error:
                bad[error.path] = str(error)
        return len(batch), done

    for batch in batches:
        waiting.append([pool.submit(job.load) for job in batch])
        if len(waiting) > ahead:
            yield finish(waiting.popleft())
    while waiting:
        yield finish(waiting.popleft())


def _encode_batch(
    batch: Sequence[_Loaded], encode: Encode, *, device: torch.device | str, dtype: torch.dtype
) -> list[CachedLatents]:
    if not batch:
        return []
    pixels = torch.stack([images.to_tensor(item.pixels) for item in batch]).to(device=device, dtype=dtype)
    latents = encode(pixels).cpu()
    flipped = encode(pixels.flip(-1)).cpu() if batch[0].job.wants_flipped else None
    encoded = []
    for row, item in enumerate(batch):
        record = item.job.record
        cached = CachedLatents(
            latents[row].clone(), None if flipped is None else flipped[row].clone(), record.image_size,
            crop_ltrb(record.image_size, record.bucket_size),
            images.alpha_mask(item.pixels) if item.job.wants_mask else None,
        )
        if not all(torch.isfinite(t).all() for t in (cached.latents, cached.flipped) if t is not None):
            raise UserError(
                f"{record.path}: the VAE produced NaN or infinite latents. Use --no_half_vae, or remove the image."
            )
        encoded.append(cached)
    return encoded


def _write(item: _Loaded, cached: CachedLatents) -> None:
    entry = item.job.needed
    if item.source is None:
        raise ValueError(f"{entry.path}: nothing was read that could be written")
    try:
        write(entry, cached, item.source)
    except OSError as error:
        raise UserError(
            f"{entry.path}: the latent cache cannot be written ({error}). Make the folder writable, or cache in memory "
            "(--cache_latents without --cache_latents_to_disk)."
        ) from error
