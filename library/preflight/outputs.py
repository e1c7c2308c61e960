"""Output places: whatever a run will write is tried with a small file before anything is loaded."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.config_util import SupportedKinds, load_data_config
from library.preflight.subject import Subject, existing
from library.saving import SaveNames

PROBE = b"\0" * 65536  # enough to meet a full disk


# --- places ----------------------------------------------------------------------------------------------------
def problem_with(folder: Path, name: str) -> str | None:
    """Why a file called `name` cannot be written in `folder`; None if it can. Leaves no trace.

    A folder that does not exist yet is tried in the nearest one above it that does.
    """
    place = folder
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not place.is_dir():
            return f"{place} is a file, not a folder"
        _try(place / name)
    except ValueError as error:
        return str(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"the file name {name} has {len(os.fsencode(name))} bytes, too many for this file system"
        return f"{error.strerror or error} ({place})"
    return None


def _try(path: Path) -> None:
    """Write and remove a file; a file of that name that is there already is left alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    try:
        with open(descriptor, "wb") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def scratch_name(path: Path) -> str:
    """The longest name that a file or folder has while it is written."""
    return f".{path.stem}.incomplete{path.suffix}"


# --- training --------------------------------------------------------------------------------------------------
def training_problems(subject: Subject) -> Iterator[str]:
    """`--output_dir` with all names of this run, and `--logging_dir`."""
    options = subject.options
    if options.saving.output_dir:
        yield from _save_problems(options, _extension(options))
    if options.logging.logging_dir:
        reason = problem_with(Path(options.logging.logging_dir), "events.probe")
        if reason:
            yield f"--logging_dir {options.logging.logging_dir} cannot be written: {reason}."


def _extension(options: Any) -> str:
    """The ending of saved models; none for folders."""
    saving, model = options.saving, existing(options.model.pretrained_model_name_or_path)
    chosen = saving.save_model_as
    if chosen is None:  # as the model is
        chosen = "safetensors" if model is not None and model.is_file() else "diffusers"
    return "" if chosen.startswith("diffusers") else f".{chosen}"


def _save_problems(options: Any, extension: str) -> Iterator[str]:
    saving = options.saving
    names = SaveNames(Path(saving.output_dir), saving.output_name, extension)
    last = names.last()
    longest = max(_paths(options, names), key=lambda path: len(os.fsencode(path.name)))
    reason = problem_with(longest.parent, scratch_name(longest))
    if reason:
        option = "--output_name" if reason.startswith("the file name") else f"--output_dir {saving.output_dir}"
        yield f"{option}: what is trained cannot be written there: {reason}."
        return
    if extension and last.is_dir():
        yield f"--output_name: the model would be written to {last}, but that is a folder. Remove it, or choose a name."
    if not extension and last.is_file():
        yield f"--output_name: the model is a folder and would be written to {last}, but that is a file."
    for folder, is_wanted in (
        (names.last_state(), saving.save_state or saving.save_state_on_train_end),
        (names.output_dir / "sample", options.sampling.sample_prompts),
    ):
        if is_wanted and folder.is_file():
            yield f"--output_dir: the folder {folder} is needed, but that is a file. Remove it, or choose a name."


def _paths(options: Any, names: SaveNames) -> Iterator[Path]:
    """Where this run may save something."""
    saving = options.saving
    yield names.last()
    if saving.save_every_n_epochs or saving.save_n_epoch_ratio:
        yield names.epoch(1)
    if saving.save_every_n_steps:
        yield names.step(1)
    if saving.save_state and saving.save_every_n_epochs:
        yield names.epoch_state(1)
    if saving.save_state and saving.save_every_n_steps:
        yield names.step_state(1)
    if saving.save_state or saving.save_state_on_train_end:
        yield names.last_state()


# --- caches ----------------------------------------------------------------------------------------------------
def cache_problems(subject: Subject) -> Iterator[str]:
    """Folders of pictures that take no cache files and hold none either."""
    for folder, reason in _closed_folders(subject):
        if next(folder.glob("*.npz"), None) is None:
            yield f"{_cache_option(subject)}: no caches can be written beside the pictures in {folder}: {reason}."


def cache_warnings(subject: Subject) -> Iterator[str]:
    """Folders of pictures that take no cache files, but hold some."""
    for folder, reason in _closed_folders(subject):
        yield (
            f"{_cache_option(subject)}: nothing can be written in {folder} ({reason}): its caches must be complete and "
            "fit this run."
        )


def _cache_option(subject: Subject) -> str:
    name = "cache_latents" if subject.options.cache.cache_latents_to_disk else "cache_text_encoder_outputs"
    return f"--{name}_to_disk"


def _closed_folders(subject: Subject) -> list[tuple[Path, str]]:
    options = subject.options
    wanted = options.cache.cache_latents_to_disk or options.cache.cache_text_encoder_outputs_to_disk
    if not wanted or options.dataset.dataset_class:
        return []
    try:
        config = load_data_config(options.dataset, SupportedKinds(controlnet=True), bucket_step=1)
    except (ValueError, OSError):  # what is wrong with it is in the report anyway
        return []
    folders = {Path(s.image_dir) for dataset in config.datasets for s in dataset.subsets if s.image_dir}
    tried = [(folder, problem_with(folder, ".cache.probe")) for folder in sorted(folders) if folder.is_dir()]
    return [(folder, reason) for folder, reason in tried if reason]


# --- drawing and tools -----------------------------------------------------------------------------------------
def drawing_problems(subject: Subject) -> Iterator[str]:
    """`--outdir`."""
    yield from folder_problems("--outdir", subject.options.output.outdir)


def folder_problems(option: str, folder: str) -> Iterator[str]:
    """An option that names the folder for pictures."""
    reason = problem_with(Path(folder), ".picture.probe")
    if reason:
        yield f"{option} {folder} cannot be written: {reason}."


def file_problems(option: str, name: str) -> Iterator[str]:
    """An option or a word that names the file to write."""
    path = Path(name)
    if path.is_dir():
        return  # tools whose results may be folders say themselves what they take
    reason = problem_with(path.parent, scratch_name(path))
    if reason:
        yield f"{option} {name} cannot be written: {reason}."
