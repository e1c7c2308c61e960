"""Long captions as several windows of 77 tokens, and their encoder outputs as one sequence again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 75  # text tokens per window
WINDOW = CHUNK + 2


@dataclass(frozen=True)
class SpecialIds:
    """The tokenizer's start, end and padding ids."""

    start: int
    end: int
    pad: int


def chunk_count(max_token_length: int | None) -> int:
    """Windows for a `max_token_length` without specials: None -> 1, 150 -> 2, 225 -> 3.

    Raises ValueError if it is not a positive multiple of 75.
    """
    length = max_token_length or CHUNK
    if length < CHUNK or length % CHUNK:
        raise ValueError(f"--max_token_length {max_token_length}: allowed are none (75), 150 and 225.")
    return length // CHUNK


def chunk_ids(text_ids: Sequence[int], special: SpecialIds, chunks: int = 1) -> list[list[int]]:
    """Text token ids (no specials) -> `chunks` windows of 77 ids; what does not fit is cut.

    With a padding token of its own a full window ends in the end token, and an unused one is start, end, pad….
    """
    length = chunks * CHUNK + 2
    ids = [special.start, *text_ids[: length - 2], special.end]
    ids += [special.pad] * (length - len(ids))
    if chunks == 1:
        return [ids]
    windows = []
    for index in range(chunks):
        window = [ids[0], *ids[1 + index * CHUNK : 1 + (index + 1) * CHUNK], ids[-1]]
        if special.pad != special.end:
            if window[-2] not in (special.end, special.pad):
                window[-1] = special.end
            if window[1] == special.pad:
                window[1] = special.end
        windows.append(window)
    return windows


def splice(values: Tensor, chunks: int) -> Tensor:
    """Windows [B*n,77,…] or [B,n,77,…] -> [B,75n+2,…]: the first start, every window's 75 text positions, the last end.

    One window stays as it is: [B,77,…].
    """
    if values.dim() > 2 and values.shape[1] == chunks and values.shape[2] == WINDOW:
        values = values.flatten(0, 1)
    if chunks == 1:
        return values
    windows = values.unflatten(0, (-1, chunks))
    inner = windows[:, :, 1:-1].flatten(1, 2)
    return torch.cat([windows[:, 0, :1], inner, windows[:, -1, -1:]], dim=1)


def join(values: Tensor, chunks: int) -> Tensor:
    """Windows [B*n,77,…] -> [B,77n,…]: every window keeps its start and end (generation)."""
    return values.unflatten(0, (-1, chunks)).flatten(1, 2)
