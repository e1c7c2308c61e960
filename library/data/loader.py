"""Batches in worker processes: which requests a process gets in an epoch, and the torch DataLoader that serves them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.dataset import DatasetGroup
from library.data.npz_files import SpoiltEntryError
from library.data.records import Batch, BatchRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failure:
    """An exception that happened in a worker, on its way to the training process."""

    error: Exception
    request: BatchRequest


class _Guarded(Dataset[Any]):
    """The group with errors as values: torch would bury their one line under a worker's traceback."""

    def __init__(self, group: DatasetGroup) -> None:
        self._group = group

    def __getitem__(self, request: BatchRequest) -> Batch | _Failure:
        try:
            return self._group[request]
        except ValueError as error:
            return _Failure(error, request)


class _RequestSampler(Sampler[BatchRequest]):
    """The requests of one process and epoch; `set_epoch` before every iteration."""

    def __init__(self, batches: int, *, accumulation: int, rank: int, world_size: int) -> None:
        self._batches = batches
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._epoch, self._start, self._first_step = 1, 0, 0

    @property
    def num_rounds(self) -> int:
        """Batches per epoch and process."""
        return -(-self._batches // self._world_size)

    def set_epoch(self, epoch: int, *, start: int, first_step: int) -> None:
        self._epoch, self._start, self._first_step = epoch, start, first_step

    def __len__(self) -> int:
        return max(0, self.num_rounds - self._start)

    def __iter__(self) -> Iterator[BatchRequest]:
        for position in range(self._start, self.num_rounds):
            yield BatchRequest(
                epoch=self._epoch,
                index=(position * self._world_size + self._rank) % self._batches,
                step=self._first_step + (position - self._start) // self._accumulation,
            )


class BatchLoader:
    """Serves the epochs of a group to one process of `world_size`.

    Process r gets the batches r, r + world_size, ... of the epoch's order; the last round is filled up from its
    beginning, so that all processes get equally many. `accumulation` batches make one optimizer step. At most
    `num_workers` worker processes, and no more than CPUs; they live on between epochs with `persistent_workers`.
    Iterating never draws from torch's global generator. `remake(path)` makes a spoilt cache file anew in the training
    process, where the models are; the batch is then made again. False: it cannot.
    """

    def __init__(
        self, group: DatasetGroup, *, accumulation: int = 1, rank: int = 0, world_size: int = 1, num_workers: int = 0,
        persistent_workers: bool = False, pin_memory: bool = False, remake: Callable[[Path], bool] | None = None,
    ) -> None:
        self._batches = _Guarded(group)
        self._remake = remake
        workers = max(0, min(num_workers, os.cpu_count() or 1))
        if persistent_workers and workers == 0:
            logger.warning("--persistent_data_loader_workers is ignored: there are no data loader workers")
        self._sampler = _RequestSampler(len(group), accumulation=accumulation, rank=rank, world_size=world_size)
        self._loader: DataLoader[Any] = DataLoader(
            self._batches, batch_size=None, sampler=self._sampler, num_workers=workers, collate_fn=_unchanged,
            pin_memory=pin_memory, persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=_start_worker, generator=torch.Generator().manual_seed(group.seed),
        )

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return self._sampler.num_rounds

    def epoch(self, epoch: int, *, start: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (1-based) from position `start` on; earlier ones are not loaded.

        `first_step`: optimizer steps completed before the batch at `start`. One epoch at a time.
        """
        self._sampler.set_epoch(epoch, start=start, first_step=first_step)
        for item in self._loader:
            yield self._repaired(item) if isinstance(item, _Failure) else item

    def _repaired(self, failure: _Failure) -> Batch:
        """The batch that failed, once its spoilt cache files are made anew. Raises the error if that is no help."""
        remade: set[Path] = set()
        while self._remake is not None and isinstance(failure.error, SpoiltEntryError):
            item = self._batches[failure.request]  # an earlier batch may have had the same file
            if not isinstance(item, _Failure):
                return item
            failure = item
            if not isinstance(failure.error, SpoiltEntryError) or failure.error.path in remade:
                break
            logger.warning("%s: the cache is made anew: %s", failure.error.path, failure.error.reason)
            remade.add(failure.error.path)
            if not self._remake(failure.error.path):
                break
        raise failure.error


def make_loader(
    group: DatasetGroup, *, epoch: int, start: int = 0, first_step: int = 0, **settings: Any
) -> Iterator[Batch]:
    """The batches of a single epoch; `settings` are those of `BatchLoader`."""
    return BatchLoader(group, **settings).epoch(epoch, start=start, first_step=first_step)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker_id: int) -> None:
    """One thread per library, and Ctrl-C left to the training process."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
