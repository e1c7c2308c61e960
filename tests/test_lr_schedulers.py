"""Learning-rate schedules: arguments, refusals, ownership by optimizers, and states that resume."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from library.lr_schedulers import LR_SCHEDULERS, OptimizerOwnedRates, create_lr_scheduler
from library.optimizer_state import load_scheduler_state, scheduler_state
from library.optimizers import CreatedOptimizer, create_optimizer
from library.options.errors import UserError
from library.options.optimizer import OptimizerOptions


def made(total: int = 100, processes: int = 1, groups: Any = None, **values: Any) -> tuple[CreatedOptimizer, Any]:
    """An optimizer and its schedule over `total` scheduler steps, learning rate 1 unless given."""
    options = OptimizerOptions(**({"learning_rate": 1.0} | values))
    created = create_optimizer(options, groups or [nn.Parameter(torch.zeros(2))])
    schedule = create_lr_scheduler(options, created, num_training_steps=total, num_processes=processes)
    return created, schedule


def rates(steps: int = 101, **values: Any) -> list[float]:
    created, schedule = made(**values)
    result = []
    for _ in range(steps):
        result.append(schedule.get_last_lr()[0])
        created.optimizer.step()
        schedule.step()
    return result


def test_every_group_follows_the_schedule_from_its_own_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5}, {"params": [nn.Parameter(torch.zeros(2))]}]
    created, schedule = made(groups=groups, lr_scheduler="linear")
    for _ in range(50):
        created.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.25, 0.5])


# --- warm-up -----------------------------------------------------------------------------------------------
def test_a_ratio_refers_to_all_scheduler_steps_and_whole_steps_are_taken_as_they_are() -> None:
    assert rates(total=400, lr_scheduler="linear", lr_warmup_steps=0.1)[40] == 1.0
    assert rates(total=400, lr_scheduler="linear", lr_warmup_steps=0.1)[20] == pytest.approx(0.5)
    assert rates(total=400, lr_scheduler="linear", lr_warmup_steps=10)[5] == pytest.approx(0.5)


def test_whole_warmup_steps_on_several_processes_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    made(total=400, processes=4, lr_scheduler="linear", lr_warmup_steps=100)
    assert "--lr_warmup_steps 100 is shared by 4 processes and covers 25 optimizer steps" in caplog.text
    caplog.clear()
    made(total=400, processes=4, lr_scheduler="linear", lr_warmup_steps=0.25)
    made(total=100, processes=1, lr_scheduler="linear", lr_warmup_steps=100)
    assert caplog.text == ""


@pytest.mark.parametrize("values", [{"lr_scheduler": "constant"}, {"lr_scheduler_type": "StepLR"}])
def test_schedules_without_warmup_refuse_one(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--lr_warmup_steps gives 25 steps"):
        made(lr_warmup_steps=0.25, **values)


# --- arguments ---------------------------------------------------------------------------------------------
def test_arguments_override_the_options() -> None:
    direct = rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3)
    assert rates(lr_scheduler="cosine_with_restarts", lr_scheduler_args=("num_cycles=3",)) == direct
    assert rates(lr_scheduler="polynomial", lr_scheduler_args=("lr_end=0.25",))[100] == pytest.approx(0.25)
    assert rates(lr_scheduler="cosine", lr_scheduler_args=("num_cycles=1",))[100] == pytest.approx(1.0)


def test_a_minimum_can_be_given_as_a_learning_rate() -> None:
    absolute = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=0.2",), learning_rate=2.0)
    relative = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1, learning_rate=2.0)
    assert absolute == pytest.approx(relative)
    assert absolute[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("kind", "middle"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))], ids=lambda v: str(v)
)
def test_warmup_stable_decay_has_several_shapes(kind: str, middle: float) -> None:
    common = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 20, "lr_decay_steps": 20}
    fall = rates(**common, lr_scheduler_args=(f"decay_type='{kind}'",))
    rise = rates(**common, lr_scheduler_args=(f"warmup_type='{kind}'",))
    assert fall[80] == pytest.approx(1.0) and fall[90] == pytest.approx(middle) and fall[100] == 0
    assert rise[0] == 0 and rise[10] == pytest.approx(middle) and rise[20] == 1
    assert rise[15] > rise[10] > rise[5]


def test_the_stable_phase_can_be_given() -> None:
    result = rates(
        lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps=20,
        lr_scheduler_args=("num_stable_steps=30",), lr_scheduler_min_lr_ratio=0.1,
    )  # fmt: skip
    assert result[39] == 1.0 and result[50] == pytest.approx(0.55) and result[60:] == pytest.approx([0.1] * 41)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scheduler": "Cosin"}, r"Cosin is not supported\. Did you mean cosine\? Choose one"),
        ({"lr_scheduler": "nonsense"}, "nonsense is not supported. Choose one of constant, .*adafactor"),
        ({"lr_scheduler": "greedy"}, "greedy is not supported"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("num_cycles=2",)}, "num_cycles is unknown .*it takes none"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("cycles=2",)}, "cycles is unknown to .*it takes num_cycles"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles",)}, "--lr_scheduler_args: 'num_cycles' is not"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "raise --learning_rate"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='x'",)}, "decay_type='x' is un"),
        ({"lr_scheduler": "piecewise_constant"}, "needs --lr_scheduler_args"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1-10'",)}, "step_rules='1-10'"),
        ({"lr_scheduler_type": "NoSuchLR"}, "NoSuchLR is no class of torch.optim.lr_scheduler.*CosineAnnealingLR"),
        ({"lr_scheduler_type": "no_such.module.LR"}, "no_such.module cannot be imported"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "waits for a measured value"),
        ({"lr_scheduler_type": "StepLR"}, "StepLR cannot be made with no arguments.*step_size"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**values)


def test_pieces_may_be_given_in_any_order_and_the_last_factor_holds_to_the_end() -> None:
    for rules in ("1:10,0.1:20,0.01", "0.1:20,1:10,0.01"):
        found = rates(30, lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules='{rules}'",))
        assert found == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    assert rates(3, lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules='0.5'",)) == [0.5] * 3


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ({"lr_scheduler": "linear"}, 0.0),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, 0.0),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=0.25",)}, 0.25),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 5, "lr_scheduler_min_lr_ratio": 0.1}, 0.1),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5}, 1.0),
    ],
)
def test_a_schedule_stays_where_it_ended(values: dict[str, Any], last: float) -> None:
    assert rates(30, total=20, **values)[20:] == pytest.approx([last] * 10)


def test_the_timescale_of_inverse_sqrt_is_the_given_one_or_the_warmup_or_ten_thousand() -> None:
    assert rates(31, lr_scheduler="inverse_sqrt")[30] == pytest.approx((1 + 30 / 10_000) ** -0.5)
    assert rates(31, lr_scheduler="inverse_sqrt", lr_warmup_steps=10)[30] == pytest.approx((1 + 20 / 10) ** -0.5)
    given = {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 10, "lr_scheduler_timescale": 5}
    assert rates(31, **given)[30] == pytest.approx((1 + 20 / 5) ** -0.5)


def test_every_listed_name_works() -> None:
    needed = {"cosine_with_min_lr": "min_lr_rate=0.1", "piecewise_constant": "step_rules='1:10,0.1'"}
    for name in LR_SCHEDULERS:
        if name != "adafactor":
            arguments = (needed[name],) if name in needed else None
            assert all(math.isfinite(rate) for rate in rates(lr_scheduler=name, lr_scheduler_args=arguments))


# --- optimizers with rates of their own --------------------------------------------------------------------
def test_schedule_free_optimizers_keep_their_rate_and_ignored_options_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    created, schedule = made(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=5)
    schedule.step()
    assert isinstance(schedule, OptimizerOwnedRates)
    assert schedule.get_last_lr() == [1.0]
    assert "ignored: --lr_scheduler, --lr_warmup_steps." in caplog.text
    schedule.load_state_dict(schedule.state_dict())


def test_schedule_free_optimizers_without_schedule_options_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    made(optimizer_type="AdamWScheduleFree")
    assert caplog.text == ""


def adafactor_rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    result = [schedule.get_last_lr()[0]]
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        result.append(schedule.get_last_lr()[0])
    return result


def test_adafactor_reports_the_initial_rate_and_then_its_own() -> None:
    arguments = ("scale_parameter=False",)
    created, schedule = made(optimizer_type="Adafactor", optimizer_args=arguments, learning_rate=1e-4)
    # relative step: min(1e-2, 1/sqrt(step))
    assert adafactor_rates(schedule, created.optimizer, 3) == pytest.approx([1e-4, 1e-2, 1e-2, 1e-2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer_type": "AdamW", "lr_scheduler": "adafactor:0.1"}, "but the optimizer is AdamW"),
        ({"optimizer_type": "AdamW", "lr_scheduler": "adafactor"}, "but the optimizer is AdamW"),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": ("relative_step=False",), "lr_scheduler": "adafactor"},
            "relative_step=True",
        ),
        ({"optimizer_type": "Adafactor", "lr_warmup_steps": 3}, "has no warm-up"),
    ],
)
def test_adafactors_schedule_needs_adafactors_relative_step(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**values)


# --- resume ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 7},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1:10,0.1:20,0.01'",)},
        {"lr_scheduler_type": "CosineAnnealingWarmRestarts", "lr_scheduler_args": ("T_0=7",)},
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=2", "total_steps=120")},
        {"lr_scheduler_type": "CyclicLR", "lr_scheduler_args": ("base_lr=0.1", "max_lr=1", "cycle_momentum=False")},
        {"lr_scheduler_type": "MultiStepLR", "lr_scheduler_args": ("milestones=[5, 20]",)},
    ],
    ids=lambda values: values.get("lr_scheduler_type") or values["lr_scheduler"],
)
def test_a_resumed_schedule_continues_equally(values: dict[str, Any]) -> None:
    straight = rates(steps=30, **values)
    created, schedule = made(**values)
    for _ in range(12):
        created.optimizer.step()
        schedule.step()
    state = json.loads(json.dumps(scheduler_state(schedule), allow_nan=False))
    resumed_optimizer, resumed = made(**values)
    resumed_optimizer.optimizer.load_state_dict(created.optimizer.state_dict())
    load_scheduler_state(resumed, state)
    again = []
    for _ in range(18):
        again.append(resumed.get_last_lr()[0])
        resumed_optimizer.optimizer.step()
        resumed.step()
    assert again == straight[12:]


def test_logs_stay_quiet_on_plain_schedules(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made(lr_scheduler="cosine", lr_warmup_steps=10)
    assert caplog.text == ""
