"""What happens to a stored caption when its sample is fetched: pure functions, all randomness handed in."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from library.config_schema import SubsetConfig

_WILDCARD = re.compile(r"\{([^}]+)\}")
_BRACES = re.compile(r"\{\{|\}\}")


@dataclass(frozen=True)
class CaptionContext:
    """When a caption is processed, and what is replaced in it.

    `is_training` false switches every random step off (validation, cached text): first line, first option,
    all tags in their order, nothing dropped.
    """

    epoch: int  # 1-based
    step: int  # optimizer steps completed
    max_train_steps: int = 0  # resolves a `token_warmup_step` below 1
    is_training: bool = True
    replacements: Mapping[str, str | list[str]] = field(default_factory=dict)  # textual inversion, in order


def random_stream(seed: int, epoch: int, sample: int, purpose: str) -> random.Random:
    """A generator that depends on nothing but its arguments: equal in every process, worker and run."""
    digest = blake2b(f"{seed}/{epoch}/{sample}/{purpose}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def process_caption(caption: str, subset: SubsetConfig, rng: random.Random, context: CaptionContext) -> str:
    """The text that is tokenized for one sample.

    Order: drop, choose the line, prefix and suffix, wildcards, tags, secondary separator, replacements.
    Draws from `rng` in that order, and only where a step is random.
    """
    if context.is_training and _is_dropped(subset, rng, context.epoch):
        return ""
    chosen = _choose_line(caption, subset, rng, context)
    if subset.caption_prefix:
        chosen = f"{subset.caption_prefix} {chosen}"
    if subset.caption_suffix:
        chosen = f"{chosen} {subset.caption_suffix}"
    if subset.enable_wildcard:
        chosen = expand_wildcards(chosen, rng if context.is_training else None)
    if subset.processes_tags:
        chosen = _process_tags(chosen, subset, rng, context)
    if subset.secondary_separator:
        chosen = chosen.replace(subset.secondary_separator, subset.caption_separator)
    return _replace(chosen, rng, context)


def has_choices(caption: str, subset: SubsetConfig) -> bool:
    """Whether the stored caption leaves something to chance through `enable_wildcard` (lines or options)."""
    if not subset.enable_wildcard:
        return False
    text = f"{subset.caption_prefix or ''}{caption}{subset.caption_suffix or ''}"
    return "\n" in caption or any("|" in options for options in _WILDCARD.findall(_BRACES.sub("", text)))


def expand_wildcards(text: str, rng: random.Random | None) -> str:
    """Replace each `{a|b|c}` by one of its options (the first when `rng` is None); `{{` and `}}` are literal.

    Groups do not nest: one runs from a `{` to the next `}`.
    """
    unused = (mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text)  # private use area
    opening, closing = next(unused), next(unused)

    def choose(match: re.Match[str]) -> str:
        options = match.group(1).split("|")
        return options[0] if rng is None else rng.choice(options)

    shielded = text.replace("{{", opening).replace("}}", closing)
    return _WILDCARD.sub(choose, shielded).replace(opening, "{").replace(closing, "}")


def _is_dropped(subset: SubsetConfig, rng: random.Random, epoch: int) -> bool:
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return True
    every = subset.caption_dropout_every_n_epochs
    return every > 0 and epoch > 0 and epoch % every == 0


def _choose_line(caption: str, subset: SubsetConfig, rng: random.Random, context: CaptionContext) -> str:
    lines = caption.split("\n")
    if subset.enable_wildcard and context.is_training and len(lines) > 1:
        return rng.choice(lines)
    return lines[0]


def _process_tags(text: str, subset: SubsetConfig, rng: random.Random, context: CaptionContext) -> str:
    head, flexible, tail = _split_tags(text, subset)
    if context.is_training:
        flexible = flexible[: _warmup_length(len(flexible), subset, context)]
        if subset.shuffle_caption:
            rng.shuffle(flexible)
        rate = subset.caption_tag_dropout_rate
        if rate > 0:
            flexible = [tag for tag in flexible if rng.random() >= rate]
    return ", ".join(head + flexible + tail)


def _split_tags(text: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """(head, flexible, tail): only the flexible tags are shuffled, dropped or held back."""
    separator = subset.caption_separator
    marker = subset.keep_tokens_separator
    if marker and marker in text:
        parts = text.split(marker, 2)
        head, flexible, tail = (
            [tag.strip() for tag in part.split(separator) if tag.strip()] for part in [*parts, ""][:3]
        )
        return head, flexible, tail
    tags = [tag.strip() for tag in text.strip().split(separator)]
    return tags[: subset.keep_tokens], tags[subset.keep_tokens :], []


def _warmup_length(count: int, subset: SubsetConfig, context: CaptionContext) -> int:
    """How many of `count` flexible tags are used at this step."""
    steps = subset.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * context.max_train_steps)
    if steps <= 0 or context.step >= steps:
        return count
    return max(0, math.floor(context.step * (count - subset.token_warmup_min) / steps) + subset.token_warmup_min)


def _replace(text: str, rng: random.Random, context: CaptionContext) -> str:
    for old, new in context.replacements.items():
        if isinstance(new, list):
            new = rng.choice(new) if context.is_training else new[0]
        text = text.replace(old, new) if old else new
    return text
