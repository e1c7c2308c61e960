"""Prompts from a Python file (`--from_module`): its `get_prompter(args, pipe, networks)` returns the prompter.

A prompter is called as `prompter(args, pipe, seed_random, iter_seed, prompt_index, global_step)` and returns one raw
prompt line, or None to end the repetition; the next call then begins anew. `args` is a read-only namespace of the
options, `pipe` the model family, `seed_random` the `random.Random` that seeds are drawn from, `iter_seed` the seed of
the repetition with `--iter_same_seed` (else None); `prompt_index` counts lines, `global_step` images, both from 0.
Optional: `__len__`, and `shuffle()` for `--shuffle_prompts`.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from library.families.base import ModelFamily
from library.generation.plan import GenerationDefaults, Planner, SeedSource
from library.generation.request import ImageRequest, PromptSyntaxError
from library.options import read_only_namespace
from library.options.generation import GenerationOptions

logger = logging.getLogger(__name__)

MODULE_NAME = "prompter_module"


def load_get_prompter(path: Path) -> Callable[..., Any]:
    """`get_prompter` of a Python file, which is run. Raises ValueError if it has none or cannot be run."""
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--from_module {path}: this is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--from_module {path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_prompter", None)):
        raise ValueError(f"--from_module {path}: it has no function get_prompter(args, pipe, networks).")
    return module.get_prompter


def prompter_requests(
    get_prompter: Callable[..., Any], options: GenerationOptions, family: ModelFamily, networks: Sequence[nn.Module],
    defaults: GenerationDefaults, seeds: SeedSource,
) -> Iterator[ImageRequest]:
    """The images of all repetitions of a prompter's lines. A line with a mistake is skipped with an error message."""
    arguments = read_only_namespace(options)
    prompter = get_prompter(arguments, family, list(networks))
    line_count = len(prompter) if hasattr(prompter, "__len__") else None
    planner = Planner(defaults, seeds, line_count=line_count)
    for repetition in range(defaults.n_iter):
        if repetition:
            planner.begin_iteration()
        if defaults.shuffle_prompts and hasattr(prompter, "shuffle"):
            prompter.shuffle()
        images = 0
        for index in itertools.count():
            line = prompter(arguments, family, seeds.generator, planner.iteration_seed, index, images)
            if line is None:
                break
            try:
                requests = planner.requests(line)
            except PromptSyntaxError as error:
                logger.error("prompt %d is skipped: %s", index + 1, error)
                continue
            images += len(requests)
            yield from requests
