"""The same function over many files, in threads, with a progress bar for what takes longer than a moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 64  # files per task: a task costs more than a small file
_SILENT_SECONDS = 3


def map_files(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, *, threads: int | None = None
) -> list[Result]:
    """`[function(item) for item in items]`, with a bar named `description`; `threads` is by default one per CPU.

    The first exception that `function` raises ends it.
    """
    from tqdm import tqdm

    def work(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + _CHUNK]]

    def results() -> Iterator[Result]:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for chunk in pool.map(work, range(0, len(items), _CHUNK)):
                yield from chunk

    return list(tqdm(results(), total=len(items), desc=description, unit="image", delay=_SILENT_SECONDS))
