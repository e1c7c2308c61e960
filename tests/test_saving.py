"""Names and rotation of saved files, counting of steps, and where a run starts."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.options import make_options
from library.saving import Retention, SaveNames, Saver, Shelf, alone, remove_saved, saving_words, tell
from library.train_util import LossRecorder, StepPlan, starting_position
from library.training_state import Position, SavedProgress

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_math.json").read_text(encoding="utf-8"))["checkpoint_names"]


@pytest.mark.parametrize("named", [False, True])
def test_file_names_are_those_that_users_know(named):
    names = SaveNames(Path(), "myrun" if named else None, ".safetensors")
    assert str(names.epoch(3)) == GOLDEN["epoch_3"][named]
    assert str(names.step(50)) == GOLDEN["step_50"][named]
    assert str(names.last()) == GOLDEN["last"][named]
    stems = [Path(GOLDEN[key][named]).stem for key in ("epoch_3", "step_50", "last")]
    assert [str(path) for path in (names.epoch_state(3), names.step_state(50), names.last_state())] == [
        f"{stem}-state" for stem in stems
    ]


def test_expired_epochs_and_steps_match_the_recorded_ones():
    epochs, steps = GOLDEN["remove_epoch"], GOLDEN["remove_step"]
    by_epoch = Retention(epochs["save_every_n_epochs"], epochs["save_last_n_epochs"])
    by_step = Retention(steps["save_every_n_steps"], steps["save_last_n_steps"])
    assert {k: by_epoch.expired_epoch(int(k)) for k in epochs["by_epoch"]} == epochs["by_epoch"]
    assert {k: by_step.expired_step(int(k)) for k in steps["by_step"]} == steps["by_step"]
    assert Retention(10, 30).expired_step(50) == 10
    assert Retention(2, 3).expired_epoch(10) == 4
    for keeps_all in (Retention(None, 3), Retention(2, None), Retention(2, 0)):
        assert keeps_all.expired_epoch(10) is None and keeps_all.expired_step(10) is None


def make_saver(options, folder: Path, events: list[str]) -> Saver:
    def write_model(path: Path, epoch: int, steps: int) -> None:
        path.write_text(f"{epoch} {steps}")
        events.append(f"model {path.name}")

    def write_state(path: Path) -> None:
        path.mkdir(parents=True)
        events.append(f"state {path.name}")

    every = options.saving.save_every_n_epochs
    return Saver(options, SaveNames(folder, "run", ".safetensors"), every, True, write_model, write_state)


def test_rotation_keeps_the_last_epochs_and_never_saves_the_final_epoch_twice(tmp_path, capsys):
    options = make_options(
        output_dir=str(tmp_path), save_every_n_epochs=1, save_last_n_epochs=2, save_last_n_epochs_state=1,
        save_state=True,
    )
    events: list[str] = []
    saver = make_saver(options, tmp_path, events)
    for epoch in range(1, 6):
        saver.after_epoch(epoch, 5, epoch * 10)
    saver.at_end(5, 50)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "run-000003.safetensors", "run-000004.safetensors", "run-000004-state", "run.safetensors", "run-state",
    }
    assert events[-2:] == ["model run.safetensors", "state run-state"]
    assert (tmp_path / "run.safetensors").read_text() == "5 50"
    assert f"saving checkpoint: {tmp_path / 'run.safetensors'}" in capsys.readouterr().out.splitlines()


def test_step_saves_carry_the_number_of_completed_epochs(tmp_path):
    options = make_options(output_dir=str(tmp_path), save_every_n_steps=10, save_last_n_steps=10)
    saver = make_saver(options, tmp_path, [])
    for step in range(1, 41):
        saver.after_step(step, step // 20)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run-step00000030.safetensors", "run-step00000040.safetensors"}
    assert (tmp_path / "run-step00000030.safetensors").read_text() == "1 30"


def test_states_may_be_kept_longer_than_models(tmp_path):
    options = make_options(
        output_dir=str(tmp_path), save_every_n_steps=10, save_last_n_steps=10, save_last_n_steps_state=20,
        save_state=True,
    )  # fmt: skip
    saver = make_saver(options, tmp_path, [])
    for step in range(1, 51):
        saver.after_step(step, 0)
    left = sorted(int(path.name[8:16]) for path in tmp_path.iterdir() if path.is_dir())
    assert left == [30, 40, 50]
    assert sorted(int(path.name[8:16]) for path in tmp_path.iterdir() if path.is_file()) == [40, 50]


@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_states_are_kept_as_long_as_models_and_go_with_them_where_none_are_saved_any_more(tmp_path, kind):
    common = {"output_dir": str(tmp_path), f"save_every_n_{kind}": 1, f"save_last_n_{kind}": 1}

    def saved(numbers: range, **values) -> tuple[list[int], list[int]]:
        saver = make_saver(make_options(**common, **values), tmp_path, [])
        for number in numbers:
            if kind == "steps":
                saver.after_step(number, 0)
            else:
                saver.after_epoch(number, 100, number)
        found = [(int(re.search(r"(\d+)(-state)?$", path.stem)[1]), path.is_dir()) for path in tmp_path.iterdir()]
        return tuple(sorted(number for number, is_state in found if is_state == wanted) for wanted in (False, True))

    kept = 2 if kind == "steps" else 1  # steps count from the newest file on
    models, states = saved(range(1, 6), save_state=True)
    assert models == states == list(range(6 - kept, 6))
    models, states = saved(range(6, 9))
    assert (models, states) == (list(range(9 - kept, 9)), [])


def test_what_belongs_to_a_model_goes_with_it(tmp_path):
    options = make_options(output_dir=str(tmp_path), save_every_n_epochs=1, save_last_n_epochs=1)

    def beside(path: Path) -> list[Path]:
        return [path.with_name(f"{path.stem}_clip_l{path.suffix}")]

    def write_both(path: Path, epoch: int, steps: int) -> None:
        for file in (path, *beside(path)):
            file.touch()

    saver = replace(make_saver(options, tmp_path, []), companions=beside, write_model=write_both)
    for epoch in range(1, 4):
        saver.after_epoch(epoch, 9, epoch)
    assert {path.name for path in tmp_path.iterdir()} == {"run-000003.safetensors", "run-000003_clip_l.safetensors"}


def test_processes_beside_the_main_one_write_their_part_of_states_and_remove_nothing(tmp_path, capsys):
    events: list[str] = []
    options = make_options(output_dir=str(tmp_path / "out"), save_every_n_epochs=1, save_last_n_epochs=1,
                           save_state=True)  # fmt: skip
    saver = replace(make_saver(options, tmp_path / "out", events), is_main_process=False, phase=alone)
    for epoch in range(1, 4):
        saver.after_epoch(epoch, 9, epoch)
    assert events == [f"state run-00000{epoch}-state" for epoch in range(1, 4)]
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert capsys.readouterr().out == ""


def test_an_output_that_nobody_reads_ends_a_run_and_a_full_one_does_not(monkeypatch, caplog):
    def failing(error: OSError) -> SimpleNamespace:
        def write(text: str) -> None:
            raise error

        return SimpleNamespace(write=write, flush=lambda: None)

    monkeypatch.setattr(sys, "stdout", failing(OSError(28, "No space left on device")))
    tell("saving: x")
    assert "saving: x (the output cannot be written: [Errno 28] No space left on device)" in caplog.text
    monkeypatch.setattr(sys, "stdout", failing(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        tell("saving: x")


def test_step_plan_counts_as_users_know_it():
    options = make_options(max_train_epochs=10, gradient_accumulation_steps=4)
    plan = StepPlan.make(options, 103, 2)
    assert (plan.max_steps, plan.updates_per_epoch, plan.epochs, plan.batches_per_epoch) == (130, 13, 10, 52)
    assert StepPlan.make(make_options(), 100, 1).max_steps == 1600
    assert StepPlan.make(make_options(), 100, 1).epochs == 16
    ratio = StepPlan.make(make_options(max_train_epochs=10), 5, 1)
    assert ratio.save_every_n_epochs(make_options(save_n_epoch_ratio=3, save_every_n_epochs=9)) == 3
    assert ratio.save_every_n_epochs(make_options(save_n_epoch_ratio=20)) == 1
    assert ratio.save_every_n_epochs(make_options(save_every_n_epochs=9)) == 9
    assert ratio.save_every_n_epochs(make_options()) is None
    assert StepPlan.make(make_options(max_train_steps=41), 10, 1).epochs == 5


def test_a_short_last_window_steps_too():
    plan = StepPlan(batches_per_epoch=5, accumulation=2, max_steps=6, epochs=2)
    position, visited = Position(), []
    for _ in range(2):
        for batch in range(5):
            position = plan.next_position(position, batch)
            visited.append(position)
    assert visited[4] == Position(2, 0, 3)
    assert visited[-1] == Position(3, 0, 6)
    assert [p.step for p in visited] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert all(plan.position_after(p.step) == p for p in visited if plan.is_sync((p.batch - 1) % 5))


def test_skipping_keeps_the_step_numbers_and_plain_initial_epoch_restarts_them(caplog):
    plan = StepPlan(batches_per_epoch=6, accumulation=2, max_steps=30, epochs=10)
    skipping = make_options(initial_step=7, skip_until_initial_step=True)
    assert starting_position(skipping, plan, None) == Position(epoch=3, batch=2, step=7)
    with caplog.at_level(logging.WARNING):
        assert starting_position(make_options(initial_epoch=4), plan, None) == Position(epoch=4)
    assert "epoch 4" in caplog.text
    for step in (-1, 30):
        with pytest.raises(ValueError, match=f"The starting step {step} must be below the number .*30"):
            starting_position(make_options(initial_step=step, skip_until_initial_step=True), plan, None)
    for step, position in ((0, Position()), (29, Position(10, 4, 29))):
        assert starting_position(make_options(initial_step=step, skip_until_initial_step=True), plan, None) == position
    both = make_options(initial_epoch=4, initial_step=3, skip_until_initial_step=True)
    assert starting_position(both, plan, None) == Position(2, 0, 3)
    assert starting_position(make_options(), plan, None) == Position()


def test_a_given_start_counts_more_than_that_of_the_resumed_state_and_says_so(caplog):
    plan = StepPlan(batches_per_epoch=6, accumulation=2, max_steps=30, epochs=10)
    progress = SavedProgress(Position(3, 2, 7), seed=1, batches_per_epoch=6)
    options = make_options(initial_step=4, skip_until_initial_step=True)
    assert starting_position(options, plan, progress) == Position(2, 2, 4)
    assert "the step of the resumed state is not used" in caplog.text
    caplog.clear()
    assert starting_position(options, plan, None) == Position(2, 2, 4)
    assert caplog.text == ""


def test_resume_continues_exactly_where_the_state_was_written():
    plan = StepPlan(batches_per_epoch=6, accumulation=2, max_steps=30, epochs=10)
    progress = SavedProgress(Position(3, 2, 7), seed=1, batches_per_epoch=6)
    assert starting_position(make_options(), plan, progress) == Position(3, 2, 7)
    changed_data = SavedProgress(Position(2, 4, 7), seed=1, batches_per_epoch=9)
    assert starting_position(make_options(), plan, changed_data) == Position(3, 2, 7) == plan.position_after(7)
    weights_alone = SavedProgress(Position(step=7), is_exact=False)
    assert starting_position(make_options(), plan, weights_alone) == Position()
    with pytest.raises(ValueError, match="30 steps already"):
        starting_position(make_options(), plan, SavedProgress(Position(11, 0, 30), seed=1, batches_per_epoch=6))


def test_the_running_loss_averages_the_last_epoch_of_batches():
    recorder = LossRecorder()
    assert recorder.average == 0.0
    for batch, loss in enumerate([4.0, 2.0]):
        recorder.add(batch=batch, loss=loss, is_first_epoch=True)
    assert recorder.average == 3.0
    recorder.add(batch=0, loss=1.0, is_first_epoch=False)
    assert recorder.average == 1.5
    given = [1.0, 2.0]
    resumed = LossRecorder(given)
    assert resumed.average == 1.5
    resumed.add(batch=1, loss=4.0, is_first_epoch=False)
    assert (resumed.average, given) == (2.5, [1.0, 2.0])
    late = LossRecorder()
    late.add(batch=3, loss=5.0, is_first_epoch=False)
    assert late.average == 5.0


def test_the_console_says_what_is_saved_and_removed_in_the_words_that_programs_read(tmp_path, capsys):
    names = SaveNames(tmp_path, "my-lora", ".safetensors")
    assert saving_words(names.epoch_state(3)) == "saving state at epoch 3"
    assert saving_words(names.step_state(1200)) == "saving state at step 1200"
    assert saving_words(names.last_state()) == "saving last state"
    names.step(1).touch()
    for folder in (names.step_state(1), tmp_path / "model"):
        folder.mkdir()
    for path in (names.step(1), names.step_state(1), tmp_path / "model", tmp_path / "absent"):
        remove_saved(path)
    assert capsys.readouterr().out.splitlines() == [
        f"removing old checkpoint: {names.step(1)}",
        f"removing old state: {names.step_state(1)}",
        f"removing old model: {tmp_path / 'model'}",
    ]


def test_what_rotation_has_taken_is_never_taken_again():
    first, second, third = (Path(name) for name in ("1", "2", "3"))
    shelf = Shelf(overdue=[first])
    assert shelf.saved(second, None, rotates=True) == [first]
    assert shelf.saved(third, None, rotates=True) == []
    shelf.overdue.append(first)
    assert shelf.make_room() == [first, second]
    assert shelf.make_room() == [] and shelf.kept == [third]
