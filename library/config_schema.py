"""The dataset configuration: its frozen records, and the table of keys that a dataset file may contain."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from library.options.errors import UserError

Kind = Literal["dreambooth", "fine_tuning", "controlnet"]
Level = Literal["general", "dataset", "subset"]

KIND_NAMES: dict[Kind, str] = {
    "dreambooth": "DreamBooth",
    "fine_tuning": "fine-tuning (metadata_file)",
    "controlnet": "ControlNet/mask (conditioning_data_dir)",
}
LEVEL_NAMES: dict[Level, str] = {
    "general": "[general]",
    "dataset": "[[datasets]]",
    "subset": "[[datasets.subsets]]",
}
LONGEST_SIDE = 65536  # pixels; the largest that image files can have
MOST = 1_000_000  # of anything that is counted, so that a slip of the finger does not fill the memory
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


class ConfigError(UserError):
    """Everything that is wrong with a dataset configuration, one line per problem."""


@dataclass(frozen=True)
class SupportedKinds:
    """The dataset kinds a script trains with, and whether it can drop captions.

    `controlnet` is true for ControlNet scripts, and for the others when `--masked_loss` is given.
    """

    dreambooth: bool = True
    fine_tuning: bool = True
    controlnet: bool = False
    caption_dropout: bool = True

    def kinds(self) -> tuple[Kind, ...]:
        """The supported kinds, in the order in which datasets are recognised."""
        order: tuple[Kind, ...] = ("controlnet", "fine_tuning", "dreambooth")
        return tuple(kind for kind in order if getattr(self, kind))


@dataclass(frozen=True)
class SubsetConfig:
    """One image directory (or metadata file) with its caption and augmentation options; every value is final."""

    kind: Kind = "dreambooth"
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False
    alpha_mask: bool = False
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    resize_interpolation: str | None = None  # already the dataset's where the subset has none
    validation_split: float = 0.0
    validation_seed: int | None = None
    location: str = ""  # for messages: "dataset.toml, datasets[0].subsets[1]"

    @property
    def processes_tags(self) -> bool:
        """Whether captions are split into tags; otherwise their spacing is left alone."""
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0


@dataclass(frozen=True)
class DatasetConfig:
    """One resolution, one batch size, one set of buckets; min/max are multiples of the steps when bucketing."""

    resolution: tuple[int, int]  # width, height
    subsets: tuple[SubsetConfig, ...]
    kind: Kind = "dreambooth"
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    validation_split: float = 0.0
    validation_seed: int | None = None
    resize_interpolation: str | None = None
    location: str = ""  # for messages: "dataset.toml, datasets[0]"


@dataclass(frozen=True)
class DataConfig:
    """All datasets of a run."""

    datasets: tuple[DatasetConfig, ...]
    source: str  # the dataset file, or the options that named the folders
    from_file: bool


# --- checks of single values: each returns (value, "") or (None, what was expected) ---------------------------

Check = Callable[[Any], tuple[Any, str]]

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value of the file for a message, in one short line."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number with too many digits"


def shown_key(name: str) -> str:
    """A key of the file for a message."""
    return name if re.fullmatch(r"[\w-]{1,60}", name) else shown(name)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def expected(kind: str) -> str:
    """The phrase of a type error."""
    return f"expected {kind} for dictionary value"


def _boolean(value: Any) -> tuple[Any, str]:
    return (value, "") if isinstance(value, bool) else (None, expected("bool"))


def _text(value: Any) -> tuple[Any, str]:
    if not isinstance(value, str):
        return None, expected("str")
    return (None, "the text holds half of a surrogate pair") if _HALF_PAIR.search(value) else (value, "")


def _filled_text(value: Any) -> tuple[Any, str]:
    return (None, "the value must not be empty") if value == "" else _text(value)


def _path(value: Any) -> tuple[Any, str]:
    if isinstance(value, str) and "\0" in value:
        return None, "a path cannot hold a zero character"
    return _filled_text(value)


def _table(value: Any) -> tuple[Any, str]:
    return (dict(value), "") if isinstance(value, Mapping) else (None, expected("table"))


def _integer(minimum: int | None = None, maximum: int = MOST) -> Check:
    def check(value: Any) -> tuple[Any, str]:
        if not _is_int(value):
            return None, expected("int")
        if minimum is not None and value < minimum:
            return None, f"the value must be at least {minimum}"
        return (value, "") if value <= maximum else (None, f"the value must be at most {maximum}")

    return check


def _number(minimum: float | None = None, maximum: float | None = None, *, keep_int: bool = False) -> Check:
    def check(value: Any) -> tuple[Any, str]:
        if not _is_number(value):
            return None, expected("int or float" if keep_int else "float")
        low, high = -math.inf if minimum is None else minimum, math.inf if maximum is None else maximum
        if not low <= value <= high or not -sys.float_info.max <= value <= sys.float_info.max:
            if maximum is not None:
                return None, f"the value must be between {minimum:g} and {maximum:g}"
            return None, "the value must be a finite number" + ("" if minimum is None else f", at least {minimum:g}")
        return (value if keep_int else float(value)), ""

    return check


def _resolution(value: Any) -> tuple[Any, str]:
    pair = [value, value] if _is_int(value) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_int(side) for side in pair):
        return None, expected("int or [int, int] (width, height)")
    if min(pair) < 1:
        return None, "both sides must be at least 1"
    if max(pair) > LONGEST_SIDE:
        return None, f"both sides must be at most {LONGEST_SIDE}"
    return (pair[0], pair[1]), ""


def _face_crop_range(value: Any) -> tuple[Any, str]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_number(n) for n in value):
        return None, expected("[float, float]")
    if not 0 < value[0] <= value[1] <= sys.float_info.max:
        return None, "both numbers must be greater than 0, and the first must not exceed the second"
    return (float(value[0]), float(value[1])), ""


def _interpolation(value: Any) -> tuple[Any, str]:
    if isinstance(value, str) and value not in INTERPOLATIONS:
        return None, "the value must be one of " + ", ".join(INTERPOLATIONS)
    return _text(value)


def _extension(value: Any) -> tuple[Any, str]:
    value, problem = _filled_text(value)
    return (value, problem) if problem or value.startswith(".") else ("." + value, "")


# --- the table of keys ----------------------------------------------------------------------------------------

_ALL: tuple[Kind, ...] = ("dreambooth", "fine_tuning", "controlnet")
_ANY_LEVEL: tuple[Level, ...] = ("general", "dataset", "subset")


@dataclass(frozen=True)
class Key:
    """One key of the dataset file: where it may stand, for which kinds, and what its value must be."""

    check: Check
    levels: tuple[Level, ...] = _ANY_LEVEL
    kinds: tuple[Kind, ...] = _ALL
    option: str | None = None  # attribute of the command line that fills it in; None: there is none
    is_caption_dropout: bool = False
    required_for: tuple[Kind, ...] = ()


_DATASET: tuple[Level, ...] = ("general", "dataset")
_SUBSET: tuple[Level, ...] = ("subset",)

DATASET_KEYS: dict[str, Key] = {
    "resolution": Key(_resolution, _DATASET, option="resolution"),
    "batch_size": Key(_integer(1), _DATASET, option="train_batch_size"),
    "enable_bucket": Key(_boolean, _DATASET, option="enable_bucket"),
    "min_bucket_reso": Key(_integer(1, LONGEST_SIDE), _DATASET, option="min_bucket_reso"),
    "max_bucket_reso": Key(_integer(1, LONGEST_SIDE), _DATASET, option="max_bucket_reso"),
    "bucket_reso_steps": Key(_integer(1, LONGEST_SIDE), _DATASET, option="bucket_reso_steps"),
    "bucket_no_upscale": Key(_boolean, _DATASET, option="bucket_no_upscale"),
    "network_multiplier": Key(_number(), _DATASET),
    "validation_split": Key(_number(0, 1), option="validation_split"),
    "validation_seed": Key(_integer(maximum=2**63), option="validation_seed"),
    "resize_interpolation": Key(_interpolation, option="resize_interpolation"),
}

SUBSET_KEYS: dict[str, Key] = {
    "image_dir": Key(_path, _SUBSET, required_for=("dreambooth", "controlnet")),
    "metadata_file": Key(_path, _SUBSET, ("fine_tuning",), required_for=("fine_tuning",)),
    "conditioning_data_dir": Key(_path, _SUBSET, ("controlnet",), required_for=("controlnet",)),
    "num_repeats": Key(_integer(0), option="dataset_repeats"),
    "is_reg": Key(_boolean, _SUBSET, ("dreambooth",)),
    "class_tokens": Key(_text, kinds=("dreambooth",)),
    "caption_extension": Key(_extension, kinds=("dreambooth", "controlnet"), option="caption_extension"),
    "cache_info": Key(_boolean, kinds=("dreambooth", "controlnet"), option="cache_info"),
    "alpha_mask": Key(_boolean, _SUBSET, ("dreambooth", "fine_tuning"), option="alpha_mask"),
    "shuffle_caption": Key(_boolean, option="shuffle_caption"),
    "caption_separator": Key(_filled_text, option="caption_separator"),
    "keep_tokens": Key(_integer(0), option="keep_tokens"),
    "keep_tokens_separator": Key(_text, option="keep_tokens_separator"),
    "secondary_separator": Key(_text, option="secondary_separator"),
    "enable_wildcard": Key(_boolean, option="enable_wildcard"),
    "caption_prefix": Key(_text, option="caption_prefix"),
    "caption_suffix": Key(_text, option="caption_suffix"),
    "color_aug": Key(_boolean, option="color_aug"),
    "flip_aug": Key(_boolean, option="flip_aug"),
    "random_crop": Key(_boolean, option="random_crop"),
    "face_crop_aug_range": Key(_face_crop_range, option="face_crop_aug_range"),
    "token_warmup_min": Key(_integer(0), option="token_warmup_min"),
    "token_warmup_step": Key(_number(0, keep_int=True), option="token_warmup_step"),
    "caption_dropout_rate": Key(_number(0, 1), option="caption_dropout_rate", is_caption_dropout=True),
    "caption_dropout_every_n_epochs": Key(
        _integer(0), option="caption_dropout_every_n_epochs", is_caption_dropout=True
    ),
    "caption_tag_dropout_rate": Key(_number(0, 1), option="caption_tag_dropout_rate", is_caption_dropout=True),
    "custom_attributes": Key(_table),
    "resize_interpolation": DATASET_KEYS["resize_interpolation"],
    "validation_split": DATASET_KEYS["validation_split"],
    "validation_seed": DATASET_KEYS["validation_seed"],
}

KEYS: dict[str, Key] = {**DATASET_KEYS, **SUBSET_KEYS}

COMMAND_LINE_ONLY = ("debug_dataset", "prior_loss_weight", "max_token_length")
OPTION_NAMES: dict[str, str] = {  # a command-line name written into the file -> the file's key
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",
    "train_data_dir": "image_dir",
    "reg_data_dir": "image_dir",
    "in_json": "metadata_file",
}
