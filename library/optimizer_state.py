"""Exact states of optimizers and learning-rate schedules as tensors and JSON, for resuming without a pickle."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

#: Tagged values in the JSON part; a plain dict never has these keys.
_TENSOR, _TUPLE, _ITEMS, _FLOAT = "__tensor__", "__tuple__", "__items__", "__float__"


class LearningRateSchedule(Protocol):
    """What torch's schedules and ours have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def optimizer_state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as (named CPU tensors that share no memory, JSON-able rest).

    Nested dictionaries and tables shared between parameters (8-bit optimizers) are kept. Raises ValueError for a value
    that is neither a tensor nor a number, text or container.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    return tensors, {key: _encode(value, key, tensors) for key, value in state.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Restore what `optimizer_state_tensors` returned, dtypes included, onto the devices of the parameters.

    The tensors belong to the optimizer afterwards (it steps them in place where the device is the same). Raises
    ValueError if groups or tensors do not fit the optimizer.
    """
    state = {key: _decode(value, tensors) for key, value in rest.items()}
    _check_groups(optimizer, state)
    optimizer.load_state_dict(state)
    _restore_dtypes(optimizer, {key: _decode(value, tensors) for key, value in rest.items()})


def scheduler_state(scheduler: LearningRateSchedule) -> dict[str, Any]:
    """The state of a learning-rate schedule, JSON-able."""
    tensors: dict[str, Tensor] = {}
    state = {key: _encode(value, key, tensors) for key, value in scheduler.state_dict().items()}
    if tensors:
        raise ValueError(f"The learning-rate schedule {type(scheduler).__name__} keeps tensors: {', '.join(tensors)}.")
    return state


def load_scheduler_state(scheduler: LearningRateSchedule, state: Mapping[str, Any]) -> None:
    """Restore what `scheduler_state` returned."""
    scheduler.load_state_dict({key: _decode(value, {}) for key, value in state.items()})


# --- going on with other options -------------------------------------------------------------------------------
#: What the options of a run always decide, whatever a state holds.
_OWN_VALUES = ("lr", "initial_lr", "weight_decay")


def group_values(optimizer: torch.optim.Optimizer, arguments: Collection[str] = ()) -> list[dict[str, Any]]:
    """What the options say for every group: learning rates, weight decay and these further `arguments`."""
    names = (*_OWN_VALUES, *arguments)
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def continue_schedule(
    schedule: LearningRateSchedule, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any],
    chosen: Sequence[Mapping[str, Any]], *, is_changed: bool = False, step_ratio: float = 1.0,
) -> None:
    """Let `optimizer`, just loaded from a state, go on with the `chosen` values of its groups (see `group_values`).

    The schedule stands where the `saved` one did, after `step_ratio` times its steps: formulas and the optimizer's
    own rates at once; other classes take their saved state where nothing differs, else they are stepped there.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, chosen, strict=True):
        group.update(values)
    if not isinstance(schedule, LRScheduler):  # no schedule: the rates of the options
        return
    steps = round(saved.get("last_epoch", 0) * step_ratio)
    if isinstance(schedule, LambdaLR):
        _place_at(schedule, steps)
    elif is_changed or list(schedule.base_lrs) != list(saved.get("base_lrs", ())):
        _step_to(schedule, steps)
    else:
        load_scheduler_state(schedule, saved)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _place_at(schedule: LambdaLR, steps: int) -> None:
    schedule.last_epoch, schedule._step_count = steps, steps + 1
    values = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, value in zip(schedule.optimizer.param_groups, values, strict=True):
        group["lr"] = value
    schedule._last_lr = values


def _step_to(schedule: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer has not stepped yet
        for _ in range(steps):
            schedule.step()


# --- JSON and tensors ------------------------------------------------------------------------------------------
def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        items = [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {_ITEMS: items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "item"):  # numpy scalars
        return _encode(value.item(), path, tensors)
    raise ValueError(f"The state entry {path} is a {type(value).__name__}, which cannot be saved.")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        name = value[_TENSOR]
        if name not in tensors:
            raise ValueError(f"The saved optimizer state lacks the tensor {name}.")
        return tensors[name]
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
    if _FLOAT in value:
        return float(value[_FLOAT])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _check_groups(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    saved = [len(group["params"]) for group in state.get("param_groups", [])]
    present = [len(group["params"]) for group in optimizer.param_groups]
    if saved != present:
        raise ValueError(
            f"The saved optimizer state has parameter groups of sizes {saved}, this run has {present}: "
            "resume with the options that the state was saved with."
        )


def _restore_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the casts of torch's `load_state_dict`, which turns state kept in float32 into half for half parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            _copy_dtypes(optimizer.state[parameter], saved["state"][number])


def _copy_dtypes(loaded: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        present = loaded.get(key)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and present.dtype != value.dtype:
            loaded[key] = value.to(present.device)
        elif isinstance(value, Mapping):
            # 8-bit optimizers wrap their tables in one more dictionary when they save, and not when they load
            _copy_dtypes(present if isinstance(present, dict) else loaded, value)
