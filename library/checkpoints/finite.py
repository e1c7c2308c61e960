"""NaN and infinite numbers in files: found once, when a tensor is read for use; refused, or a warning when drawing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_SHOWN = 5  # tensors that a message names

Found = list[tuple[str, int]]
#: where findings are collected while they are only warned about: source -> tensors; None: they are refused
_collected: ContextVar[dict[str, Found] | None] = ContextVar("collected", default=None)


def count_non_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite; a finite tensor costs one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return 0
    if tensor.dtype.itemsize == 1:  # torch cannot compare 8-bit floats
        tensor = tensor.to(torch.bfloat16)
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def non_finite(tensors: Mapping[str, Tensor]) -> Found:
    """(name, how many elements are NaN or infinite) of every tensor that has such."""
    counts = ((name, count_non_finite(tensor)) for name, tensor in tensors.items())
    return [(name, count) for name, count in counts if count]


def notice_non_finite(source: str, found: Found) -> None:
    """Raises ValueError that names file, tensors and counts; inside `only_warned` it is kept for the warning."""
    collected = _collected.get()
    if collected is not None:
        if found:
            collected.setdefault(source, []).extend(found)
    elif found:
        raise ValueError(
            f"{source} is spoilt: {_described(found)}. Nothing sensible can be made from it; use a sound copy."
        )


def check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """`notice_non_finite` for tensors about to be used."""
    notice_non_finite(source, non_finite(tensors))


@contextmanager
def only_warned() -> Iterator[None]:
    """Inside, files with NaN or infinite numbers are used; afterwards each of them gets one warning."""
    findings: dict[str, Found] = {}
    token = _collected.set(findings)
    try:
        yield
    finally:
        _collected.reset(token)
        for source, found in findings.items():
            logger.warning("%s is spoilt, expect black or broken pictures: %s", source, _described(found))


def _described(found: Found) -> str:
    found = list(dict(found).items())
    parts = [f"{name} ({count})" for name, count in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more tensors" if len(found) > _SHOWN else ""
    return f"NaN or infinite numbers in {', '.join(parts)}{more}"
