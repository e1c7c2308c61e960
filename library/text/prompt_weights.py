"""`(word:1.2)` and `[word]`: parsing weighted text, and applying the weights to encoder outputs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from library.text.chunking import CHUNK, WINDOW

logger = logging.getLogger(__name__)

Emphasis = Literal["original", "abs", "none"]

_ROUND = 1.1
_SQUARE = 1 / 1.1
_NUMBER = re.compile(r":([+-]?[.\d]+)\)")
_SPECIAL = re.compile(r"[\\()\[\]:]")
_BREAK = re.compile(r"\b(BREAK)\b")
BREAK = "BREAK"  # the text of a run that ends a window


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Weighted text -> runs of (text, weight); neighbours of equal weight are one run, empty text is one empty run.

    `(x)` multiplies by 1.1, `[x]` by 1/1.1, `(x:1.3)` by 1.3; brackets nest; `\\( \\) \\[ \\] \\\\` are literal.
    An unclosed bracket reaches to the end, an unmatched closing one is text.
    Raises ValueError for a weight such as 1.2.3, naming it and the text.
    """
    runs: list[list] = []  # [text, weight]
    round_starts: list[int] = []
    square_starts: list[int] = []

    def close(start: int, factor: float) -> None:
        for run in runs[start:]:
            run[1] *= factor

    position = 0
    while position < len(text):
        character = text[position]
        number = _NUMBER.match(text, position) if character == ":" and round_starts else None
        step = 1
        if character == "\\":
            literal = text[position + 1 : position + 2]
            if literal in ("(", ")", "[", "]", "\\") and literal:
                runs.append([literal, 1.0])
                step = 2
        elif character == "(":
            round_starts.append(len(runs))
        elif character == "[":
            square_starts.append(len(runs))
        elif number:
            close(round_starts.pop(), _weight(number[1], text))
            step = len(number[0])
        elif character == ")" and round_starts:
            close(round_starts.pop(), _ROUND)
        elif character == "]" and square_starts:
            close(square_starts.pop(), _SQUARE)
        else:
            step = _plain_length(text, position)
            runs.append([text[position : position + step], 1.0])
        position += step
    for start in round_starts:
        close(start, _ROUND)
    for start in square_starts:
        close(start, _SQUARE)
    return _merge(runs)


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"prompt syntax: {number!r} is not a weight, in: {text}")
    return weight


def _plain_length(text: str, position: int) -> int:
    """Characters from `position` on that are text: at least one, up to the next one that may mean something."""
    match = _SPECIAL.search(text, position + 1)
    return (match.start() if match else len(text)) - position


def _merge(runs: list[list]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in runs:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def split_breaks(runs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The same runs with every stand-alone upper-case `BREAK` as a run `BREAK` of its own."""
    split = [(part, weight) for text, weight in runs for part in _BREAK.split(text) if part]
    return split or [("", 1.0)]


def weighted_ids(
    runs: Sequence[tuple[str, float]], token_ids: Callable[[str], Sequence[int]], *, pad: int | None = None
) -> tuple[list[int], list[float]]:
    """Token ids and a weight for each; every run is tokenized alone.

    With `pad` given, a `BREAK` run fills the current 75 tokens with it at weight 1 (nothing at their very start).
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in runs:
        if text == BREAK and pad is not None:
            added = [pad] * (-len(ids) % CHUNK)
            weight = 1.0
        else:
            added = list(token_ids(text))
        ids += added
        weights += [weight] * len(added)
    return ids, weights


def chunk_weights(weights: Sequence[float], chunks: int = 1) -> list[list[float]]:
    """Weights of text tokens -> `chunks` windows of 77; start, end and padding weigh 1."""
    inner = list(weights[: chunks * CHUNK])
    inner += [1.0] * (chunks * CHUNK - len(inner))
    return [[1.0, *inner[i * CHUNK : (i + 1) * CHUNK], 1.0] for i in range(chunks)]


def multiply(hidden: Tensor, weights: Tensor) -> Tensor:
    """Encoder output [B,S,d] times one weight per position [B,S]; no renormalisation (training captions)."""
    return hidden * weights.to(hidden)[..., None]


def emphasize(hidden: Tensor, weights: Tensor, emphasis: Emphasis = "original") -> Tensor:
    """Encoder output [B,S,d] with prompt weights [B,S] (generation).

    "original" restores the mean of each prompt afterwards, "abs" the mean of the absolute values, "none" neither.
    Means are taken in float32 over all positions and features of one prompt.
    """
    if bool((weights == 1).all()):
        return hidden
    weighted = multiply(hidden, weights)
    if emphasis == "none":
        return weighted
    before, after = hidden.float(), weighted.float()
    if emphasis == "abs":
        before, after = before.abs(), after.abs()
    factor = before.mean(dim=(-2, -1)) / after.mean(dim=(-2, -1))
    return weighted * factor.to(weighted)[:, None, None]


def weight_tensor(rows: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """Windows of weights for every caption -> float32 [B,n,77]."""
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1, WINDOW)
