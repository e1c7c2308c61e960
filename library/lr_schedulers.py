"""Learning-rate schedules by name: own formulas, or any class by its path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.optimizers import CreatedOptimizer
from library.options.errors import UserError
from library.options.key_values import read_literals

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions

logger = logging.getLogger(__name__)

#: Factor of a group's initial learning rate after k scheduler steps.
Factor = Callable[[int], float]


class OptimizerOwnedRates:
    """The schedule of optimizers that need none (schedule-free): steps do nothing, rates are the groups' own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing to do."""

    def get_last_lr(self) -> list[float]:
        """The learning rate of every group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Empty: nothing is remembered."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts what `state_dict` gave."""


class RelativeStepRates(OptimizerOwnedRates):
    """The schedule of Adafactor with relative_step=True: the rates that it finds, and `initial` before it has any."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial: float) -> None:
        super().__init__(optimizer)
        self.initial = initial

    def get_last_lr(self) -> list[float]:
        """The learning rate that the last step used for the first parameter of each group that has been stepped."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        adafactor: Any = self.optimizer
        states = (adafactor.state.get(parameter) for parameter in group["params"])
        state = next((state for state in states if state), None)
        return float(adafactor._get_lr(group, state)) if state else self.initial


@dataclass(frozen=True)
class _Plan:
    """The numbers that the formulas share."""

    total: int  # scheduler steps of the whole run
    warmup: int
    decay: int
    default_lr: float | None  # the optimizer's, for floors that are given as learning rates
    arguments: dict[str, Any]  # from the options, overridden by --lr_scheduler_args

    @property
    def after_warmup(self) -> int:
        return max(1, self.total - self.warmup)


# --- formulas ----------------------------------------------------------------------------------------------
def _with_warmup(plan: _Plan, factor: Factor) -> Factor:
    """Rise linearly from 0 over the warm-up, then `factor`."""
    return lambda k: k / max(1, plan.warmup) if k < plan.warmup else factor(k)


def _constant(plan: _Plan) -> Factor:
    return lambda k: 1.0


def _constant_with_warmup(plan: _Plan) -> Factor:
    return _with_warmup(plan, lambda k: 1.0)


def _linear(plan: _Plan) -> Factor:
    return _with_warmup(plan, lambda k: max(0.0, (plan.total - k) / plan.after_warmup))


def _cosine_wave(progress: float, waves: float) -> float:
    """From 1 through `waves` full cosine waves; half a wave ends at 0."""
    return 0.5 * (1.0 + math.cos(math.pi * waves * 2.0 * progress))


def _cosine(plan: _Plan) -> Factor:
    waves = plan.arguments["num_cycles"]
    return _with_warmup(plan, lambda k: max(0.0, _cosine_wave((k - plan.warmup) / plan.after_warmup, waves)))


def _cosine_with_restarts(plan: _Plan) -> Factor:
    cycles = plan.arguments["num_cycles"]

    def factor(k: int) -> float:
        progress = (k - plan.warmup) / plan.after_warmup
        return 0.0 if progress >= 1.0 else max(0.0, _cosine_wave((cycles * progress) % 1.0, 0.5))

    return _with_warmup(plan, factor)


def _polynomial(plan: _Plan) -> Factor:
    power, end = plan.arguments["power"], plan.arguments["lr_end"]
    start = _needed_lr(plan, "polynomial")
    if not start > end:
        raise UserError(
            f"--lr_scheduler polynomial falls to lr_end = {end}, but the learning rate is {start}: "
            "raise --learning_rate, or give a smaller one with --lr_scheduler_args lr_end=..."
        )

    def factor(k: int) -> float:
        if k > plan.total:
            return end / start
        remaining = 1 - (k - plan.warmup) / plan.after_warmup
        return ((start - end) * remaining**power + end) / start

    return _with_warmup(plan, factor)


def _inverse_sqrt(plan: _Plan) -> Factor:
    timescale = plan.arguments["timescale"] or plan.warmup or 10_000
    return _with_warmup(plan, lambda k: 1.0 / math.sqrt((k + timescale - plan.warmup) / timescale))


def _cosine_with_min_lr(plan: _Plan) -> Factor:
    waves, ratio = plan.arguments["num_cycles"], plan.arguments["min_lr_rate"]
    if plan.arguments["min_lr"] is not None:
        ratio = plan.arguments["min_lr"] / _needed_lr(plan, "cosine_with_min_lr")
    if ratio is None:
        raise UserError(
            "--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, or --lr_scheduler_args min_lr=..."
        )

    def factor(k: int) -> float:
        return max(0.0, _cosine_wave((k - plan.warmup) / plan.after_warmup, waves) * (1 - ratio) + ratio)

    return _with_warmup(plan, factor)


def _warmup_stable_decay(plan: _Plan) -> Factor:
    ratio, waves = plan.arguments["min_lr_ratio"] or 0.0, plan.arguments["num_cycles"]
    stable = plan.arguments["num_stable_steps"]
    stable_end = plan.total - plan.decay if stable is None else plan.warmup + stable
    rise, fall = (_shape(plan, kind, waves) for kind in ("warmup_type", "decay_type"))

    def factor(k: int) -> float:
        if k < plan.warmup:
            return max(0.0, rise(1 - k / plan.warmup) * (1 - ratio) + ratio)
        if k < stable_end:
            return 1.0
        if k < stable_end + plan.decay:
            return max(0.0, fall((k - stable_end) / plan.decay) * (1 - ratio) + ratio)
        return ratio

    return factor


def _shape(plan: _Plan, argument: str, waves: float) -> Callable[[float], float]:
    """A curve from 1 at progress 0 to 0 at progress 1 (a rise runs through it backwards)."""
    is_rise = argument == "warmup_type"
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: _cosine_wave(progress, 0.5 if is_rise else waves),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    name = plan.arguments[argument]
    if name not in shapes:
        raise UserError(f"--lr_scheduler_args: {argument}={name!r} is unknown; choose one of {', '.join(shapes)}.")
    return shapes[name]


def _piecewise_constant(plan: _Plan) -> Factor:
    rules = plan.arguments["step_rules"]
    if not rules:
        raise UserError(
            "--lr_scheduler piecewise_constant needs --lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\": "
            "factor 1 before step 10, 0.1 before step 20, 0.01 from there on."
        )
    try:
        *pieces, last = str(rules).split(",")
        limits = [(int(limit), float(value)) for value, limit in (piece.split(":") for piece in pieces)]
        final = float(last)
    except ValueError:
        raise UserError(
            f"--lr_scheduler_args: step_rules={rules!r} is not of the form '1:10,0.1:20,0.01' "
            "(factor:step, ..., last factor)."
        ) from None
    limits.sort()
    return lambda k: next((value for limit, value in limits if k < limit), final)


def _needed_lr(plan: _Plan, name: str) -> float:
    if plan.default_lr is None:
        raise UserError(f"--lr_scheduler {name} needs an optimizer with a learning rate of its own.")
    return plan.default_lr


# --- names -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Entry:
    """A schedule's formula, and the `--lr_scheduler_args` that it takes with their values from the options."""

    formula: Callable[[_Plan], Factor]
    arguments: Callable[[OptimizerOptions], dict[str, Any]] = lambda options: {}


_SCHEDULES: dict[str, _Entry] = {
    "constant": _Entry(_constant),
    "constant_with_warmup": _Entry(_constant_with_warmup),
    "linear": _Entry(_linear),
    # num_cycles of `cosine` counts whole waves and is not --lr_scheduler_num_cycles
    "cosine": _Entry(_cosine, lambda o: {"num_cycles": 0.5}),
    "cosine_with_restarts": _Entry(_cosine_with_restarts, lambda o: {"num_cycles": o.lr_scheduler_num_cycles}),
    "polynomial": _Entry(_polynomial, lambda o: {"power": o.lr_scheduler_power, "lr_end": 1e-7}),
    "inverse_sqrt": _Entry(_inverse_sqrt, lambda o: {"timescale": o.lr_scheduler_timescale}),
    "cosine_with_min_lr": _Entry(
        _cosine_with_min_lr,
        lambda o: {
            "num_cycles": o.lr_scheduler_num_cycles / 2,
            "min_lr": None,
            "min_lr_rate": o.lr_scheduler_min_lr_ratio,
        },
    ),
    "warmup_stable_decay": _Entry(
        _warmup_stable_decay,
        lambda o: {
            "num_cycles": o.lr_scheduler_num_cycles / 2,
            "min_lr_ratio": o.lr_scheduler_min_lr_ratio,
            "num_stable_steps": None,
            "warmup_type": "linear",
            "decay_type": "cosine",
        },
    ),
    "piecewise_constant": _Entry(_piecewise_constant, lambda o: {"step_rules": None}),
}

#: Valid values of `--lr_scheduler`.
LR_SCHEDULERS = (*_SCHEDULES, "adafactor")


# --- creation ----------------------------------------------------------------------------------------------
def create_lr_scheduler(
    options: OptimizerOptions, created: CreatedOptimizer, *, num_training_steps: int, num_processes: int = 1
) -> LRScheduler | OptimizerOwnedRates:
    """The schedule that the options, or the optimizer itself (Adafactor, schedule-free ones), ask for.

    `num_training_steps` are scheduler steps: optimizer steps times `num_processes`, because accelerate advances a
    schedule once per process. Ratios refer to them; whole numbers of warm-up and decay steps are taken as they are.
    Raises UserError for unknown names and for arguments that the schedule does not take.
    """
    optimizer = created.optimizer
    if created.is_schedule_free:
        _warn_ignored(options)
        return OptimizerOwnedRates(optimizer)
    warmup = _steps(options.lr_warmup_steps, num_training_steps)
    arguments = read_literals(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return _by_path(options.lr_scheduler_type, optimizer, warmup, arguments)
    name = created.lr_scheduler
    if name.startswith("adafactor"):
        return _adafactor(name, optimizer, warmup)
    entry = _SCHEDULES.get(name)
    if entry is None:
        raise UserError(unknown_name(name))
    if name == "constant":
        _refuse_warmup(warmup, "--lr_scheduler constant", "Use constant_with_warmup, or remove --lr_warmup_steps.")
    _warn_shared_warmup(options, num_processes)
    plan = _Plan(
        total=num_training_steps,
        warmup=warmup,
        decay=_steps(options.lr_decay_steps, num_training_steps),
        default_lr=optimizer.defaults.get("lr"),
        arguments=_merged(name, entry.arguments(options), arguments),
    )
    return LambdaLR(optimizer, entry.formula(plan))


def _steps(value: int | float, total: int) -> int:
    """Steps as they are; a float is a ratio of all steps."""
    return int(value * total) if isinstance(value, float) else value


def _merged(name: str, known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UserError(f"--lr_scheduler_args: {', '.join(unknown)} is unknown to --lr_scheduler {name}; {takes}.")
    return known | given


def _refuse_warmup(warmup: int, what: str, advice: str) -> None:
    if warmup != 0:
        raise UserError(f"{what} has no warm-up, but --lr_warmup_steps gives {warmup} steps. {advice}")


def _adafactor(name: str, optimizer: torch.optim.Optimizer, warmup: int) -> RelativeStepRates:
    """A schedule that reports the learning rates which Adafactor finds; `name` carries the first: adafactor:<lr>."""
    from transformers.optimization import Adafactor

    if not isinstance(optimizer, Adafactor) or not all(group["relative_step"] for group in optimizer.param_groups):
        raise UserError(
            f"--lr_scheduler {name} reports the learning rate of Adafactor with relative_step=True, "
            f"but the optimizer is {type(optimizer).__name__} with a learning rate of its own. "
            "With --optimizer_type Adafactor this schedule is chosen automatically; otherwise choose another."
        )
    _refuse_warmup(warmup, "Adafactor with relative_step=True", "Use warmup_init=True in --optimizer_args instead.")
    try:
        initial = float(name.removeprefix("adafactor").removeprefix(":"))
    except ValueError:
        raise UserError(
            f"--lr_scheduler {name} lacks the initial learning rate; leave --lr_scheduler away with Adafactor."
        ) from None
    return RelativeStepRates(optimizer, initial)


def _by_path(path: str, optimizer: torch.optim.Optimizer, warmup: int, arguments: dict[str, Any]) -> LRScheduler:
    _refuse_warmup(warmup, f"--lr_scheduler_type {path}", "Remove --lr_warmup_steps.")
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else torch_schedules
    except (ImportError, ValueError) as error:
        raise UserError(f"--lr_scheduler_type {path}: module {module_name} cannot be imported ({error}).") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        names = sorted(
            name for name, value in vars(torch_schedules).items()
            if inspect.isclass(value) and issubclass(value, LRScheduler) and not name.startswith("_")
        )  # fmt: skip
        raise UserError(
            f"--lr_scheduler_type {path} is no class of {module_name or 'torch.optim.lr_scheduler'} "
            f"(upper and lower case count). In torch.optim.lr_scheduler: {', '.join(names)}."
        )
    if issubclass(found, torch_schedules.ReduceLROnPlateau):
        raise UserError(f"--lr_scheduler_type {path} waits for a measured value at every step, which training lacks.")
    schedule_class: Any = found
    try:
        return schedule_class(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
        raise UserError(
            f"--lr_scheduler_type {path} cannot be made with {given}: {error}. Check --lr_scheduler_args."
        ) from error


def _warn_shared_warmup(options: OptimizerOptions, num_processes: int) -> None:
    for option, value in (("--lr_warmup_steps", options.lr_warmup_steps), ("--lr_decay_steps", options.lr_decay_steps)):
        if num_processes > 1 and isinstance(value, int) and value:
            logger.warning(
                "%s %d is shared by %d processes and covers %d optimizer steps; a ratio (10%%) would not be.",
                option, value, num_processes, math.ceil(value / num_processes),
            )  # fmt: skip


def unknown_name(name: str) -> str:
    """What to say about a `--lr_scheduler` that is none of `LR_SCHEDULERS`."""
    close = difflib.get_close_matches(name.lower(), LR_SCHEDULERS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"--lr_scheduler {name} is not supported.{hint} Choose one of {', '.join(LR_SCHEDULERS)}, "
        "or give any class with --lr_scheduler_type."
    )


def _warn_ignored(options: OptimizerOptions) -> None:
    defaults = type(options)()
    names = [name for name in vars(defaults) if name.startswith("lr_")]
    ignored = [f"--{name}" for name in names if getattr(options, name) != getattr(defaults, name)]
    if ignored:
        logger.warning("Schedule-free optimizers take no learning-rate schedule; ignored: %s.", ", ".join(ignored))
