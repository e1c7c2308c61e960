"""Prompt files of training samples: .txt lines, .toml tables, .json lists -> image requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.generation.request import MAX_SEED, MAX_SIDE, MAX_STEPS, TRAINING_SAMPLES, ImageRequest, parse_prompt_line
from library.generation.samplers import check_sampler
from library.options.toml_text import decoded, parsed
from library.sampling_spec import SamplingDefaults
from library.text.prompt_weights import parse_weights

EXTENSIONS = (".txt", ".toml", ".json")

# key in structured files -> (field of ImageRequest, accepted types)
_FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "prompt": ("prompt", (str,)),
    "negative_prompt": ("negative_prompt", (str,)),
    "width": ("width", (int,)),
    "height": ("height", (int,)),
    "seed": ("seed", (int,)),
    "sample_steps": ("steps", (int,)),
    "scale": ("scale", (int, float)),
    "guidance_scale": ("guidance_scale", (int, float)),
    "sample_sampler": ("sampler", (str,)),
    "controlnet_image": ("controlnet_image", (str,)),
    "flow_shift": ("flow_shift", (int, float, str)),
}
_OTHER_MODELS = ("cfg_trunc_ratio", "renorm_cfg")  # understood, meant for models that are not here
_MINIMUM = {"width": 1, "height": 1, "seed": 0, "scale": 0, "guidance_scale": 0}
_MAXIMUM = {"width": MAX_SIDE, "height": MAX_SIDE, "seed": MAX_SEED}


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file: its 0-based position, where it stands, and its text line or table."""

    index: int
    source: str
    content: Any

    def request(
        self, defaults: SamplingDefaults, sampler: str, *, reads_weights: bool = False
    ) -> tuple[ImageRequest, tuple[str, ...]]:
        """The image this entry asks for, and warnings about what was ignored.

        Sizes are rounded down to `defaults.size_multiple`; with `reads_weights` the weights in the texts are checked.
        Raises ValueError that names file and place.
        """
        if isinstance(self.content, str):
            line = parse_prompt_line(self.content, TRAINING_SAMPLES)
            values, warnings = {"prompt": line.prompt, **line.options}, line.warnings
        elif isinstance(self.content, Mapping):
            values, warnings = dict(self.content), ()
        else:
            raise ValueError(f"{self.source}: a prompt is a line of text or a table, not {self.content!r}")
        warnings += tuple(
            f"'{key}' has no effect on these models" if key in _OTHER_MODELS else f"unknown key '{key}' is ignored"
            for key in values
            if key not in _FIELDS
        )
        fields = {"sampler": sampler, **defaults.request_fields()}
        for key, value in values.items():
            if key in _FIELDS and value is not None:
                name, types = _FIELDS[key]
                fields[name] = self._checked(key, value, types)
        if "prompt" not in fields:
            raise ValueError(f"{self.source}: the entry has no 'prompt'")
        self._check_texts(fields, reads_weights=reads_weights)
        if "controlnet_image" in fields:
            fields["controlnet_image"] = Path(fields["controlnet_image"])
        return ImageRequest(**fields).fitted(defaults.size_multiple), tuple(f"{self.source}: {w}" for w in warnings)

    def _check_texts(self, fields: Mapping[str, Any], *, reads_weights: bool) -> None:
        try:
            check_sampler(fields["sampler"], self.source)
            if reads_weights:
                for text in (fields["prompt"], fields.get("negative_prompt", "")):
                    parse_weights(text)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(self.source) else f"{self.source}: {error}") from error

    def _checked(self, key: str, value: Any, types: tuple[type, ...]) -> Any:
        is_of_type = isinstance(value, types) and not isinstance(value, bool)
        if not is_of_type:
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{self.source}: '{key}' is {value!r}, it must be {wanted}")
        if key == "flow_shift":
            try:
                value = float(value)
            except ValueError as error:
                raise ValueError(f"{self.source}: 'flow_shift' is {value!r}, it must be a number") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.source}: '{key}' is {value!r}, it must be a finite number")
        if key in _MINIMUM and value < _MINIMUM[key]:
            raise ValueError(f"{self.source}: '{key}' is {value!r}, it must be at least {_MINIMUM[key]}")
        if key in _MAXIMUM and value > _MAXIMUM[key]:
            raise ValueError(f"{self.source}: '{key}' is {value!r}, it must be at most {_MAXIMUM[key]}")
        return min(MAX_STEPS, max(1, value)) if key == "sample_steps" else value


def check_prompt_file(path: Path, option: str = "--sample_prompts") -> None:
    """Raise FileNotFoundError or ValueError unless `path` is a file of a known kind."""
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"{option} {path}: the file name must end in {', '.join(EXTENSIONS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")


def read_prompt_file(path: Path) -> list[PromptEntry]:
    """All prompts of a .txt, .toml or .json file, in order; contents of entries are checked by `request`.

    Text: one prompt per line, blank lines and lines that begin with '#' are skipped. TOML: table `[prompt]` with
    common keys and `[[prompt.subset]]` tables, whose own keys win. JSON: a list of tables or of text lines.
    Raises ValueError when the file as a whole cannot be read.
    """
    check_prompt_file(path)
    try:
        text = _decoded(path)
        return {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}[path.suffix.lower()](path, text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the prompt file cannot be read: {error}") from error


def _decoded(path: Path) -> str:
    try:
        return decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise ValueError(f"{path}: the prompt file cannot be read: {error}") from error


def _text_entries(path: Path, text: str) -> list[PromptEntry]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip() and line[0] != "#"]
    return [PromptEntry(i, f"{path}, line {number}", line.strip()) for i, (number, line) in enumerate(lines)]


def _toml_entries(path: Path, text: str) -> list[PromptEntry]:
    try:
        table = parsed(text).get("prompt")
    except ValueError as error:
        raise ValueError(f"{path}: the prompt file cannot be read: {error}") from error
    subsets = table.get("subset") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(subsets, list) or not subsets:
        raise ValueError(f"{path}: a table [prompt] with at least one [[prompt.subset]] is needed")
    common = {key: value for key, value in table.items() if key != "subset"}
    entries = [{**common, **subset} if isinstance(subset, dict) else subset for subset in subsets]
    return [PromptEntry(i, f"{path}, prompt.subset[{i}]", entry) for i, entry in enumerate(entries)]


def _json_entries(path: Path, text: str) -> list[PromptEntry]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: the file must hold a list of tables or of prompt lines")
    return [PromptEntry(i, f"{path}, entry {i}", content) for i, content in enumerate(entries)]
