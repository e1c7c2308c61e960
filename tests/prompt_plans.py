"""Short ways to plan the images of prompt lines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.generation.plan import GenerationDefaults, Planner, SeedSource, plan
from library.generation.request import ImageRequest, PromptSyntaxError

DEFAULTS = GenerationDefaults(ImageRequest(""))


def images(line: str | list[str], seed: int | None = 1, **changes: object) -> list[ImageRequest]:
    return list(plan([line] if isinstance(line, str) else line, replace(DEFAULTS, **changes), SeedSource(seed)))


def prompts(line: str | list[str], seed: int | None = 1, **changes: object) -> list[str]:
    return [image.raw_prompt for image in images(line, seed, **changes)]


def warnings_of(line: str, **changes: object) -> list[str]:
    heard: list[str] = []
    Planner(replace(DEFAULTS, **changes), SeedSource(1), warn=heard.append).requests(line)
    return heard


def refusal(line: str, **changes: object) -> str:
    with pytest.raises(PromptSyntaxError) as caught:
        Planner(replace(DEFAULTS, **changes), SeedSource(1)).requests(line)
    return str(caught.value)
