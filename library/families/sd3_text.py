"""How Stable Diffusion 3 reads captions: three tokenizers, and the places of the encoders in what the model sees."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.families.base import Conditioning
from library.text.chunking import WINDOW, chunk_ids
from library.text.clip import ClipTokenizer
from library.text.t5 import T5Tokenizer


class Sd3Tokenize:
    """Captions -> ids and masks (1 for text with its start and end) of every encoder; picklable.

    {"clip_l", "clip_g", "clip_l_mask", "clip_g_mask": int64 [B,77]; with a T5 "t5xxl", "t5xxl_mask": int64 [B,T]}.
    """

    def __init__(self, clips: Mapping[str, ClipTokenizer], t5_tokenizer: T5Tokenizer | None, t5_length: int) -> None:
        self.clips = dict(clips)
        self.t5_tokenizer = t5_tokenizer
        self.t5_length = t5_length

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        tokens: dict[str, Tensor] = {}
        for name, tokenizer in self.clips.items():
            texts = [tokenizer.text_ids(caption) for caption in captions]
            rows = [chunk_ids(ids, tokenizer.special)[0] for ids in texts]
            ends = torch.tensor([min(len(ids) + 2, WINDOW) for ids in texts], dtype=torch.int64)
            tokens[name] = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), WINDOW)
            tokens[f"{name}_mask"] = (torch.arange(WINDOW)[None] < ends[:, None]).to(torch.int64)
        if self.t5_tokenizer is not None:
            tokens["t5xxl"], tokens["t5xxl_mask"] = self.t5_tokenizer.ids_and_mask(captions, self.t5_length)
        return tokens


@dataclass(frozen=True)
class DropRates:
    """Probabilities with which a sample does without one of the encoders."""

    clip_l: float = 0.0
    clip_g: float = 0.0
    t5xxl: float = 0.0


def dropped(
    conditioning: Conditioning, rates: DropRates, places: Sequence[tuple[slice, slice]]
) -> Conditioning:
    """{"context" [B,77+T,w], "vector" [B,v]} with zeros where a sample does without an encoder.

    `places` are those of `clip_places`. Draws from Python's generator, for encoders with a rate above 0 only: per
    sample first CLIP-L, then CLIP-G; after all samples T5.
    """
    context, vector = conditioning["context"], conditioning["vector"]
    in_context, in_vector = (torch.zeros_like(item, dtype=torch.bool) for item in (context, vector))
    for row in range(len(context)):
        for rate, (states, pooled) in zip((rates.clip_l, rates.clip_g), places, strict=True):
            if rate and random.random() < rate:
                in_context[row, :WINDOW, states] = True
                in_vector[row, pooled] = True
    for row in range(len(context)):
        if rates.t5xxl and random.random() < rates.t5xxl:
            in_context[row, WINDOW:] = True
    return Conditioning({"context": context.masked_fill(in_context, 0), "vector": vector.masked_fill(in_vector, 0)})


def clip_places(configs: Sequence[Any]) -> list[tuple[slice, slice]]:
    """For each CLIP encoder its features in the joined states, and in the joined projected states."""
    places, states, pooled = [], 0, 0
    for config in configs:
        ends = states + config.hidden_size, pooled + config.projection_dim
        places.append((slice(states, ends[0]), slice(pooled, ends[1])))
        states, pooled = ends
    return places
