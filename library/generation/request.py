"""What one image is asked to be, and the parser of prompt lines that both dialects share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MAX_STEPS = 1000


@dataclass(frozen=True)
class ImageRequest:
    """One image. Sizes are pixels; a field that is None takes the family's own value or is switched off."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 30
    scale: float = 7.5  # classifier-free guidance; off at 1 and below
    negative_scale: float | None = None  # separate weight of the negative prompt
    guidance_scale: float | None = None  # embedded guidance of distilled models
    seed: int | None = None  # None: drawn from the system
    sampler: str = "ddim"
    flow_shift: float | None = None
    clip_skip: int | None = None
    controlnet_image: Path | None = None
    original_size_hw: tuple[int, int] | None = None  # size conditioning; None: the image's own size
    negative_original_size_hw: tuple[int, int] | None = None  # None: `original_size_hw`
    crop_top_left: tuple[int, int] = (0, 0)

    @property
    def uses_guidance(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.scale > 1.0

    def batch_key(self) -> tuple[Any, ...]:
        """What images of one denoising batch must have in common."""
        return (
            self.width, self.height, self.steps, self.scale, self.negative_scale, self.guidance_scale, self.sampler,
            self.flow_shift, self.clip_skip, self.controlnet_image,
        )  # fmt: skip

    def fitted(self, multiple: int, minimum: int = 64) -> ImageRequest:
        """The same request with both sides rounded down to `multiple`, at least `minimum`."""
        return replace(
            self,
            width=max(minimum, self.width - self.width % multiple),
            height=max(minimum, self.height - self.height % multiple),
        )


def batches(requests: list[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
    """Consecutive requests with equal `batch_key`, at most `batch_size` together, in order."""
    batch: list[ImageRequest] = []
    for request in requests:
        if batch and (len(batch) == batch_size or batch[0].batch_key() != request.batch_key()):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


# --- prompt lines ---------------------------------------------------------------------------------------------


class PromptSyntaxError(ValueError):
    """A prompt line that cannot be understood; the message names the option."""


@dataclass(frozen=True)
class PromptLine:
    """A parsed line: the prompt, the values its options set, and what was ignored."""

    prompt: str
    options: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptOption:
    """`--name value` of a prompt line: which key it sets, which text is its value, how it is read."""

    key: str
    pattern: str  # matched at the start of the value
    read: Callable[[str], Any]
    is_strict: bool = False  # a value that matches and cannot be read is an error, not a warning


@dataclass(frozen=True)
class Dialect:
    """The options that lines of one kind know."""

    options: Mapping[str, PromptOption]
    complete: Callable[[dict[str, Any]], None] = field(default=lambda values: None)


_NUMBER = r"[\d.]+"


def _clamped_steps(text: str) -> int:
    return min(MAX_STEPS, max(1, int(text)))


def _scale_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _ints(text: str) -> list[int]:
    return [int(part) if part.isdigit() else _not_a_number(part) for part in text.split(",")]


def _not_a_number(text: str) -> int:
    raise ValueError(f"'{text}' is not a whole number")


def _integer(key: str) -> PromptOption:
    return PromptOption(key, r"\d+", int)


def _whole_number(key: str) -> PromptOption:
    return PromptOption(key, _NUMBER, int)


def _number(key: str) -> PromptOption:
    return PromptOption(key, _NUMBER, float)


def _text(key: str) -> PromptOption:
    return PromptOption(key, r".+", str)


_SHARED = {
    "w": _integer("width"),
    "h": _integer("height"),
    "l": _number("scale"),
    "n": _text("negative_prompt"),
}

TRAINING_SAMPLES = Dialect(
    {
        **_SHARED,
        "s": PromptOption("sample_steps", r"\d+", _clamped_steps),
        "d": _integer("seed"),
        "g": _number("guidance_scale"),
        "ss": _text("sample_sampler"),
        "cn": _text("controlnet_image"),
        "fs": _number("flow_shift"),
        "ctr": _number("cfg_trunc_ratio"),
        "rcfg": _number("renorm_cfg"),
    }
)


def _mark_partial_settings(values: dict[str, Any]) -> None:
    """Any Deep Shrink or Gradual Latent option switches the feature on; -1 stands for "not given here"."""
    if any(key.startswith("ds_") for key in values):
        values.setdefault("ds_depth_1", -1)
    if any(key.startswith("gl_") for key in values):
        values.setdefault("gl_timesteps", -1)


GENERATION = Dialect(
    {
        **_SHARED,
        "s": PromptOption("steps", r"\d+", _clamped_steps),
        "d": PromptOption("seeds", r"[\d,+]+", _ints, is_strict=True),
        "ow": _integer("original_width"),
        "oh": _integer("original_height"),
        "nw": _integer("original_width_negative"),
        "nh": _integer("original_height_negative"),
        "ct": _integer("crop_top"),
        "cl": _integer("crop_left"),
        "nl": PromptOption("negative_scale", rf"{_NUMBER}|none", _scale_or_none),
        "t": _number("strength"),
        "c": _text("clip_prompt"),
        "am": PromptOption("network_muls", r"[\d.,\-]+", _floats),
        "dsd1": _whole_number("ds_depth_1"),
        "dst1": _whole_number("ds_timesteps_1"),
        "dsd2": _whole_number("ds_depth_2"),
        "dst2": _whole_number("ds_timesteps_2"),
        "dsr": _number("ds_ratio"),
        "glt": _whole_number("gl_timesteps"),
        "glr": _number("gl_ratio"),
        "gle": _whole_number("gl_every_n_steps"),
        "gls": _number("gl_ratio_step"),
        "glsn": _number("gl_s_noise"),
        "glus": PromptOption("gl_unsharp_params", r"[\d.,\-]+", str),
        "f": _text("filename"),
    },
    _mark_partial_settings,
)


def parse_prompt_line(line: str, dialect: Dialect) -> PromptLine:
    """`a cat --w 512 --n dog` -> prompt and option values.

    The stripped line is split at " --"; the first piece is the prompt and is never read as an option. The other
    pieces are `name value` with exactly one blank between; names ignore letter case, the last of a name wins.
    Raises PromptSyntaxError for an unreadable seed list; everything else that is not understood is a warning.
    """
    prompt, *pieces = line.strip().split(" --")
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for piece in pieces:
        warning = _read_piece(piece, dialect, values)
        if warning:
            warnings.append(warning)
    dialect.complete(values)
    return PromptLine(prompt, values, tuple(warnings))


def _read_piece(piece: str, dialect: Dialect, values: dict[str, Any]) -> str | None:
    """Set the value that `piece` gives; returns what was ignored, or None."""
    name, blank, text = piece.partition(" ")
    option = dialect.options.get(name.lower())
    if option is None:
        known = ", ".join(f"--{known_name}" for known_name in sorted(dialect.options))
        return f"'--{piece}' is ignored: there is no prompt option '--{name}' (known: {known})"
    match = re.match(option.pattern, text, re.IGNORECASE | re.DOTALL) if blank else None
    if match is None:
        return f"'--{piece}' is ignored: '--{name}' needs one blank and then its value"
    try:
        values[option.key] = option.read(match.group())
    except ValueError as error:
        message = f"'--{piece}': '{match.group()}' is not a value for '--{name}' ({error})"
        if option.is_strict:
            raise PromptSyntaxError(message) from error
        return f"{message}; it is ignored"
    rest = text[match.end():].strip()
    return f"'--{piece}': '{rest}' after the value of '--{name}' is ignored" if rest else None


def padded_multipliers(multipliers: list[float], count: int) -> list[float]:
    """At least `count` network multipliers: missing ones repeat the last one given."""
    return multipliers + [multipliers[-1]] * (count - len(multipliers))
