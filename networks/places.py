"""Where the change of a layer belongs in our models, if other programs know the layer under another name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One of our layers, or rows of it.

    `rows` (begin, end, all) counts in shares of the layer's output: (1, 2, 3) is the second third. With
    `may_swap` the other program may hold scale and shift of a modulation in the opposite order: it does so in layers
    that give nothing but these two, twice as wide as their input.
    """

    layer: str
    rows: tuple[int, int, int] | None = None
    may_swap: bool = False


def joined(layer: str, parts: Mapping[str, tuple[int, int]]) -> dict[str, Place]:
    """Their layers -> where they stand in our `layer`, which holds all of them; a part is (begin, end)."""
    whole = max(end for _, end in parts.values())
    return {theirs: Place(layer, (begin, end, whole)) for theirs, (begin, end) in parts.items()}


def queries_keys_values(layer: str, theirs: str) -> dict[str, Place]:
    """Three layers, `theirs` with q, k and v in the place of the braces, that are one of ours."""
    return joined(layer, {theirs.format(letter): (index, index + 1) for index, letter in enumerate("qkv")})
