"""Exact resume: everything that a straight run would have carried over the interruption, without a pickle."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from library.checkpoints.tensors import load_tensors, save_tensors
from library.optimizer_state import (
    continue_schedule,
    group_values,
    load_optimizer_state,
    optimizer_state_tensors,
    scheduler_state,
)
from library.run_record import Changes
from library.saving import Phase, SaveFailed, replace_folder
from library.state_files import (
    MODEL_FILE,
    POSITION_FILE,
    SCHEDULER_FILE,
    check_files,
    damaged,
    optimizer_files,
    random_state_files,
    read_json,
    recover,
)

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: `batch` batches of `epoch` (1-based) are done, and `step` optimizer steps in all."""

    epoch: int = 1
    batch: int = 0
    step: int = 0


@dataclass(frozen=True)
class SavedProgress:
    """The JSON part of a state."""

    position: Position
    seed: int | None = None
    batches_per_epoch: int | None = None
    recorded_losses: list[float] = field(default_factory=list)
    is_exact: bool = True  # False: a state of another program, weights only
    record: Mapping[str, Any] | None = None  # what the run was made with; None: an older version did not say
    folder: Path | None = None  # where it was read from


class Stateful(Protocol):
    """Learning-rate schedulers and gradient scalers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingParts:
    """The unwrapped objects whose state belongs to a run."""

    trainable: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    lr_schedulers: Sequence[Stateful]  # one per optimizer
    scaler: Stateful | None = None


def save_state(folder: Path, parts: TrainingParts, progress: SavedProgress, *, rank: int, is_main_process: bool,
               phase: Phase) -> None:
    """Write a state folder; it appears under its name only when complete. Call on every process.

    Raises SaveFailed, on all of them and with nothing left, when one cannot write.
    """
    scratch = folder.with_name(f"{folder.name}.incomplete")

    def prepare() -> None:
        if is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def write() -> None:
        _save_random_states(scratch, rank)
        if is_main_process:
            _write_parts(scratch, parts, progress)

    def finish() -> None:
        if is_main_process:
            replace_folder(scratch, folder)

    try:
        for action in (prepare, write, finish):
            phase(action)
    except SaveFailed:
        if is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write_parts(scratch: Path, parts: TrainingParts, progress: SavedProgress) -> None:
    save_tensors(scratch / MODEL_FILE, parts.trainable.state_dict(), metadata={"format": "pt"})
    for number, optimizer in enumerate(parts.optimizers):
        tensors, settings = optimizer_state_tensors(optimizer)
        tensors_file, settings_file = optimizer_files(scratch, number)
        save_tensors(tensors_file, tensors, metadata={"format": "pt"})
        _write_json(settings_file, settings)
    scaler = parts.scaler.state_dict() if parts.scaler is not None else None
    first, *further = [scheduler_state(schedule) for schedule in parts.lr_schedulers]
    schedule = {"scheduler": first, "further_schedulers": further, "scaler": scaler}
    _write_json(scratch / SCHEDULER_FILE, schedule)
    _write_json(scratch / POSITION_FILE, _position_json(progress))


def read_progress(folder: Path) -> SavedProgress:
    """What a state says about its run; its other files are there and whole then.

    Raises FileNotFoundError or ValueError that name file and state for something that is no whole state.
    """
    recover(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--resume {folder}: no such folder. Give the path of a saved state (…-state).")
    path = folder / POSITION_FILE
    saved = read_json(path) if path.is_file() else {}
    if not isinstance(saved, dict):
        raise damaged(path)
    if "format" not in saved:
        if not (folder / MODEL_FILE).is_file():
            raise ValueError(f"--resume {folder}: holds no {POSITION_FILE} and no {MODEL_FILE}; it is no saved state.")
        return SavedProgress(Position(step=int(saved.get("current_step", 0))), is_exact=False, folder=folder)
    if saved["format"] != FORMAT:
        raise ValueError(f"--resume {folder}: written by a newer version (format {saved['format']}, known: {FORMAT}).")
    check_files(folder)
    with _named(path):
        return SavedProgress(
            position=Position(**saved["position"]), seed=saved["seed"], batches_per_epoch=saved["batches_per_epoch"],
            recorded_losses=list(saved["recorded_losses"]), record=saved.get("run"), folder=folder,
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Content of `path` that is not what it must be becomes an error that names file and state."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise damaged(path) from error


def load_state(
    folder: Path, parts: TrainingParts, progress: SavedProgress, *, rank: int, changes: Changes | None = None
) -> None:
    """Put a state back; call it after everything random in the set-up has happened.

    Learning rates are those that `parts` were made with; `changes` says what else does not come from the state.
    """
    _load_weights(folder, parts.trainable)
    if not progress.is_exact:
        logger.warning(
            "%s was written by another program: only its weights are used. Optimizer, learning-rate schedule, random "
            "generators and the position start anew.", folder,
        )
        return
    _load_optimizers(folder, parts, changes or Changes())
    _load_random_states(folder, rank)


def _load_optimizers(folder: Path, parts: TrainingParts, changes: Changes) -> None:
    schedule = read_json(folder / SCHEDULER_FILE)
    with _named(folder / SCHEDULER_FILE):
        saved_schedules = [schedule["scheduler"], *schedule.get("further_schedulers", [])]
        scaler = schedule["scaler"]
    if len(saved_schedules) != len(parts.optimizers):
        raise ValueError(
            f"--resume {folder}: the state holds {len(saved_schedules)} optimizers, this run has "
            f"{len(parts.optimizers)}. Resume with the options of the interrupted run (--fused_optimizer_groups, "
            "--blockwise_fused_optimizers)."
        )
    for number, optimizer in enumerate(parts.optimizers):
        chosen = group_values(optimizer, changes.arguments)
        _load_optimizer(folder, number, optimizer)
        with _named(folder / SCHEDULER_FILE):
            continue_schedule(
                parts.lr_schedulers[number], optimizer, saved_schedules[number], chosen,
                is_changed=changes.schedule, step_ratio=changes.step_ratio,
            )
    if parts.scaler is not None and scaler:
        with _named(folder / SCHEDULER_FILE):
            parts.scaler.load_state_dict(scaler)


def _load_optimizer(folder: Path, number: int, optimizer: torch.optim.Optimizer) -> None:
    tensors_file, settings_file = optimizer_files(folder, number)
    try:
        with _named(settings_file):
            load_optimizer_state(optimizer, load_tensors(tensors_file), read_json(settings_file))
    except ValueError as error:
        text = str(error)
        raise error if text.startswith("--resume") else ValueError(f"--resume {folder}: {text}") from error


def _load_weights(folder: Path, trainable: nn.Module) -> None:
    saved = load_tensors(folder / MODEL_FILE)
    expected = trainable.state_dict().keys()
    prefixes = {name.split(".", 1)[0] for name in expected}
    if len(prefixes) == 1 and prefixes.isdisjoint(name.split(".", 1)[0] for name in saved):
        prefix = prefixes.pop()  # a state of the reference holds the network alone, without our leading name
        saved = {f"{prefix}.{name}": tensor for name, tensor in saved.items()}
    missing, unexpected = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"--resume {folder}: the state does not fit what is trained now ({len(missing)} weights are missing, e.g. "
            f"{missing[:3]}; {len(unexpected)} are unknown, e.g. {unexpected[:3]}). Resume with the options of the "
            "interrupted run."
        )
    try:
        trainable.load_state_dict(saved)
    except RuntimeError as error:
        raise ValueError(f"--resume {folder}: {str(error).splitlines()[-1].strip()}") from error


def _position_json(progress: SavedProgress) -> dict[str, Any]:
    position = progress.position
    current_epoch = position.epoch if position.batch else max(1, position.epoch - 1)  # the last one with a batch done
    return {
        "format": FORMAT, "current_epoch": current_epoch, "current_step": position.step, "position": asdict(position),
        "seed": progress.seed, "batches_per_epoch": progress.batches_per_epoch,
        "recorded_losses": progress.recorded_losses, "saved_at": time.time(), "run": progress.record,
    }


def _save_random_states(folder: Path, rank: int) -> None:
    tensors: dict[str, Tensor] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    state: Any = numpy.random.get_state()
    kind, keys, position, has_gauss, cached = state
    states = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors_file, settings_file = random_state_files(folder, rank)
    save_tensors(tensors_file, tensors, metadata={"format": "pt"})
    _write_json(settings_file, states)


def _load_random_states(folder: Path, rank: int) -> None:
    tensors_file, settings_file = random_state_files(folder, rank)
    if not settings_file.is_file():
        logger.warning("%s has no random state of process %d: noise will differ from a straight run.", folder, rank)
        return
    states = read_json(settings_file)
    with _named(settings_file):
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    with _named(tensors_file):
        tensors = load_tensors(tensors_file)
        torch.set_rng_state(tensors.pop("torch"))
    if tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[name] for name in sorted(tensors, key=lambda n: int(n.split(".")[1]))])


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
