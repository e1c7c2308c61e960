"""Names, rotation and order of everything that a training run writes."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.errors import RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveNames:
    """File and folder names of one run (`--output_dir`, `--output_name`)."""

    output_dir: Path
    output_name: str | None
    extension: str  # with the dot; empty for folders

    def epoch(self, epoch: int) -> Path:
        """Model saved at the end of `epoch` (1-based)."""
        return self.output_dir / f"{self.output_name or 'epoch'}-{epoch:06d}{self.extension}"

    def step(self, step: int) -> Path:
        """Model saved after `step` optimizer steps."""
        return self.output_dir / f"{self.output_name or 'at'}-step{step:08d}{self.extension}"

    def last(self) -> Path:
        """The final model."""
        return self.output_dir / f"{self.output_name or 'last'}{self.extension}"

    def epoch_state(self, epoch: int) -> Path:
        """State folder that belongs to `epoch`."""
        return self.output_dir / f"{self.output_name or 'epoch'}-{epoch:06d}-state"

    def step_state(self, step: int) -> Path:
        """State folder that belongs to `step`."""
        return self.output_dir / f"{self.output_name or 'at'}-step{step:08d}-state"

    def last_state(self) -> Path:
        """State folder written at the end."""
        return self.output_dir / f"{self.output_name or 'last'}-state"

    def pattern(self, companion_endings: Sequence[str] = ()) -> re.Pattern[str]:
        """The names of all models, their companions and all states; group 1 is the whole name."""
        tails = "|".join(re.escape(tail) for tail in (self.extension, "-state", *companion_endings))
        epoch, at, last = (re.escape(self.output_name or word) for word in ("epoch", "at", "last"))
        return re.compile(rf"((?:{epoch}-\d{{6}}|{at}-step\d{{8}}|{last})(?:{tails}))")


@dataclass(frozen=True)
class Retention:
    """Which older file goes when a new one is complete; None keeps everything."""

    every: int | None
    keep_last: int | None

    def expired_epoch(self, epoch: int) -> int | None:
        """The epoch whose file goes when `epoch` has been saved."""
        if not self.every or not self.keep_last:
            return None
        expired = epoch - self.every * self.keep_last
        return expired if expired >= 0 else None

    def expired_step(self, step: int) -> int | None:
        """The step whose file goes when `step` has been saved; `keep_last` counts steps, rounded up to whole saves."""
        if not self.every or not self.keep_last:
            return None
        expired = step - self.keep_last - 1
        expired -= expired % self.every
        return expired if expired >= 0 else None


# --- replacing and removing ---------------------------------------------------------------------------------
def remove_saved(path: Path) -> None:
    """Delete a model file, a model folder or a state folder; a missing one is fine, a stubborn one stays."""
    try:
        if path.is_dir():
            tell(f"removing old {'state' if path.name.endswith('-state') else 'model'}: {path}")
            scratch = path.with_name(f"{path.name}.incomplete")  # half of a folder never stands under its name
            shutil.rmtree(scratch, ignore_errors=True)
            os.replace(path, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
        elif path.exists():
            tell(f"removing old checkpoint: {path}")
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed and stays: %s", path, error)


def saving_words(state: Path) -> str:
    """What the console says about a state folder of `SaveNames` that is written; other programs read these lines."""
    found = re.search(r"-(step)?(\d+)-state$", state.name)
    if found is None:
        return "saving last state"
    return f"saving state at {found[1] or 'epoch'} {int(found[2])}"


def replace_folder(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`; an earlier one stays whole until the new one is in place."""
    if not folder.exists():
        os.replace(scratch, folder)
        return
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(scratch, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_model_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """A Diffusers folder that appears under its name only when `write` has completed it under another one."""
    scratch = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    write(scratch)
    place_model_folder(scratch, folder)


def place_model_folder(scratch: Path, folder: Path) -> None:
    """Move a complete Diffusers folder to its place. It replaces an earlier model; other files there are kept."""
    is_model = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    if folder.is_dir() and any(folder.iterdir()) and not is_model:
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
        shutil.rmtree(scratch)
    else:
        replace_folder(scratch, folder)


# --- what an interrupted save leaves ------------------------------------------------------------------------
def scratch_of(path: Path) -> list[Path]:
    """Every name under which something incomplete may wait to become `path`."""
    hidden = path.with_name(f".{path.stem}.incomplete{path.suffix}")
    names = (f".{path.name}.tmp", f".{path.name}.incomplete", f"{path.name}.incomplete", f".{hidden.name}.tmp")
    return [hidden, *(path.with_name(name) for name in names)]


def remove_scratch(paths: Iterable[Path]) -> None:
    """Delete what an interrupted or failed save of `paths` has left."""
    for path in paths:
        for item in scratch_of(path):
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                with suppress(OSError):
                    item.unlink(missing_ok=True)


def remove_leftovers(names: SaveNames, companions: Sequence[Path] = ()) -> None:
    """Delete what a killed run with these names has left; a state that it had put aside gets its name back.

    `companions`: the files that belong to the final model.
    """
    if not names.output_dir.is_dir():
        return
    own = names.pattern([path.name.removeprefix(names.last().stem) for path in companions])
    found = list(names.output_dir.iterdir())
    finals = {match[1] for path in found if (match := own.fullmatch(_final_name(path)))}
    remove_scratch(names.output_dir / name for name in sorted(finals))
    for path in found:
        final = path.with_name(path.name.removesuffix(".old"))
        if final == path or not path.is_dir() or not own.fullmatch(final.name):
            continue
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            logger.warning("%s was put aside when a run was interrupted: it gets its name back.", final)
            os.replace(path, final)


def _final_name(scratch: Path) -> str:
    """What an incomplete file or folder was to be called."""
    name = scratch.name.lstrip(".").removesuffix(".tmp")
    return re.sub(r"\.incomplete(?=(\.\w+)?$)", "", name)


# --- saves that fail ----------------------------------------------------------------------------------------
class SaveFailed(Exception):
    """Something could not be written; what stood under its name before is whole."""


#: does something on every process; a failure to write on one of them is SaveFailed on all of them
Phase = Callable[[Callable[[], None]], None]
#: what libraries that do not raise OSError say about a disk
_DISK_TROUBLE = re.compile(r"os error \d+|I/?O error|PytorchStreamWriter|file write failed|No space left", re.I)


def alone(action: Callable[[], None]) -> None:
    """The phase of a single process."""
    try:
        action()
    except Exception as error:
        if not isinstance(error, OSError) and not _DISK_TROUBLE.search(str(error)):
            raise
        raise SaveFailed(str(error) or type(error).__name__) from error


def together(accelerator: Accelerator) -> Phase:
    """Phases of all processes of a run: each ends on all of them before the next begins."""
    if accelerator.num_processes == 1:
        return alone

    def phase(action: Callable[[], None]) -> None:
        from accelerate.utils import gather_object

        failure = None
        try:
            alone(action)
        except SaveFailed as error:
            failure = str(error)
        failures = [text for text in gather_object([failure]) if text]
        if failures:
            raise SaveFailed(failures[0])

    return phase


def tell(text: str) -> None:
    """Print a line; where the messages go, there may be no space either, which is no reason to stop."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        logger.warning("%s (the output cannot be written: %s)", text.strip(), error)


def free_space(folder: Path) -> str:
    """What is left on the disk of a folder, for messages."""
    try:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    except OSError:
        return "unknown space"
    return f"{free / 2**30:.2f} GiB"


@dataclass
class Shelf:
    """What a run has saved of one kind (models, states), as far as rotation is concerned."""

    kept: list[Path] = field(default_factory=list)  # that rotation will take one day
    overdue: list[Path] = field(default_factory=list)  # whose time came when a save failed

    def saved(self, path: Path, expired: Path | None, *, rotates: bool) -> list[Path]:
        """Note a complete save; returns what can go now."""
        gone = [*self.overdue, *([expired] if expired else [])]
        self.overdue.clear()
        self.kept = [item for item in (*self.kept, *([path] if rotates else [])) if item not in gone]
        return gone

    def make_room(self) -> list[Path]:
        """What the rotation of one more save would take; the newest is never among it."""
        gone = [*self.overdue, *self.kept[:1]] if len(self.kept) > 1 else list(self.overdue)
        self.overdue.clear()
        self.kept = [item for item in self.kept if item not in gone]
        return gone


# --- the saver ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Due:
    """One model or state that is to be saved, and what goes when it is complete."""

    path: Path
    epoch: int
    step: int
    expired: Path | None
    retention: Retention


@dataclass(frozen=True)
class Saver:
    """Saves models and states in the order model, state, rotation: nothing old goes before the new is complete.

    Every process calls the three methods. `write_model(path, epoch, steps)` then runs on the main process,
    `write_state(path)` and `check` on every one; `check` raises what shall end the run before a model is written.
    A save that fails (no space, no permission) is told, and training goes on to the next one.
    """

    options: Options
    names: SaveNames
    save_every_n_epochs: int | None
    is_main_process: bool
    write_model: Callable[[Path, int, int], None]
    write_state: Callable[[Path], None]
    phase: Phase = alone
    companions: Callable[[Path], Sequence[Path]] = lambda path: ()  # files that belong to a model file
    check: Callable[[], None] = lambda: None
    models: Shelf = field(default_factory=Shelf)
    states: Shelf = field(default_factory=Shelf)

    def after_step(self, step: int, completed_epochs: int) -> None:
        """Save if `--save_every_n_steps` says so."""
        saving, names = self.options.saving, self.names
        every = saving.save_every_n_steps
        if not every or step % every:
            return
        models = Retention(every, saving.save_last_n_steps)
        states = Retention(every, saving.save_last_n_steps_state or saving.save_last_n_steps)
        expired, expired_state = models.expired_step(step), states.expired_step(step)
        self._save(
            _Due(names.step(step), completed_epochs, step, names.step(expired) if expired else None, models),
            _Due(names.step_state(step), completed_epochs, step,
                 names.step_state(expired_state) if expired_state else None, states),
        )  # fmt: skip

    def after_epoch(self, epoch: int, epochs: int, step: int) -> None:
        """Save if `--save_every_n_epochs` says so; the last epoch is only saved as the final file."""
        saving, names, every = self.options.saving, self.names, self.save_every_n_epochs
        if not every or epoch % every or epoch >= epochs:
            return
        models = Retention(every, saving.save_last_n_epochs)
        states = Retention(every, saving.save_last_n_epochs_state or saving.save_last_n_epochs)
        expired, expired_state = models.expired_epoch(epoch), states.expired_epoch(epoch)
        self._save(
            _Due(names.epoch(epoch), epoch, step, names.epoch(expired) if expired else None, models),
            _Due(names.epoch_state(epoch), epoch, step,
                 names.epoch_state(expired_state) if expired_state else None, states),
        )  # fmt: skip

    def at_end(self, epochs: int, step: int) -> None:
        """The final model, then the final state (if asked for). Raises RunFailed for what cannot be written.

        What cannot be written at once is tried again when rotation has made room for it.
        """
        model, state = self.names.last(), self.names.last_state()
        failures = [self._finally(model, lambda: self._model(model, epochs, step), self.models)]
        if self.options.saving.save_state or self.options.saving.save_state_on_train_end:
            failures.append(self._finally(state, lambda: self.write_state(state), self.states))
        told = [failure for failure in failures if failure]
        if told:
            kept = [*self.models.kept[-1:], *self.states.kept[-1:]]
            newest = f" The newest files of this run: {', '.join(map(str, kept))}." if kept else ""
            raise RunFailed(f"the training is done, but {'; '.join(told)}.{newest}")

    # --- one save ------------------------------------------------------------------------------------------
    def _save(self, model: _Due, state: _Due) -> None:
        """Model, state, rotation; what has failed takes nothing away."""
        has_model = self._try(model.path, lambda: self._model(model.path, model.epoch, model.step))
        has_state = None
        if self.options.saving.save_state:
            has_state = self._try(state.path, lambda: self.write_state(state.path))
        self._rotate(self.models, model, failure=has_model)
        if self.options.saving.save_state:
            self._rotate(self.states, state, failure=has_state)
        elif state.expired:
            self._remove([state.expired])
        for failure in (has_model, has_state):
            if failure:
                logger.error("%s. Training goes on, and the next save is tried when it is due.", failure)

    def _rotate(self, shelf: Shelf, due: _Due, *, failure: str | None) -> None:
        if failure is None:
            self._remove(shelf.saved(due.path, due.expired, rotates=bool(due.retention.keep_last)))
        elif due.expired:
            shelf.overdue.append(due.expired)

    def _finally(self, path: Path, write: Callable[[], None], shelf: Shelf) -> str | None:
        failure = self._try(path, write)
        if failure is None:
            return None
        logger.error("%s. It is tried again.", failure)
        self._remove(shelf.make_room())
        return self._try(path, write)

    def _try(self, path: Path, write: Callable[[], None]) -> str | None:
        """Why `path` could not be written, or None if it was; nothing incomplete is left."""
        try:
            write()
        except SaveFailed as error:
            if self.is_main_process:
                remove_scratch((path, *self.companions(path)))
            return f"{path} could not be saved: {error} ({free_space(self.names.output_dir)} free there)"
        return None

    def _model(self, path: Path, epoch: int, step: int) -> None:
        self.check()
        if self.is_main_process:
            tell(f"\nsaving checkpoint: {path}")
        self.phase(lambda: self._write_model(path, epoch, step))

    def _write_model(self, path: Path, epoch: int, step: int) -> None:
        if self.is_main_process:
            self.names.output_dir.mkdir(parents=True, exist_ok=True)
            self.write_model(path, epoch, step)

    def _remove(self, paths: Sequence[Path]) -> None:
        if self.is_main_process:
            for path in paths:
                for item in (path, *self.companions(path)):
                    remove_saved(item)
