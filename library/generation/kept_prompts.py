"""Prompts encoded while all text encoders were there, for images that are drawn after some have been released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.families.base import Conditioning, ModelFamily
from library.text.clip import PromptStyle

_Key = tuple[tuple[str, ...], tuple[str, ...], int | None, PromptStyle | None]


class KeptPrompts:
    """Takes the place of `ModelFamily.encode_prompts` for the prompts it was given; others raise ValueError.

    Where all encoders are released, finished conditionings are kept. Where some stay (and change by training), the
    raw outputs of all are kept, and the live ones encode anew each time.
    """

    def __init__(self, family: ModelFamily, *, keeps_encoders: bool) -> None:
        self._family = family
        self._keeps_encoders = keeps_encoders
        self._finished: dict[_Key, tuple[Conditioning, Conditioning]] = {}
        self._outputs: dict[_Key, Mapping[str, Tensor]] = {}

    def keep(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> None:
        """Encode now and remember, on the CPU; every encoder must be on its device."""
        family, key = self._family, (tuple(prompts), tuple(negative_prompts), clip_skip, style)
        if self._keeps_encoders:
            tokens = family.tokenize([*prompts, *negative_prompts])
            self._outputs[key] = {name: array.cpu() for name, array in family.encode_text_for_cache(tokens).items()}
        else:
            positive, negative = family.encode_prompts(prompts, negative_prompts, clip_skip=clip_skip, style=style)
            self._finished[key] = positive.to("cpu"), negative.to("cpu")

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) conditioning. Raises ValueError for prompts that were not kept."""
        key = (tuple(prompts), tuple(negative_prompts), clip_skip, style)
        if key in self._finished:
            return self._finished[key]
        if key in self._outputs:
            return self._family.encode_prompts_with_cached(prompts, negative_prompts, self._outputs[key])
        raise ValueError(
            "this prompt was not in the file when training began, and the text encoders that would encode it have been "
            "released (--cache_text_encoder_outputs)"
        )
