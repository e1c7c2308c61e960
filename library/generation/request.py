"""What one image is asked to be, and the parser of prompt lines that both dialects share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.sampling_spec import SamplingSpec

MAX_STEPS = 1000
MAX_SIDE = 16384  # pixels; sizes and crops of prompt lines
MAX_SEED = 2**64 - 1
NOT_GIVEN = -1  # value of a setting that a line switches on without giving it
AND = " AND "  # between the sub prompts of a prompt


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
    seed: int | None = None  # None: drawn from the system; planned requests always have one
    sampler: str = "ddim"
    flow_shift: float | None = None
    clip_skip: int | None = None
    controlnet_image: Path | None = None
    original_size_hw: tuple[int, int] | None = None  # size conditioning; None: the image's own size
    negative_original_size_hw: tuple[int, int] | None = None  # None: `original_size_hw`
    crop_top_left: tuple[int, int] = (0, 0)
    init_image: Path | None = None  # image to image; drawn at `width` x `height`
    mask_image: Path | None = None  # inpainting
    strength: float | None = None  # 0..1, how much of `init_image` is redrawn; None without one
    network_multipliers: tuple[float, ...] | None = None  # one per network that was not merged; None: as loaded
    output_name: str | None = None  # file name below the output folder, unique within a plan; None: named by the writer
    raw_prompt: str | None = None  # the line after its groups were expanded, without seeds
    clip_prompt: str | None = None  # recorded in the file only

    @property
    def uses_guidance(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.scale > 1.0

    @property
    def sub_prompts(self) -> tuple[str, ...]:
        """The parts of the prompt between ` AND `, one per region; the negative prompt has no parts."""
        return tuple(self.prompt.split(AND))

    def batch_key(self) -> tuple[Any, ...]:
        """What images of one denoising batch must have in common."""
        return (
            self.width, self.height, self.steps, self.scale, self.negative_scale, self.guidance_scale, self.sampler,
            self.flow_shift, self.clip_skip, self.controlnet_image, self.init_image is None, self.mask_image is None,
            self.strength, self.network_multipliers, len(self.sub_prompts),
        )  # fmt: skip

    def fitted(self, multiple: int, minimum: int = 64) -> ImageRequest:
        """The same request with both sides rounded down to `multiple`, at least `minimum`."""
        return replace(
            self,
            width=max(minimum, self.width - self.width % multiple),
            height=max(minimum, self.height - self.height % multiple),
        )


def embedded_guidance(request: ImageRequest, spec: SamplingSpec) -> float | None:
    """The guidance value that a distilled model is told; None for models that have none."""
    default = spec.defaults.guidance_scale
    return request.guidance_scale if default is not None and request.guidance_scale is not None else default


def batches(requests: Iterable[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
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


def _seeds(text: str) -> list[int]:
    return [_seed(part) for part in text.split(",")]


def _seed(text: str) -> int:
    seed = int(text) if text.isdigit() and len(text) <= 20 else -1
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"'{text}' is not a whole number from 0 to {MAX_SEED}")
    return seed


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
    """Any Deep Shrink or Gradual Latent option switches the feature on."""
    if any(key.startswith("ds_") for key in values):
        values.setdefault("ds_depth_1", NOT_GIVEN)
    if any(key.startswith("gl_") for key in values):
        values.setdefault("gl_timesteps", NOT_GIVEN)


GENERATION = Dialect(
    {
        **_SHARED,
        "s": PromptOption("steps", r"\d+", _clamped_steps),
        "d": PromptOption("seeds", r"[\d,+]+", _seeds, is_strict=True),
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
    Tabs and wide blanks around a name are read as blanks, with a warning.
    Raises PromptSyntaxError for an unreadable seed list; everything else that is not understood is a warning.
    """
    line, warnings = _with_plain_blanks(line.strip())
    prompt, *pieces = line.split(" --")
    values: dict[str, Any] = {}
    for piece in pieces:
        warning = _read_piece(piece, dialect, values)
        if warning:
            warnings.append(warning)
    dialect.complete(values)
    return PromptLine(prompt, values, tuple(warnings))


# up to the next option or the border of a group
_SEED_PIECE = re.compile(r" --d (?=[\d,+])[^|{}]*?(?= --|[|{}]|\Z)", re.IGNORECASE)


_NAME = re.compile(r"(\s)--([A-Za-z]\w*)(\s|\Z)")


def _with_plain_blanks(line: str) -> tuple[str, list[str]]:
    """The line with a blank for every other white space before or after the name of an option, and what to tell."""
    warnings: list[str] = []

    def plain(match: re.Match[str]) -> str:
        blanks = match[1] + match[3]
        if odd := blanks.replace(" ", ""):
            warnings.append(f"'--{match[2]}': {odd[0]!r} beside the name is read as a blank")
        return f" --{match[2]}{' ' if match[3] else ''}"

    return _NAME.sub(plain, line), warnings


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


def cut_seeds(line: str) -> tuple[str, list[int] | None, tuple[str, ...]]:
    """The stripped line without its first ` --d <list>`, the seeds of that list (None: there is none), warnings.

    Seeds are read before groups are expanded, wherever they stand. Raises PromptSyntaxError as `parse_prompt_line`.
    """
    line, warnings = _with_plain_blanks(line.strip())
    found = _SEED_PIECE.search(line)
    if found is None:
        return line, None, tuple(warnings)
    values: dict[str, Any] = {}
    warning = _read_piece(found.group().removeprefix(" --").rstrip(), GENERATION, values)
    warnings += [warning] if warning else []
    glue = " " if line[found.end() : found.end() + 1] == "{" else ""
    rest = (line[: found.start()] + glue + line[found.end() :]).strip()
    return rest, values["seeds"], tuple(warnings)


# --- what a line asks for -------------------------------------------------------------------------------------

#: what lines can ask for and nothing draws yet: key of an option (or AND) -> reason; such a line is refused
NOT_YET_INLINE: Mapping[str, str] = {
    **dict.fromkeys(
        ("ds_depth_1", "ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"), "Deep Shrink is not supported yet"
    ),
    **dict.fromkeys(
        ("gl_timesteps", "gl_ratio", "gl_every_n_steps", "gl_ratio_step", "gl_s_noise", "gl_unsharp_params"),
        "Gradual Latent is not supported yet",
    ),
    "AND": "regions (AND) are not supported yet",
}

#: keys that matter only to models with size conditioning
SIZE_CONDITIONING = (
    "original_width", "original_height", "original_width_negative", "original_height_negative", "crop_top", "crop_left",
)  # fmt: skip

# key -> smallest and largest value
_LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("width", "height"), (1, MAX_SIDE)),
    **dict.fromkeys(SIZE_CONDITIONING, (0, MAX_SIDE)),
    "strength": (0.0, 1.0),
    "scale": (0.0, 1e6),
    "negative_scale": (0.0, 1e6),
}
_PLAIN_FIELDS = (
    "width", "height", "steps", "scale", "negative_scale", "strength", "negative_prompt", "clip_prompt",
)  # fmt: skip
_NAMES = {option.key: name for name, option in GENERATION.options.items()}


def line_request(line: PromptLine, template: ImageRequest) -> ImageRequest:
    """`template` with the prompt and the options of a parsed generation line; seeds are left to the plan.

    Sizes that condition the model and are given in part are completed from the template, else from the image's size.
    Raises PromptSyntaxError that names the option for values out of range and for what is not supported yet.
    """
    values = line.options
    for key, value in values.items():
        if key in NOT_YET_INLINE and value != NOT_GIVEN:
            raise PromptSyntaxError(f"'--{option_name(key)}': {NOT_YET_INLINE[key]}")
        _check_limits(key, value)
    fields = {key: values[key] for key in _PLAIN_FIELDS if key in values}
    if "network_muls" in values:
        fields["network_multipliers"] = tuple(values["network_muls"])
    if "filename" in values:
        fields["output_name"] = values["filename"]
    request = replace(template, prompt=line.prompt, **fields)
    return replace(request, **size_conditioning(values, request))


def option_name(key: str) -> str:
    """The name of the option of generation lines that sets `key`."""
    return _NAMES[key]


def _check_limits(key: str, value: Any) -> None:
    if key in _LIMITS and value is not None:
        low, high = _LIMITS[key]
        if not low <= value <= high:
            raise PromptSyntaxError(f"'--{_NAMES[key]} {value}': it must be from {low:g} to {high:g}")
    elif key == "network_muls" and not all(math.isfinite(multiplier) for multiplier in value):
        raise PromptSyntaxError(f"'--{_NAMES[key]}' {value}: the multipliers must be finite numbers")


def size_conditioning(values: Mapping[str, Any], request: ImageRequest) -> dict[str, Any]:
    """The fields of a request that `values` (keys of `SIZE_CONDITIONING`) change; halves are completed from it."""
    fields: dict[str, tuple[int, int]] = {}
    own = request.original_size_hw or (request.height, request.width)
    for field_name, height, width, default in (
        ("original_size_hw", "original_height", "original_width", lambda: own),
        (
            "negative_original_size_hw", "original_height_negative", "original_width_negative",
            lambda: request.negative_original_size_hw or fields.get("original_size_hw", own),
        ),
        ("crop_top_left", "crop_top", "crop_left", lambda: request.crop_top_left),
    ):  # fmt: skip
        if height in values or width in values:
            default_hw = default()
            fields[field_name] = values.get(height, default_hw[0]), values.get(width, default_hw[1])
    return fields
