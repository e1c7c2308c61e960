"""Optimizers by name, their arguments and messages, and states that resume exactly."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest
import torch
from torch import nn

from library import optimizers
from library.optimizer_state import load_optimizer_state, optimizer_state_tensors
from library.optimizers import (
    CreatedOptimizer,
    MissingPackageError,
    argument_problems,
    create_optimizer,
    is_schedule_free,
    optimizer_class,
    optimizer_name,
)
from library.options.errors import UserError
from library.options.key_values import read_literals
from library.options.optimizer import OptimizerOptions


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix that is large enough for 8-bit states (4096 elements), one that is not, and a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 80), (3, 5), (7,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def created(optimizer_type: str, *arguments: str, groups: Any = None, **options: Any) -> CreatedOptimizer:
    values = {"optimizer_type": optimizer_type, "optimizer_args": arguments or None, "learning_rate": 1e-3} | options
    return create_optimizer(OptimizerOptions(**values), parameters() if groups is None else groups)


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


# --- names -------------------------------------------------------------------------------------------------
NAMES = {
    "AdamW": "torch.optim.adamw.AdamW",
    "AdamW8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.adamw.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.adamw.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.adamw.PagedAdamW32bit",
    "Lion8bit": "bitsandbytes.optim.lion.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.lion.PagedLion8bit",
    "SGDNesterov8bit": "bitsandbytes.optim.sgd.SGD8bit",
    "SGDNesterov": "torch.optim.sgd.SGD",
    "Lion": "lion_pytorch.lion_pytorch.Lion",
    "DAdaptation": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.dadapt_adagrad.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.dadapt_adam.DAdaptAdam",
    "DAdaptAdan": "dadaptation.dadapt_adan.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.dadapt_lion.DAdaptLion",
    "DAdaptSGD": "dadaptation.dadapt_sgd.DAdaptSGD",
    "Prodigy": "prodigyopt.prodigy.Prodigy",
    "Adafactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    "SGDScheduleFree": "schedulefree.sgd_schedulefree.SGDScheduleFree",
    "RAdamScheduleFree": "schedulefree.radam_schedulefree.RAdamScheduleFree",
    "RAdam": "torch.optim.radam.RAdam",
    "bitsandbytes.optim.AdEMAMix8bit": "bitsandbytes.optim.ademamix.AdEMAMix8bit",
    "torch.optim.NAdam": "torch.optim.nadam.NAdam",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_an_optimizer_that_steps(name: str) -> None:
    made = created(name)
    before = [parameter.detach().clone() for group in made.optimizer.param_groups for parameter in group["params"]]
    for seed in range(8):  # RAdam begins with five steps that only collect statistics
        step(made.optimizer, seed)
    after = [parameter.detach() for group in made.optimizer.param_groups for parameter in group["params"]]
    assert made.name == NAMES[name]
    assert all(torch.isfinite(value).all() for value in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name in optimizers._BUILT_IN])
def test_built_in_names_ignore_case(name: str) -> None:
    assert optimizer_class(name.upper()) is optimizer_class(name)


def test_the_default_is_adamw_and_legacy_flags_name_theirs() -> None:
    assert optimizer_name(OptimizerOptions()) == "AdamW"
    assert optimizer_name(OptimizerOptions(use_8bit_adam=True)) == "AdamW8bit"
    assert optimizer_name(OptimizerOptions(use_lion_optimizer=True)) == "Lion"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_8bit_adam": True, "use_lion_optimizer": True}, "exclude each other"),
        ({"use_8bit_adam": True, "optimizer_type": "Lion"}, "--use_8bit_adam means --optimizer_type AdamW8bit"),
        ({"use_lion_optimizer": True, "optimizer_type": "Lion"}, "--use_lion_optimizer means --optimizer_type Lion"),
    ],
)
def test_legacy_flags_refuse_a_second_choice(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer_name(OptimizerOptions(**options))


@pytest.mark.parametrize("name", ["radam", "AdamWW", "DAdaptNothing", "MyScheduleFree", "My8bit", "lr_scheduler"])
def test_an_unknown_name_lists_the_valid_ones(name: str) -> None:
    with pytest.raises(UserError, match=rf"--optimizer_type {name} is unknown.*DAdaptAdam.*RAdam"):
        optimizer_class(name)


def test_an_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(UserError, match="Did you mean RAdam"):
        optimizer_class("radam")


def test_an_unknown_class_of_a_module_is_named() -> None:
    with pytest.raises(UserError, match="torch.optim has no class adamw8"):
        optimizer_class("torch.optim.adamw8")


def test_a_dotted_dadaptation_path_is_accepted_and_warns_like_the_name(caplog: pytest.LogCaptureFixture) -> None:
    assert created("dadaptation.DAdaptAdam").name == NAMES["DAdaptAdam"]
    assert "about 1.0 is expected" in warnings_of(caplog)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(MissingPackageError, match="--optimizer_type prodigy needs the package prodigyopt.*pip install"):
        optimizer_class("prodigy")
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(MissingPackageError, match="needs the package lion-pytorch, .*pip install lion-pytorch"):
        optimizer_class("Lion")
    with pytest.raises(ImportError, match="no_such_package"):
        optimizer_class("no_such_package.optim.Adam")


def test_a_package_that_is_too_old_is_named_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    needed = dict.fromkeys(("PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "PagedLion8bit"), "0.39")
    for name, version in {**needed, "Lion8bit": "0.38"}.items():
        monkeypatch.delattr(bitsandbytes.optim, name)
        message = rf"bitsandbytes has no {name}. Install bitsandbytes {version} or newer: pip install -U bitsandbytes"
        with pytest.raises(MissingPackageError, match=message):
            optimizer_class(name)
    monkeypatch.delattr(bitsandbytes.optim, "AdamW8bit")
    with pytest.raises(MissingPackageError, match=r"has no AdamW8bit. Install bitsandbytes: pip"):
        optimizer_class("AdamW8bit")


def test_only_the_package_of_the_class_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    module = type(sys)("other_package")
    module.OwnScheduleFree = type("OwnScheduleFree", (torch.optim.SGD,), {})
    monkeypatch.setitem(sys.modules, "other_package", module)
    made = created("other_package.OwnScheduleFree")
    assert made.is_schedule_free


@pytest.mark.parametrize(
    ("name", "expected"), [("adamwschedulefree", True), ("a.B.XScheduleFree", True), ("AdamW", False)]
)
def test_schedule_free_optimizers_are_told_by_name(name: str, expected: bool) -> None:
    assert is_schedule_free(name) is expected


def test_schedule_free_optimizers_start_in_train_mode() -> None:
    assert created("AdamWScheduleFree").optimizer.param_groups[0]["train_mode"] is True


# --- arguments ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("a=0.01", 0.01),
        ("a=1e-5", 1e-5),
        ("a=True", True),
        ("a=true", True),
        ("a=FALSE", False),
        ("a=none", None),
        ("a=(0.9,0.99)", (0.9, 0.99)),
        ("a=0.9,0.99", (0.9, 0.99)),
        ("a='text'", "text"),
        ("a='x=1'", "x=1"),
        (" a = -3 ", -3),
    ],
)
def test_arguments_are_python_literals(item: str, value: Any) -> None:
    parsed = read_literals([item], "--optimizer_args")
    assert parsed == {"a": value}
    assert type(parsed["a"]) is type(value)


@pytest.mark.parametrize("item", ["a", "=1", "a=word", "a=1=2", "a=", "a b=1", "a=__import__('os')"])
def test_a_bad_argument_is_named(item: str) -> None:
    with pytest.raises(UserError) as error:
        read_literals(["good=1", item], "--optimizer_args")
    assert str(error.value).startswith("--optimizer_args: ")
    assert repr(item) in str(error.value)


def test_arguments_reach_the_optimizer_and_the_metadata_text() -> None:
    made = created("AdamW", "weight_decay=0.05", "betas=.9,.95")
    assert made.optimizer.param_groups[0]["weight_decay"] == 0.05
    assert made.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert made.args_text == "weight_decay=0.05,betas=(0.9, 0.95)"


def test_an_argument_that_the_class_does_not_take_is_explained() -> None:
    with pytest.raises(UserError, match="--optimizer_type AdamW cannot be made with lr=0.001, foo=1.*'foo'"):
        created("AdamW", "foo=1")


def test_a_negative_learning_rate_is_refused() -> None:
    with pytest.raises(UserError, match="lr=-1.*Invalid learning rate"):
        created("AdamW", learning_rate=-1.0)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        created("AdamW", groups=[])


def test_group_learning_rates_win_and_the_callers_groups_stay_as_they_are() -> None:
    first, second = parameters()[:2]
    groups = [{"params": [first], "lr": 5e-4}, {"params": [second]}]
    made = created("AdamW", groups=groups)
    assert [group["lr"] for group in made.optimizer.param_groups] == [5e-4, 1e-3]
    assert made.learning_rate == 1e-3
    assert set(groups[1]) == {"params"}


@pytest.mark.parametrize("name", ["SGDNesterov", "SGDNesterov8bit"])
def test_nesterov_adds_momentum_and_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    made = created(name)
    assert made.args_text == "nesterov=True,momentum=0.9"
    group = made.optimizer.param_groups[0]
    assert 0.9 in (group.get("momentum"), group.get("betas", (None,))[0])
    assert "needs a momentum; 0.9 is used" in warnings_of(caplog)


def test_nesterov_keeps_a_given_momentum_silently(caplog: pytest.LogCaptureFixture) -> None:
    made = created("SGDNesterov", "momentum=0.5")
    assert made.optimizer.param_groups[0]["momentum"] == 0.5
    assert warnings_of(caplog) == ""


def test_arguments_that_a_class_lacks_are_named_with_the_nearest_that_it_has() -> None:
    def problems_with(*arguments: str, **values: Any) -> list[str]:
        return argument_problems(OptimizerOptions(optimizer_args=arguments, **values))

    assert problems_with("betas=0.8,0.9", "lr=1", "eps=1e-6") == []
    close, far = problems_with("weight_decy=1", "foo=1")
    assert close.startswith("--optimizer_args: AdamW has no argument weight_decy; did you mean weight_decay? It takes ")
    assert far.startswith("--optimizer_args: AdamW has no argument foo. It takes betas, eps, weight_decay")
    assert "lr," not in far and "params" not in far and "self" not in far
    for name in ("params", "self"):
        assert len(problems_with(f"{name}=1")) == 1
    [text] = problems_with("nesterof=True", optimizer_type="SGDNesterov")
    assert "SGD has no argument nesterof; did you mean nesterov?" in text


def test_only_the_first_of_several_optimizers_speaks(caplog: pytest.LogCaptureFixture) -> None:
    options = OptimizerOptions(optimizer_type="SGDNesterov")
    for is_silent in (True, False):
        caplog.clear()
        create_optimizer(options, parameters(), is_silent=is_silent)
        assert bool(warnings_of(caplog)) != is_silent


# --- learning-rate-free optimizers and Adafactor -----------------------------------------------------------
@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_a_small_learning_rate_warns_for_learning_rate_free_optimizers(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    created(name, learning_rate=0.1)
    assert "0.1 is small" in warnings_of(caplog)
    caplog.clear()
    created(name, learning_rate=1.0)
    assert warnings_of(caplog) == ""


def test_the_first_groups_learning_rate_counts_for_learning_rate_free_optimizers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = parameters()[:2]
    created("Prodigy", groups=[{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}], learning_rate=1e-4)
    assert "small" not in warnings_of(caplog)
    assert "of [1.0, 0.5] the first counts" in warnings_of(caplog)


def test_adafactor_uses_relative_steps_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    first, second = parameters()[:2]
    made = created("Adafactor", groups=[{"params": [first], "lr": 5e-4}, {"params": [second]}], learning_rate=1e-4)
    assert made.lr_scheduler == "adafactor:0.0001"
    assert made.learning_rate is None
    assert made.group_learning_rates_removed
    assert made.args_text == "relative_step=True"
    assert [group["lr"] for group in made.optimizer.param_groups] == [None, None]
    assert "0.0001 is the initial one" in warnings_of(caplog)
    assert "learning rates of parameter groups are ignored" in warnings_of(caplog)


def test_adafactor_without_learning_rate_or_group_rates_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    made = created("Adafactor", learning_rate=0.0)
    assert warnings_of(caplog) == ""
    assert not made.group_learning_rates_removed


def test_adafactors_warmup_init_needs_relative_steps() -> None:
    made = created("Adafactor", "relative_step=False", "warmup_init=True")
    assert made.args_text == "relative_step=True,warmup_init=True"
    assert made.learning_rate is None


def test_adafactor_with_a_fixed_step_recommends_its_settings(caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("relative_step=False", "scale_parameter=False")
    made = created("Adafactor", *arguments, "clip_threshold=0.5")
    said = warnings_of(caplog)
    assert "--max_grad_norm 0" in said and "constant_with_warmup" in said and "clip_threshold=1.0" in said
    assert (made.learning_rate, made.lr_scheduler) == (1e-3, "constant")
    caplog.clear()
    created("Adafactor", *arguments, max_grad_norm=0.0, lr_scheduler="constant_with_warmup")
    assert warnings_of(caplog) == ""


def test_several_optimizers_cannot_share_adafactors_relative_step() -> None:
    options = OptimizerOptions(optimizer_type="Adafactor")
    with pytest.raises(UserError, match="add relative_step=False"):
        create_optimizer(options, parameters(), is_one_of_several=True)


# --- exact resume ------------------------------------------------------------------------------------------
RESUMABLE = [
    ("AdamW", ()),
    ("AdamW", ("amsgrad=True", "betas=(0.8,0.9)")),
    ("AdamW8bit", ()),
    ("PagedAdamW8bit", ()),
    ("Lion8bit", ()),
    ("SGDNesterov8bit", ()),
    ("Adafactor", ()),
    ("Adafactor", ("relative_step=False", "beta1=0.9")),
    ("Lion", ()),
    ("Prodigy", ()),
    ("DAdaptAdam", ()),
    ("DAdaptAdan", ()),
    ("DAdaptLion", ()),
    ("AdamWScheduleFree", ("warmup_steps=5",)),
    ("RAdamScheduleFree", ("silent_sgd_phase=False",)),
    ("SGDNesterov", ()),
]


def resumed(name: str, arguments: tuple[str, ...], dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters after 3 + 2 steps: straight on, and through a state that went through JSON in between."""
    straight, again = parameters(dtype), parameters(dtype)
    first = created(name, *arguments, groups=straight).optimizer
    for seed in range(3):
        step(first, seed)
    tensors, rest = optimizer_state_tensors(first)
    rest = json.loads(json.dumps(rest, allow_nan=False))
    pointers = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers), "tensors of a state must not share memory"
    with torch.no_grad():
        for source, copy in zip(straight, again, strict=True):
            copy.copy_(source)
    second = created(name, *arguments, groups=again).optimizer
    load_optimizer_state(second, tensors, rest)
    for seed in (10, 11):
        step(first, seed)
        step(second, seed)
    return straight, again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "arguments"), RESUMABLE, ids=lambda value: str(value))
def test_a_resumed_optimizer_continues_bit_for_bit(name: str, arguments: tuple[str, ...], dtype: torch.dtype) -> None:
    for expected, actual in zip(*resumed(name, arguments, dtype), strict=True):
        assert torch.equal(expected, actual)


def test_eight_bit_states_stay_eight_bit() -> None:
    first = created("AdamW8bit").optimizer
    step(first, 0)
    tensors, rest = optimizer_state_tensors(first)
    assert sum(tensor.dtype == torch.uint8 for tensor in tensors.values()) == 2  # both moments of the large matrix
    again = parameters()
    second = created("AdamW8bit", groups=again).optimizer
    load_optimizer_state(second, tensors, rest)
    assert second.state[again[0]]["state1"].dtype == torch.uint8
    assert second.state[again[1]]["state1"].dtype == torch.float32


def test_a_state_of_other_groups_is_refused() -> None:
    tensors, rest = optimizer_state_tensors(created("AdamW").optimizer)
    other = created("AdamW", groups=parameters()[:2]).optimizer
    with pytest.raises(ValueError, match=r"groups of sizes \[3\], this run has \[2\]"):
        load_optimizer_state(other, tensors, rest)


def test_a_state_without_one_of_its_tensors_is_refused() -> None:
    first = created("AdamW").optimizer
    step(first, 0)
    tensors, rest = optimizer_state_tensors(first)
    del tensors["state.1.exp_avg"]
    with pytest.raises(ValueError, match="lacks the tensor state.1.exp_avg"):
        load_optimizer_state(created("AdamW").optimizer, tensors, rest)


def test_a_value_that_cannot_be_saved_is_named() -> None:
    optimizer = created("AdamW").optimizer
    optimizer.param_groups[0]["callback"] = print
    with pytest.raises(ValueError, match="param_groups.0.callback"):
        optimizer_state_tensors(optimizer)
