"""Names, rotation and order of everything that a training run writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.options import Options


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


def remove_saved(path: Path) -> None:
    """Delete a model file, a model folder or a state folder; a missing one is fine."""
    if path.is_dir():
        print(f"removing old {'state' if path.name.endswith('-state') else 'model'}: {path}", flush=True)
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        print(f"removing old checkpoint: {path}", flush=True)
        path.unlink(missing_ok=True)


def saving_words(state: Path) -> str:
    """What the console says about a state folder of `SaveNames` that is written; other programs read these lines."""
    found = re.search(r"-(step)?(\d+)-state$", state.name)
    if found is None:
        return "saving last state"
    return f"saving state at {found[1] or 'epoch'} {int(found[2])}"


def replace_folder(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`; an earlier one stays whole until the new one is in place."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, folder)


def place_model_folder(scratch: Path, folder: Path) -> None:
    """Move a complete Diffusers folder to its place. It replaces an earlier model; other files there are kept."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        shutil.copytree(scratch, folder, dirs_exist_ok=True)
        shutil.rmtree(scratch)
    else:
        replace_folder(scratch, folder)


@dataclass(frozen=True)
class Saver:
    """Saves models and states in the order model, state, rotation: nothing old goes before the new is complete.

    Every process calls the three methods. `write_model(path, epoch, steps)` then runs on the main process,
    `write_state(path)` on every one; `wait` is a barrier for all of them.
    """

    options: Options
    names: SaveNames
    save_every_n_epochs: int | None
    is_main_process: bool
    write_model: Callable[[Path, int, int], None]
    write_state: Callable[[Path], None]
    wait: Callable[[], None] = lambda: None
    companions: Callable[[Path], Sequence[Path]] = lambda path: ()  # files that belong to a model file

    def after_step(self, step: int, completed_epochs: int) -> None:
        """Save if `--save_every_n_steps` says so."""
        saving = self.options.saving
        if not saving.save_every_n_steps or step % saving.save_every_n_steps:
            return
        self._model(self.names.step(step), completed_epochs, step)
        if saving.save_state:
            self.write_state(self.names.step_state(step))
        expired = Retention(saving.save_every_n_steps, saving.save_last_n_steps).expired_step(step)
        self._remove(None if expired is None else self.names.step(expired))
        kept_states = saving.save_last_n_steps_state or saving.save_last_n_steps
        expired = Retention(saving.save_every_n_steps, kept_states).expired_step(step)
        self._remove(self.names.step_state(expired) if expired else None)

    def after_epoch(self, epoch: int, epochs: int, step: int) -> None:
        """Save if `--save_every_n_epochs` says so; the last epoch is only saved as the final file."""
        saving, every = self.options.saving, self.save_every_n_epochs
        if not every or epoch % every or epoch >= epochs:
            return
        self._model(self.names.epoch(epoch), epoch, step)
        if saving.save_state:
            self.write_state(self.names.epoch_state(epoch))
        expired = Retention(every, saving.save_last_n_epochs).expired_epoch(epoch)
        self._remove(None if expired is None else self.names.epoch(expired))
        expired = Retention(every, saving.save_last_n_epochs_state or saving.save_last_n_epochs).expired_epoch(epoch)
        self._remove(None if expired is None else self.names.epoch_state(expired))

    def at_end(self, epochs: int, step: int) -> None:
        """The final state (if asked for) and the final model."""
        if self.options.saving.save_state or self.options.saving.save_state_on_train_end:
            self.write_state(self.names.last_state())
        self._model(self.names.last(), epochs, step)

    def _model(self, path: Path, epoch: int, step: int) -> None:
        self.wait()
        if self.is_main_process:
            self.names.output_dir.mkdir(parents=True, exist_ok=True)
            print(f"\nsaving checkpoint: {path}", flush=True)
            self.write_model(path, epoch, step)

    def _remove(self, path: Path | None) -> None:
        if path is not None and self.is_main_process:
            for item in (path, *self.companions(path)):
                remove_saved(item)
