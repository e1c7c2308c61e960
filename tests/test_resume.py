"""Going on from a state: exactly with equal options, knowingly with others, and never from a damaged one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.lr_schedulers import create_lr_scheduler
from library.optimizers import _BUILT_IN, create_optimizer
from library.options import Options, UserError, make_options
from library.options.checks import paths_exist
from library.options.optimizer import OptimizerOptions
from library.run_record import (
    ARGUMENT_RULES,
    RULES,
    Changes,
    Rule,
    data_record,
    differences,
    refuse_differences,
    run_record,
)
from library.saving import alone
from library.state_files import POSITION_FILE, find_state
from library.training_state import Position, SavedProgress, TrainingParts, load_state, read_progress, save_state
from tests.test_metadata import group_of, make_images

TOTAL = 10  # steps of the schedules


# --- a run of eight weights ------------------------------------------------------------------------------------
def make_parts(**values: Any) -> TrainingParts:
    """A small trained module with the optimizer and the schedule that the options ask for."""
    torch.manual_seed(0)
    trainable = nn.ModuleDict({"network": nn.Linear(70, 64)})  # large enough for 8-bit states
    options: OptimizerOptions = make_options(**{"learning_rate": 1e-2, **values}).optimizer
    created = create_optimizer(options, [{"params": list(trainable.parameters())}])
    return TrainingParts(
        trainable, [created.optimizer], [create_lr_scheduler(options, created, num_training_steps=TOTAL)]
    )


def train(parts: TrainingParts, steps: Sequence[int]) -> list[float]:
    """Steps with gradients that depend on the step number and the weights; returns the rates that were used."""
    [optimizer], [schedule] = parts.optimizers, parts.lr_schedulers
    used = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parts.trainable.parameters():
            parameter.grad = parameter.detach() * 0.1 + torch.randn(parameter.shape, generator=generator)
        used.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return used


def weights(parts: TrainingParts) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parts.trainable.state_dict().items()}


def write_state(folder: Path, parts: TrainingParts | None = None, *, step: int = 3, record: Any = None) -> Path:
    progress = SavedProgress(Position(1, step, step), seed=1, batches_per_epoch=100, record=record)
    parts = parts or make_parts()
    save_state(folder, parts, progress, rank=0, is_main_process=True, phase=alone)
    return folder


def put_back(folder: Path, parts: TrainingParts, changes: Changes | None = None) -> TrainingParts:
    load_state(folder, parts, read_progress(folder), rank=0, changes=changes)
    return parts


def record_of(**values: Any) -> dict[str, Any]:
    return run_record(make_options(**values), num_processes=1, seed=1, data={})


# --- exactly ---------------------------------------------------------------------------------------------------
INSTALLED = [name for name, entry in _BUILT_IN.items() if importlib.util.find_spec(entry.module.partition(".")[0])]
EXACT: list[dict[str, Any]] = [
    *({"optimizer_type": name} for name in INSTALLED if name != "Adafactor"),
    {"optimizer_type": "Adafactor"},
    {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=True", "warmup_init=True"]},
    {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False", "scale_parameter=False"],
     "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 4, "optimizer_args": ["weight_decay=0.1", "betas=0.8,0.9"]},
    {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=2", "gamma=0.5"]},
    {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=0.1", "total_steps=20"]},
]  # fmt: skip


def called(values: dict[str, Any]) -> str:
    return "-".join(str(value) for value in values.values())


def test_the_optimizers_that_are_tested_are_those_of_the_table() -> None:
    assert {"AdamW", "AdamW8bit", "Lion", "Prodigy", "DAdaptation", "Adafactor", "AdamWScheduleFree"} <= {*INSTALLED}


@pytest.mark.parametrize("values", EXACT, ids=called)
def test_equal_options_go_on_bit_for_bit(values: dict[str, Any], tmp_path: Path) -> None:
    values = {"learning_rate": 1.0, **values} if "dapt" in values.get("optimizer_type", "") else values
    straight = make_parts(**values)
    train(straight, range(3))
    write_state(tmp_path / "state", straight)
    resumed = put_back(tmp_path / "state", make_parts(**values))
    assert train(straight, range(3, 7)) == train(resumed, range(3, 7))
    first, second = weights(straight), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(tensor, weights(make_parts(**values))[name]) for name, tensor in first.items())


def test_every_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    write_state(tmp_path / "state")
    straight = drawn()
    assert drawn() != straight
    put_back(tmp_path / "state", make_parts())
    assert drawn() == straight


def test_a_gradient_scaler_goes_on_with_its_scale(tmp_path: Path) -> None:
    def with_scaler(scale: float) -> TrainingParts:
        return replace(make_parts(), scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    state = write_state(tmp_path / "scaled", with_scaler(8.0))
    resumed = put_back(state, with_scaler(2.0))
    assert resumed.scaler.state_dict()["scale"] == 8.0
    put_back(state, make_parts())  # a run without one
    plain = write_state(tmp_path / "plain")
    assert put_back(plain, with_scaler(2.0)).scaler.state_dict()["scale"] == 2.0


def test_each_of_several_optimizers_goes_on(tmp_path: Path) -> None:
    def with_two() -> TrainingParts:
        parts = make_parts()
        options = make_options(learning_rate=1e-2, lr_scheduler="cosine").optimizer
        created = [create_optimizer(options, [parameter]) for parameter in parts.trainable.parameters()]
        schedules = [create_lr_scheduler(options, one, num_training_steps=TOTAL) for one in created]
        return replace(parts, optimizers=[one.optimizer for one in created], lr_schedulers=schedules)

    def train_both(parts: TrainingParts, steps: Sequence[int]) -> TrainingParts:
        for number, (optimizer, schedule) in enumerate(zip(parts.optimizers, parts.lr_schedulers, strict=True)):
            for _ in steps[number:]:
                for parameter in parts.trainable.parameters():
                    parameter.grad = parameter.detach() * 0.1 + 1
                optimizer.step()
                schedule.step()
        return parts

    straight = train_both(with_two(), range(3))
    state = write_state(tmp_path / "state", straight)
    resumed = put_back(state, with_two())
    rates = [[schedule.get_last_lr() for schedule in parts.lr_schedulers] for parts in (straight, resumed)]
    assert rates[0] == rates[1] and rates[0][0] != rates[0][1]
    first, second = (weights(train_both(parts, range(4))) for parts in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="the state holds 2 optimizers, this run has 1.*--fused_optimizer_groups"):
        put_back(state, make_parts())


# --- with other options ----------------------------------------------------------------------------------------
def resumed_rates(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> list[float]:
    """The rates of steps 3 to 6 of a run that goes on with `now` from a state made with `before`."""
    parts = make_parts(**before)
    train(parts, range(3))
    write_state(folder, parts)
    return train(
        put_back(folder, make_parts(**now), Changes.between(record_of(**before), record_of(**now))), range(3, 7)
    )


STEPS: dict[str, Any] = {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=2", "gamma=0.5"]}
COSINE: dict[str, Any] = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"learning_rate": 5e-3}), (COSINE, {**COSINE, "learning_rate": 5e-3}), ({}, COSINE), (COSINE, {}),
        (STEPS, {**STEPS, "learning_rate": 5e-3}), (STEPS, COSINE), (COSINE, STEPS),
        (STEPS, {**STEPS, "lr_scheduler_args": ["step_size=3", "gamma=0.1"]}),
        ({"optimizer_type": "AdamWScheduleFree"}, {"optimizer_type": "AdamWScheduleFree", "learning_rate": 5e-3}),
    ],
)  # fmt: skip
def test_another_rate_or_schedule_takes_effect_at_the_saved_step(
    before: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    """The rates are those of a run that had the new options from its start."""
    assert resumed_rates(tmp_path / "state", before, now) == pytest.approx(train(make_parts(**now), range(7))[3:])


def test_another_weight_decay_takes_effect_and_other_arguments_where_the_table_says_so(tmp_path: Path) -> None:
    before, now = {"optimizer_args": ["weight_decay=0.1"]}, {"optimizer_args": ["weight_decay=0.5", "betas=0.5,0.6"]}
    write_state(tmp_path / "state", make_parts(**before))
    changes = Changes.between(record_of(**before), record_of(**now))
    [optimizer] = put_back(tmp_path / "state", make_parts(**now), changes).optimizers
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["betas"]) == (0.5, (0.5, 0.6))


def test_what_an_optimizer_found_out_itself_is_kept_with_another_rate(tmp_path: Path) -> None:
    parts = make_parts(optimizer_type="Prodigy", learning_rate=1.0)
    train(parts, [0] * 8)
    found = parts.optimizers[0].param_groups[0]["d"]
    write_state(tmp_path / "state", parts)
    [optimizer] = put_back(tmp_path / "state", make_parts(optimizer_type="Prodigy", learning_rate=0.5)).optimizers
    group = optimizer.param_groups[0]
    assert group["d"] == found > 1e-6 and group["lr"] == 0.5


def test_the_schedule_of_a_state_of_more_processes_counts_their_steps(tmp_path: Path) -> None:
    parts = make_parts(**COSINE)
    train(parts, range(6))  # three steps of two processes
    write_state(tmp_path / "state", parts)
    two, one = record_of(**COSINE), record_of(**COSINE)
    two["options"]["num_processes"] = 2
    [difference] = differences(two, one)
    assert str(difference).startswith("number of processes: 2 in the resumed run, 1 now")
    [schedule] = put_back(tmp_path / "state", make_parts(**COSINE), Changes.between(two, one)).lr_schedulers
    assert schedule.state_dict()["last_epoch"] == 3


# --- the table -------------------------------------------------------------------------------------------------
#: groups none of whose other options change what is learned, or that are compared as data
NOT_LEARNED = (
    "console model_spec dataset cache saving hub logging sampling deepspeed validation memory cached_family config_file"
).split()
#: ... and single options of the other groups
FURTHER = (
    "tokenizer_cache_dir no_half_vae disable_mmap_load_safetensors gradient_checkpointing cpu_offload_checkpointing "
    "skip_until_initial_step initial_epoch initial_step lowram highvram mem_eff_attn xformers sdpa torch_compile "
    "dynamo_backend ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph use_8bit_adam use_lion_optimizer "
    "network_weights t5xxl_device t5xxl_dtype save_clip save_t5xxl split_mode use_t5xxl_cache_only diffusers_xformers "
    "init_word weights controlnet_model_name_or_path controlnet_model_path"
).split()


def test_every_option_that_changes_what_is_learned_has_a_rule() -> None:
    groups = Options.group_of_option()
    assert {*RULES} - {*groups} == {"num_processes"}
    without = {name for name, group in groups.items() if name not in RULES and group not in NOT_LEARNED}
    assert without == {*FURTHER}


DEFAULT: dict[str, Any] = {"network_module": "networks.lora", "network_dim": 4, "unet_lr": 1e-4}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"optimizer_type": "Lion"}, "--optimizer_type: the resumed state was made with torch.optim.adamw.AdamW, this"),
        ({"use_lion_optimizer": True}, "--optimizer_type"),
        ({"optimizer_args": ["amsgrad=True"]}, "--optimizer_args amsgrad: the resumed state was made without it"),
        ({"network_module": "lycoris.kohya"}, "--network_module"), ({"network_dim": 8}, "--network_dim"),
        ({"network_alpha": 2}, "--network_alpha: the resumed state was made with 1"),
        ({"network_args": ["conv_dim=4"]}, "--network_args conv_dim"),
        ({"network_train_unet_only": True}, "--network_train_unet_only"), ({"unet_lr": 0.0}, "--unet_lr"),
        ({"train_text_encoder": True}, "--train_text_encoder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_state_is_refused_by_the_options_name(now: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        refuse_differences(record_of(**DEFAULT), record_of(**{**DEFAULT, **now}))
    assert len(caught.value.problems) == 1


def test_other_spellings_of_the_same_are_no_difference() -> None:
    same: dict[str, Any] = {
        "optimizer_type": "torch.optim.AdamW",
        "optimizer_args": [],
        "pretrained_model_name_or_path": "b/x",
    }
    assert differences(record_of(pretrained_model_name_or_path="a/x"), record_of(**same)) == []
    assert differences(record_of(use_8bit_adam=True), record_of(optimizer_type="adamw8bit")) == []


def test_each_difference_is_one_line_that_says_what_was_what_is_and_what_happens() -> None:
    now = {**DEFAULT, "unet_lr": 5e-5, "optimizer_args": ["weight_decay=0.1"], "gradient_accumulation_steps": 2}
    lines = [str(item) for item in differences(record_of(**DEFAULT), record_of(**now))]
    assert lines == [
        "--unet_lr: 0.0001 in the resumed run, 5e-05 now: takes effect from here on.",
        "--optimizer_args weight_decay: none in the resumed run, 0.1 now: takes effect from here on.",
        "--gradient_accumulation_steps: 1 in the resumed run, 2 now: the result is not what the resumed run would "
        "have given.",
    ]
    [line] = differences(record_of(optimizer_type="Adafactor"), record_of(optimizer_type="Adafactor", learning_rate=1))
    assert "no effect, the optimizer finds its own learning rate" in str(line)
    assert {rule for table in ARGUMENT_RULES.values() for rule in table.values()} == {Rule.APPLIED}


def test_changed_data_is_named_and_a_moved_folder_is_no_change(tmp_path: Path) -> None:
    make_images(tmp_path / "data" / "cats", {"a": "cat, red", "b": "cat"})

    def compared(settings: str = "", dataset: str = "", folder: str = "data") -> list[str]:
        """What differs from the first call."""
        config = tmp_path / "data.toml"
        config.write_text(
            f'[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\ncaption_extension = ".txt"\n'
            f'image_dir = "{tmp_path / folder / "cats"}"\n{settings}\n',
            encoding="utf-8",
        )
        facts = data_record(group_of(make_options(dataset_config=str(config))))
        now = run_record(make_options(), num_processes=1, seed=1, data=facts)
        first.setdefault("record", now)
        return [item.name for item in differences(first["record"], now)]

    first: dict[str, Any] = {}
    assert compared() == []
    assert compared("num_repeats = 2") == ["the images, their sizes or repeats"]
    assert compared("flip_aug = true") == ["the settings of the datasets"]
    assert compared(dataset="batch_size = 2") == ["the batch size"]
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert compared(folder="moved") == []
    (tmp_path / "moved" / "cats" / "a.txt").write_text("cat, blue", encoding="utf-8")
    assert compared(folder="moved") == ["the captions"]
    (tmp_path / "moved" / "cats" / "b.png").rename(tmp_path / "moved" / "cats" / "c.png")
    assert "the images, their sizes or repeats" in compared(folder="moved")


# --- damaged states --------------------------------------------------------------------------------------------
FILES = (
    POSITION_FILE, "model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json",
    "random_states_0.json", "random_states_0.safetensors",
)  # fmt: skip
DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "garbage": lambda path: path.write_bytes(b"\x00\xff" * 50),
    "other JSON": lambda path: path.write_text("[1, 2]"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_file_and_state_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    write_state(tmp_path / "whole")
    for name in FILES:
        if kind == "missing" and name in (POSITION_FILE, "random_states_0.json"):  # weights alone; more processes
            continue
        state = Path(shutil.copytree(tmp_path / "whole", tmp_path / "my-state"))
        DAMAGE[kind](state / name)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read_progress(state)
        text = str(caught.value)
        assert text.startswith(f"--resume {state}: {name} ") and "\n" not in text, text
        shutil.rmtree(state)


def test_content_that_does_not_fit_is_one_line_too(tmp_path: Path) -> None:
    state = write_state(tmp_path / "my-state")
    for name, content in (
        ("optimizer.json", {"param_groups": [{}]}),
        ("scheduler.json", {"scheduler": {"last_epoch": "x"}, "scaler": None}),
        ("random_states_0.json", {"python": 1}),
    ):
        before = (state / name).read_text()
        (state / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"--resume {state}: {name} is damaged"):
            put_back(state, make_parts())
        (state / name).write_text(before)
    put_back(state, make_parts())


def test_a_state_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    state = write_state(tmp_path / "run-state", step=7)
    os.replace(state, tmp_path / "run-state.old")
    assert list(paths_exist(make_options(resume=f"{state}/"))) == []
    assert read_progress(state).position.step == 7 and state.is_dir()
    os.replace(state, tmp_path / "run-state.old")
    assert find_state(tmp_path, "run") == state


# --- a folder of states ----------------------------------------------------------------------------------------
def test_a_folder_of_states_means_its_newest_whole_one_of_this_run(tmp_path: Path, caplog: Any) -> None:
    names = ("run-000002-state", "run-step00000004-state", "run-other-state", "run-000003-state", "run-state")
    for step, name in enumerate(names, start=1):
        write_state(tmp_path / name, step=step)
    (tmp_path / "run-state" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "run-000003-state" / POSITION_FILE).write_bytes(b"")
    shutil.copytree(tmp_path / "run-000002-state", tmp_path / "run-000009-state.incomplete")
    with caplog.at_level(logging.INFO):
        found = find_state(tmp_path, "run")
    assert found.name == "run-step00000004-state"
    said = [record.message for record in caplog.records]
    assert any("run-state: model.safetensors is cut or damaged" in line and "skipped" in line for line in said)
    assert any("run-000003-state: train_state.json is empty" in line for line in said)
    assert said[-1] == f"--resume {tmp_path}: its newest whole state is used: run-step00000004-state"


def test_a_folder_without_a_state_of_this_run_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no saved state, and holds none"):
        find_state(tmp_path, "run")
    state = write_state(tmp_path / "other-state")
    with pytest.raises(ValueError, match=r"no state of this run \(--output_name run\), only other-state"):
        find_state(tmp_path, "run")
    assert find_state(tmp_path, "other") == find_state(state, "run") == state
    (state / "optimizer.json").write_text("{")
    with pytest.raises(ValueError, match="none of its states is whole: other-state"):
        find_state(tmp_path, "other")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_state(tmp_path / "nothing", "run")


def test_states_of_older_versions_and_other_programs_have_no_record(tmp_path: Path) -> None:
    state = write_state(tmp_path / "state", record=record_of())
    assert read_progress(state).record == record_of()
    saved = json.loads((state / POSITION_FILE).read_text())
    (state / POSITION_FILE).write_text(
        json.dumps({key: value for key, value in saved.items() if key not in ("run", "saved_at")})
    )
    assert replace(read_progress(state), folder=None) == SavedProgress(Position(1, 3, 3), seed=1, batches_per_epoch=100)
    put_back(state, make_parts())
    (state / POSITION_FILE).write_text(json.dumps({"current_epoch": 1, "current_step": 3}))
    assert not read_progress(state).is_exact


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    state = write_state(tmp_path / "state")
    saved = json.loads((state / POSITION_FILE).read_text())
    (state / POSITION_FILE).write_text(json.dumps({**saved, "format": saved["format"] + 1}))
    with pytest.raises(ValueError, match=rf"--resume {state}: written by a newer version \(format 2, known: 1\)"):
        read_progress(state)


def test_of_a_state_of_another_program_the_weights_are_used_alone(tmp_path: Path, caplog: Any) -> None:
    parts = make_parts()
    train(parts, range(3))
    state = write_state(tmp_path / "state", parts)
    (state / POSITION_FILE).write_text(json.dumps({"current_epoch": 1, "current_step": 3}))
    network = {name.removeprefix("network."): tensor for name, tensor in weights(parts).items()}
    save_file(network, state / "model.safetensors")
    rates, before = make_parts().lr_schedulers[0].get_last_lr(), torch.get_rng_state()
    resumed = make_parts()
    torch.set_rng_state(before)
    assert put_back(state, resumed) is resumed
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(resumed).items())
    assert not resumed.optimizers[0].state and resumed.lr_schedulers[0].get_last_lr() == rates
    assert torch.equal(torch.get_rng_state(), before)
    assert "written by another program: only its weights are used" in caplog.text


def test_a_process_without_a_saved_random_state_says_that_its_noise_differs(tmp_path: Path, caplog: Any) -> None:
    state = write_state(tmp_path / "state")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts = make_parts()
    torch.set_rng_state(before)
    load_state(state, parts, read_progress(state), rank=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert "has no random state of process 1: noise will differ" in caplog.text


def test_weights_that_are_missing_unknown_or_of_another_size_are_named(tmp_path: Path) -> None:
    state = write_state(tmp_path / "my-state")
    good = weights(make_parts())
    for content, message in (
        ({"network.weight": good["network.weight"]}, r"1 weights are missing, e.g. \['network.bias'\]; 0 are unknown"),
        ({**good, "network.more": torch.zeros(2)}, r"0 weights are missing.*1 are unknown.*network.*more"),
        ({**good, "network.bias": torch.zeros(3)}, "size mismatch for network.bias"),
    ):
        save_file(content, state / "model.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            put_back(state, make_parts())
        assert str(caught.value).startswith(f"--resume {state}: ") and "\n" not in str(caught.value)
