"""Conversions of options whose text stands for several numbers."""

from __future__ import annotations

from typing import Any

#: embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, output
BLOCK_RATES = 1 + 9 + 3 + 9 + 1


def read_resolution(value: Any) -> tuple[int, int]:
    """`512`, `"512,768"` or `[512, 768]` -> (width, height). Raises ValueError."""
    parts = _parts(value)
    try:
        numbers = [_whole(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{value!r} is not a size: give one whole number, or width,height such as 512,768")
    return numbers[0], numbers[-1]


def read_face_crop_range(value: Any) -> tuple[float, float]:
    """`"2.0,4.0"` or `[2.0, 4.0]` -> (low, high). Raises ValueError."""
    parts = _parts(value)
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise ValueError(f"{value!r} is not a range: give two numbers low,high such as 2.0,4.0")
    return numbers[0], numbers[1]


def read_block_rates(value: Any) -> tuple[float, ...]:
    """`"1e-5,0,..."` or a list -> one learning rate per block of the U-Net. Raises ValueError."""
    parts = _parts(value)
    try:
        rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        rates = ()
    if len(rates) != BLOCK_RATES or min(rates) < 0:
        raise ValueError(
            f"{value!r} is not a list of {BLOCK_RATES} learning rates: give {BLOCK_RATES} numbers of at least 0, "
            f"separated by commas"
        )
    return rates


def _parts(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return value.split(",") if isinstance(value, str) else [value]


def _whole(part: Any) -> int:
    if isinstance(part, bool) or (isinstance(part, float) and not part.is_integer()):
        raise ValueError
    return int(part)
