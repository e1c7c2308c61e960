"""A save that fails costs nothing: training goes on, rotation waits, the end tries again; a kill finds whole files."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import training_loop
from library.checkpoints.tensors import save_tensors
from library.options import make_options
from library.options.errors import RunFailed
from library.saving import SaveNames, Saver, alone, remove_leftovers, write_model_folder
from library.training_state import (
    MODEL_FILE,
    Position,
    SavedProgress,
    TrainingParts,
    read_progress,
    save_state,
)
from tests.training import PHOTOS, train, write_config


@contextmanager
def no_space() -> Iterator[None]:
    """The system cannot bring anything to the disk."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original, os.fsync = os.fsync, refuse
    try:
        yield
    finally:
        os.fsync = original


class TinyRun:
    """A model of one number, saved with the project's own writers."""

    def __init__(self, folder: Path, **values: object) -> None:
        self.folder = folder
        self.module = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        self.is_folder = bool(values.pop("is_folder", False))
        options = make_options(output_dir=str(folder), save_every_n_steps=1, save_state=True, **values)
        names = SaveNames(folder, "run", "" if self.is_folder else ".safetensors")
        self.saver = Saver(options, names, None, True, self.write_model, self.write_state)

    def write_model(self, path: Path, epoch: int, step: int) -> None:
        tensors = {"step": torch.full((4,), float(step))}
        if not self.is_folder:
            save_tensors(path, tensors)
            return

        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / "model_index.json").write_text("{}")
            save_tensors(folder / "model.safetensors", tensors)

        write_model_folder(path, write)

    def write_state(self, path: Path) -> None:
        parts = TrainingParts(self.module, [self.optimizer], [self.schedule])
        progress = SavedProgress(Position(1, self.step, self.step), seed=1, batches_per_epoch=9)
        save_state(path, parts, progress, rank=0, is_main_process=True, phase=alone)

    def train(self, steps: range) -> None:
        for self.step in steps:
            self.saver.after_step(self.step, 0)

    def end(self) -> None:
        self.saver.at_end(1, self.step)

    # --- what is there -------------------------------------------------------------------------------------
    def models(self) -> list[str]:
        ending = "" if self.is_folder else ".safetensors"
        found = [path for path in self.folder.glob(f"run*{ending}") if "state" not in path.name]
        return sorted(path.name for path in found if is_whole_model(path))

    def states(self) -> list[int]:
        """Steps of the states that can be resumed from; one that was put aside gets its name back for it."""
        found = [path.name for path in self.folder.glob("run*-state*") if "incomplete" not in path.name]
        names = {name.removesuffix(".old") for name in found}
        steps = []
        for name in sorted(names):
            steps.append(read_progress(self.folder / name).position.step)
            assert set(load_file(self.folder / name / MODEL_FILE)) == {"weight", "bias"}
        return steps


def is_whole_model(path: Path) -> bool:
    file = path / "model.safetensors" if path.is_dir() else path
    return file.is_file() and set(load_file(file)) == {"step"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- no space ------------------------------------------------------------------------------------------------
def test_a_save_that_fails_takes_nothing_away_and_the_next_one_makes_up_for_it(tmp_path, caplog):
    run = TinyRun(tmp_path, save_last_n_steps=1)
    run.train(range(1, 3))
    assert names_in(tmp_path) == {
        "run-step00000001.safetensors",
        "run-step00000001-state",
        "run-step00000002.safetensors",
        "run-step00000002-state",
    }
    before = names_in(tmp_path)
    with no_space():
        run.train(range(3, 5))
    assert names_in(tmp_path) == before
    assert caplog.text.count("could not be saved") == 4
    assert "GiB free there" in caplog.text and "Training goes on" in caplog.text
    run.train(range(5, 6))
    run.end()
    assert names_in(tmp_path) == {
        "run-step00000005.safetensors",
        "run-step00000005-state",
        "run.safetensors",
        "run-state",
    }


def test_the_end_is_tried_again_when_rotation_has_made_room(tmp_path, monkeypatch):
    run = TinyRun(tmp_path, save_last_n_steps=2)
    run.train(range(1, 4))
    whole, replace = len(run.models()), os.replace

    def no_room_for_one_more(source: Path, target: Path) -> None:
        if ".tmp" in str(source) and target.parent == tmp_path and len(run.models()) >= whole:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_room_for_one_more)
    run.end()
    assert run.models() == ["run-step00000002.safetensors", "run-step00000003.safetensors", "run.safetensors"]
    assert run.states() == [3, 1, 2, 3]


def test_an_end_that_cannot_be_written_leaves_the_newest_files_and_says_so(tmp_path):
    run = TinyRun(tmp_path, save_last_n_steps=1)
    run.train(range(1, 3))
    with no_space(), pytest.raises(RunFailed, match=r"the training is done, but .*run\.safetensors could not") as error:
        run.end()
    assert "run-state could not be saved" in str(error.value)
    assert "run-step00000002.safetensors" in str(error.value)
    assert run.models() == ["run-step00000002.safetensors"] and run.states() == [2]
    assert not [name for name in names_in(tmp_path) if "tmp" in name or "incomplete" in name]


def test_a_mistake_in_a_writer_is_no_trouble_with_the_disk(tmp_path):
    broken = TinyRun(tmp_path)
    broken.optimizer = None
    with pytest.raises(AttributeError):
        broken.train(range(1, 2))


@pytest.mark.slow
def test_a_script_that_cannot_write_goes_on_and_ends_with_status_1(tmp_path, capsys, monkeypatch):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    out = tmp_path / "out"
    load = training_loop.load_models

    def spoil(*arguments):
        """What another program does to the folder once everything is checked: folders where files should be."""
        (out / "run-step00000001.safetensors").mkdir(parents=True)
        (out / "run.safetensors").mkdir()
        return load(*arguments)

    monkeypatch.setattr(training_loop, "load_models", spoil)
    with pytest.raises(SystemExit) as ending:
        train(
            "--dataset_config",
            write_config(tmp_path, photos),
            "--cache_latents",
            "--max_train_steps",
            "2",
            "--save_every_n_steps",
            "1",
            "--save_state_on_train_end",
            output_dir=out,
        )
    assert ending.value.code == 1
    assert names_in(out) == {
        "run-step00000001.safetensors",
        "run-step00000002.safetensors",
        "run.safetensors",
        "run-state",
    }
    assert len(load_file(out / "run-step00000002.safetensors")) == 612
    assert read_progress(out / "run-state").position.step == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: the training is done" in line]
    assert "run.safetensors could not be saved" in line and "Traceback" not in line


# --- killed at every call --------------------------------------------------------------------------------------
class Killed(BaseException):
    """The process ends here."""


CALLS = ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"))


@contextmanager
def dying_at(number: int, error: Callable[[], BaseException], *, after: bool) -> Iterator[list[int]]:
    """The call `number` (0-based) of those that rename and delete ends the process before or after it is done."""
    count, originals = [0], [getattr(owner, name) for owner, name in CALLS]

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            is_last, count[0] = count[0] == number, count[0] + 1
            if is_last and not after:
                raise error()
            result = original(*arguments, **options)
            if is_last:
                raise error()
            return result

        return call

    for (owner, name), original in zip(CALLS, originals, strict=True):
        setattr(owner, name, wrap(original))
    try:
        yield count
    finally:
        for (owner, name), original in zip(CALLS, originals, strict=True):
            setattr(owner, name, original)


@pytest.mark.slow
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_at_any_rename_or_removal_leaves_a_whole_model_and_a_whole_state(is_folder, after, tmp_path):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        TinyRun(folder, is_folder=is_folder).train(range(1, 2))  # of an earlier run: names that are written anew
        run = TinyRun(folder, save_last_n_steps=1, is_folder=is_folder)
        try:
            with dying_at(number, Killed, after=after) as count:
                run.train(range(1, 5))
                run.end()
        except Killed:
            pass
        else:
            break
        remove_leftovers(run.saver.names)
        assert run.models() and run.states(), number
        assert not [name for name in names_in(folder) if "tmp" in name or "incomplete" in name or "old" in name]
        again = TinyRun(folder, save_last_n_steps=1, is_folder=is_folder)
        again.train(range(1, 2))
        again.end()
        assert is_whole_model(folder / ("run" if is_folder else "run.safetensors"))
    assert count[0] > 15


def test_a_rename_or_removal_that_fails_never_ends_a_run(tmp_path):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        run = TinyRun(folder, save_last_n_steps=1)
        with dying_at(number, lambda: PermissionError(13, "Permission denied"), after=False) as count:
            run.train(range(1, 4))
            run.end()
        assert "run.safetensors" in run.models() and 3 in run.states(), number
        if count[0] <= number:
            break
    assert number > 10


# --- leftovers -------------------------------------------------------------------------------------------------
def test_the_next_run_of_a_name_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    own = [
        ".run.safetensors.tmp",
        ".run-000002.safetensors.tmp",
        ".run.incomplete.safetensors",
        "..run-step00000003.incomplete.safetensors.tmp",
        ".run_clip_l.safetensors.tmp",
    ]
    others = [
        ".running.safetensors.tmp",
        ".run-2.safetensors.tmp",
        "run.safetensors",
        "run.incomplete.txt",
        ".other.incomplete.safetensors",
        "run_clip_l.safetensors",
        ".run.tmp",
    ]
    for name in own + others:
        (tmp_path / name).write_text("x")
    for name in (
        "run-000001-state.incomplete",
        "run-state.old",
        "run-state",
        "other-state.incomplete",
        "run-000002-state.old",
    ):
        (tmp_path / name).mkdir()
    names = SaveNames(tmp_path, "run", ".safetensors")
    remove_leftovers(names, [tmp_path / "run_clip_l.safetensors"])
    assert names_in(tmp_path) == {*others, "run-state", "other-state.incomplete", "run-000002-state"}
    remove_leftovers(SaveNames(tmp_path / "missing", None, ".ckpt"))


def test_a_script_begins_by_removing_them(tmp_path):
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    out = tmp_path / "out"
    (out / "run-000007-state.incomplete").mkdir(parents=True)
    (out / ".run.incomplete.safetensors").write_text("half")
    train(
        "--dataset_config", write_config(tmp_path, photos), "--cache_latents", "--max_train_steps", "1", output_dir=out
    )
    assert names_in(out) == {"run.safetensors"}


def test_a_full_disk_under_the_messages_does_not_end_a_save(tmp_path, monkeypatch):
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            pass

    run = TinyRun(tmp_path)
    monkeypatch.setattr(sys, "stdout", Full())
    run.train(range(1, 2))
    monkeypatch.undo()
    assert run.models() == ["run-step00000001.safetensors"] and run.states() == [1]
