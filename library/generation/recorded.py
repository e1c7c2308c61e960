"""How a picture was drawn, from the texts in its file: our own, those of A1111 and its relatives, ComfyUI's graphs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.generation.comfy_graph import read_graph, settings_of
from library.generation.pictures import read_texts
from library.generation.request import MAX_SEED, MAX_STEPS
from library.generation.samplers import SAMPLERS

#: names of samplers in other programs, in lower case -> ours
_OTHER_NAMES: Mapping[str, str] = {
    "euler a": "euler_a", "euler_ancestral": "euler_a", "dpm2": "dpm_2", "dpm2 a": "dpm_2_a",
    "dpm_2_ancestral": "dpm_2_a", "dpm++ 2m": "dpmsolver++", "dpmpp_2m": "dpmsolver++", "plms": "pndm",
}  # fmt: skip
_SCHEDULES = re.compile(r" (?:karras|exponential|polyexponential)$")
_LAST_LINE = re.compile(r"^\s*Steps: \d+,")
_PAIR = re.compile(r"\s*([A-Za-z][\w \-/+]*):\s*(\"(?:\\.|[^\\\"])*\"|[^,]*)(?:,|$)")
_NEGATIVE = "Negative prompt:"
_NETWORK_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")


@dataclass(frozen=True)
class RecordedPrompt:
    """What a file says about its picture. Texts are literal: they hold no options and no groups.

    `values` are fields of the image request that the file names; `remarks` say what could not be taken over.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def recorded_prompt(path: Path) -> RecordedPrompt | None:
    """How the picture in a file was drawn, or None if no prompt is in it that could be told. Raises ImageError."""
    texts = read_texts(path)
    prompt = texts.get("prompt")
    if prompt:
        graph = read_graph(prompt)
        return _ours(texts) if graph is None else _of_graph(settings_of(graph))
    return _of_parameters(texts.get("parameters", ""))


def _ours(texts: Mapping[str, str]) -> RecordedPrompt:
    given = {
        "steps": texts.get("steps"), "scale": texts.get("scale"), "sampler": texts.get("sampler"),
        "clip_skip": texts.get("clip-skip"), "negative_scale": texts.get("negative-scale"),
        "clip_prompt": texts.get("clip-prompt"),
    }  # fmt: skip
    return _recorded(texts["prompt"], texts.get("negative-prompt", ""), texts.get("seed"), given)


def _of_graph(settings: Mapping[str, Any] | None) -> RecordedPrompt | None:
    if settings is None:
        return None
    given = {"steps": settings["steps"], "scale": settings["cfg"], "sampler": settings["sampler_name"]}
    return _recorded(settings["prompt"], settings["negative"] or "", settings["seed"], given)


def _of_parameters(text: str) -> RecordedPrompt | None:
    """A1111's text: the prompt, `Negative prompt: ...`, and a last line `Steps: 20, Sampler: Euler a, ...`."""
    lines = text.strip().split("\n")
    if not _LAST_LINE.match(lines[-1]) and _NEGATIVE not in text:
        return None  # some other program's text
    pairs: dict[str, str] = {}
    if _LAST_LINE.match(lines[-1]):
        pairs = {name.strip().lower(): value.strip().strip('"') for name, value in _PAIR.findall(lines.pop())}
    prompt, _, negative = "\n".join(lines).partition(_NEGATIVE)
    given = {
        "steps": pairs.get("steps"), "scale": pairs.get("cfg scale"), "sampler": pairs.get("sampler"),
        "clip_skip": pairs.get("clip skip"),
    }  # fmt: skip
    return _recorded(prompt.strip(), negative.strip(), pairs.get("seed"), given)


def _recorded(prompt: str, negative: str, seed: Any, given: Mapping[str, Any]) -> RecordedPrompt:
    """The record without what cannot be used; remarks name it."""
    remarks = []
    if tags := _NETWORK_TAG.findall(prompt):
        remarks.append(f"the networks of the prompt are left out (--network_weights): {' '.join(tags)}")
        prompt = _NETWORK_TAG.sub("", prompt).strip()
    values = {}
    for name, value in {"seed": seed, **given}.items():
        if value in (None, "", "None"):
            continue
        read = _READ[name](value)
        if read is None:
            remarks.append(f"its {name} {value!r} cannot be used here")
        else:
            values[name] = read
    return RecordedPrompt(prompt, negative, values.pop("seed", None), values, tuple(remarks))


def _whole(low: int, high: int) -> Callable[[Any], int | None]:
    def read(value: Any) -> int | None:
        text = str(value).strip()
        return int(text) if re.fullmatch(r"\d{1,20}", text) and low <= int(text) <= high else None

    return read


def _scale(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and 0 <= number <= 1e6 else None


def _sampler(value: Any) -> str | None:
    """Our name of a sampler; the spacing of its steps (Karras) is left out."""
    name = str(value).strip().lower()
    for candidate in (name, _SCHEDULES.sub("", name)):
        if (known := _OTHER_NAMES.get(candidate, candidate)) in SAMPLERS:
            return known
    return None


_READ: Mapping[str, Callable[[Any], Any]] = {
    "seed": _whole(0, MAX_SEED), "steps": _whole(1, MAX_STEPS), "clip_skip": _whole(1, 100), "scale": _scale,
    "negative_scale": _scale, "sampler": _sampler, "clip_prompt": str,
}  # fmt: skip
