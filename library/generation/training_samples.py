"""Sample images during training: reads the prompt file, draws its images, and leaves no trace in the run."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from library.families.base import ModelFamily
from library.generation.engine import DrawSettings, Predict, draw, prompts_of
from library.generation.kept_prompts import KeptPrompts
from library.generation.prompt_file import PromptEntry, read_prompt_file
from library.generation.request import ImageRequest
from library.generation.samplers import check_sampler
from library.sampling_spec import SamplingDefaults

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from library.options import Options

logger = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def sampling_problems(options: Options) -> list[str]:
    """What is wrong with the sampling options and the prompt file, one sentence each; loads nothing.

    Single prompts that cannot be drawn are a problem only if no other is left; see `sampling_warnings`.
    """
    sampling = options.sampling
    problems = []
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        every = getattr(sampling, name)
        if every is not None and every < 1:
            problems.append(f"--{name} {every}: it must be at least 1; leave it out for no samples")
    if not wants_samples(options):
        return problems
    if not sampling.sample_prompts:
        return [*problems, "Sample images need a file with prompts: give --sample_prompts (.txt, .toml or .json)"]
    try:
        check_sampler(sampling.sample_sampler, "--sample_sampler")
        entries = read_prompt_file(Path(sampling.sample_prompts))
    except (ValueError, OSError) as error:
        return [*problems, str(error)]
    wrong = [f"--sample_prompts: {text}" for entry in entries for text in _told_of(entry, options)[0]]
    return problems + (wrong if len(wrong) == len(entries) else [])


def sampling_warnings(options: Options, family: ModelFamily) -> list[str]:
    """What will be skipped or ignored of the prompt file, one sentence each; loads nothing.

    For options without `sampling_problems`.
    """
    if not wants_samples(options) or not options.sampling.sample_prompts:
        return []
    told = [_told_of(entry, options, family) for entry in read_prompt_file(Path(options.sampling.sample_prompts))]
    return [text for problems, warnings in told for text in (*(f"{one}; it is skipped" for one in problems), *warnings)]


def _told_of(
    entry: PromptEntry, options: Options, family: ModelFamily | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(problems, warnings) of one prompt; without a family only what all of them have in common."""
    try:
        return (), understand(entry, options, family, SamplingDefaults())[1]
    except ValueError as error:
        return (str(error),), ()


def understand(
    entry: PromptEntry, options: Options, family: ModelFamily | None, defaults: SamplingDefaults
) -> tuple[ImageRequest, tuple[str, ...]]:
    """The image that an entry asks for, and warnings about what is ignored. Raises ValueError that names the place."""
    sampler = options.sampling.sample_sampler
    reads_weights = family is not None and family.reads_prompt_weights
    request, warnings = entry.request(defaults, sampler, reads_weights=reads_weights)
    reason = "" if family is None else family.without_effect.get("sample_sampler", "")
    if reason and request.sampler != sampler:
        warnings += (f"{entry.source}: the sampler '{request.sampler}' has no effect: {reason}",)
    return request, warnings


def wants_samples(options: Options) -> bool:
    """Whether any option asks for sample images."""
    sampling = options.sampling
    return bool(sampling.sample_at_first or sampling.sample_every_n_steps or sampling.sample_every_n_epochs)


class TrainingSampler:
    """Draws the images of `--sample_prompts` into `<output_dir>/sample`.

    The prompt file is read anew each time. Process p of P draws prompts p, p + P, ... A prompt that cannot be drawn
    is skipped with a warning. `predict_for` replaces the family's own forward pass (ControlNet); a ValueError from
    it skips the prompt too. `prompt_text` gives the text that stands for a prompt (new words of several vectors).
    Warnings that are `told` are not repeated.
    Raises ValueError for the problems that `sampling_problems` lists.
    """

    def __init__(
        self, options: Options, *, accelerator: Accelerator,
        predict_for: Callable[[ImageRequest], Predict | None] | None = None,
        prompt_text: Callable[[str], str] = str, told: Iterable[str] = (),
    ) -> None:
        problems = sampling_problems(options)
        if problems:
            raise ValueError("\n".join(problems))
        self._options = options
        self._accelerator = accelerator
        self._settings = DrawSettings(predict_for=predict_for)
        self._prompt_text = prompt_text
        self._warned: set[str] = set(told)

    def prepare(self, family: ModelFamily, released: Sequence[bool]) -> None:
        """Encode all prompts now, as long as the text encoders that will be `released` are there.

        From then on only these prompts can be drawn; what else stands in the file may still change. Call with every
        text encoder on its device in eval mode, under autocast.
        """
        if not any(released) or not wants_samples(self._options):
            return
        kept = KeptPrompts(family, keeps_encoders=not all(released))
        for entry in read_prompt_file(Path(self._options.sampling.sample_prompts or "")):
            request, _ = self._request(family, entry)
            kept.keep(*prompts_of([request]), clip_skip=request.clip_skip)
        self._settings = replace(self._settings, encode_prompts=kept)

    def draw(self, family: ModelFamily, *, epoch: int | None, step: int) -> list[Path]:
        """Draw this process's share; returns the files written.

        Call on every process, with the trained parts in eval mode. `epoch` is None when a step made samples due.
        All random generators are afterwards as they were before. Nothing but an interrupt ends training here.
        """
        accelerator, sampling = self._accelerator, self._options.sampling
        try:
            entries = read_prompt_file(Path(sampling.sample_prompts or ""))
        except (ValueError, OSError) as error:
            logger.warning("No sample images this time: %s", error)
            return []
        place = f"{step}" if epoch is None else f"{step} / {epoch}"
        logger.info("generating sample images at step / epoch: %s", place)
        files = []
        with preserved_random_states(), accelerator.autocast():
            for entry in entries[accelerator.process_index :: accelerator.num_processes]:
                path = self._draw_entry(family, entry, epoch=epoch, step=step)
                files += [path] if path else []
        if step == 0:
            self._commit_first_images()
        return files

    def _draw_entry(self, family: ModelFamily, entry: PromptEntry, *, epoch: int | None, step: int) -> Path | None:
        options = self._options
        try:
            request, warnings = self._request(family, entry)
            self._warn_once(warnings)
            [image] = draw(
                family, request, device=self._accelerator.device,
                dtype=_DTYPES[options.device.mixed_precision or "no"], settings=self._settings,
            )
            path = self._path(entry.index, request.seed, epoch=epoch, step=step)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            self._log_image(entry.index, request.prompt, image)
        except Exception as error:  # a sample must never end a training run
            logger.warning("Sample image skipped: %s: %s", entry.source, error, exc_info=not _is_plain(error))
            return None
        return path

    def _request(self, family: ModelFamily, entry: PromptEntry) -> tuple[ImageRequest, tuple[str, ...]]:
        """The image an entry asks for in this run, and warnings about what was ignored."""
        options = self._options
        request, warnings = understand(entry, options, family, family.sampling_spec().defaults)
        request = replace(
            request, prompt=self._prompt_text(request.prompt),
            negative_prompt=self._prompt_text(request.negative_prompt), clip_skip=options.model.clip_skip,
        )
        return request, warnings

    def _warn_once(self, warnings: tuple[str, ...]) -> None:
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                logger.warning("%s", warning)

    def _path(self, index: int, seed: int | None, *, epoch: int | None, step: int) -> Path:
        saving = self._options.saving
        name = f"{saving.output_name}_" if saving.output_name else ""
        number = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        stamp = time.strftime("%Y%m%d%H%M%S")
        suffix = "" if seed is None else f"_{seed}"
        return Path(saving.output_dir or ".") / "sample" / f"{name}{number}_{index:02d}_{stamp}{suffix}.png"

    def _trackers(self) -> list[Any]:
        return [tracker for tracker in self._accelerator.trackers if tracker.name == "wandb"]

    def _log_image(self, index: int, prompt: str, image: Image.Image) -> None:
        for tracker in self._trackers():
            import wandb

            tracker.log({f"sample_{index}": wandb.Image(image, caption=prompt)}, commit=False)

    def _commit_first_images(self) -> None:
        for tracker in self._trackers():
            tracker.log({}, step=0)


def _is_plain(error: Exception) -> bool:
    """Whether the message alone says what to do."""
    return isinstance(error, ValueError | OSError)


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Afterwards the generators of Python, numpy and torch (CPU, CUDA, XPU, MPS) are as they were before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerators = [
        (backend, backend.get_rng_state())
        for name in ("cuda", "xpu", "mps")
        if (backend := getattr(torch, name, None)) is not None and _is_usable(name)
    ]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for backend, state in accelerators:
            backend.set_rng_state(state)


def _is_usable(name: str) -> bool:
    backend = torch.backends.mps if name == "mps" else getattr(torch, name)
    return bool(backend.is_available())
