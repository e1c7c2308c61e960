"""Optimizers by name: a table name -> class, dotted paths to any other class, `key=value` arguments."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.optimizer_state import load_optimizer_state as load_optimizer_state
from library.optimizer_state import optimizer_state_tensors as optimizer_state_tensors
from library.options.errors import UserError
from library.options.key_values import read_literals

if TYPE_CHECKING:
    from library.options.optimizer import OptimizerOptions

logger = logging.getLogger(__name__)

#: What optimizers accept: parameters, or groups as torch takes them ({"params": [...], "lr": ...}).
Parameters = Sequence[nn.Parameter] | Sequence[Mapping[str, Any]]


class MissingPackageError(UserError, ImportError):
    """An optimizer's package is not installed, or too old."""


@dataclass(frozen=True)
class CreatedOptimizer:
    """An optimizer, and what logs, metadata and the learning-rate schedule need to know about it."""

    optimizer: torch.optim.Optimizer
    name: str  # module.Class, as metadata has it
    args_text: str  # "k=v,k=v", with the arguments that were added here
    is_schedule_free: bool
    learning_rate: float | None  # None: the optimizer finds its own (Adafactor's relative step)
    lr_scheduler: str  # the --lr_scheduler to use; "adafactor:<learning rate>" replaces the user's
    group_learning_rates_removed: bool = False  # metadata then shows no unet_lr and text_encoder_lr


# --- names -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Entry:
    """Where a built-in name's class is, and what is prepared before it is constructed."""

    module: str
    class_name: str
    minimum_version: str | None = None
    prepare: Callable[[_Request], None] | None = None

    @property
    def package(self) -> str:
        """The name to install."""
        return _DISTRIBUTIONS.get(self.module.partition(".")[0], self.module.partition(".")[0])


#: Import name -> name on the package index, where they differ.
_DISTRIBUTIONS = {"lion_pytorch": "lion-pytorch", "prodigyplus": "prodigy-plus-schedule-free"}


@dataclass
class _Request:
    """One optimizer on its way: changed by the preparations of `_Entry`, then constructed."""

    parameters: list[Any]
    learning_rate: float | None
    arguments: dict[str, Any]
    options: OptimizerOptions
    lr_scheduler: str
    group_learning_rates_removed: bool = False
    messages: list[tuple[int, str]] = field(default_factory=list)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups; empty if `parameters` is a flat list."""
        return [group for group in self.parameters if isinstance(group, dict)]

    def warn(self, message: str) -> None:
        self.messages.append((logging.WARNING, message))

    def inform(self, message: str) -> None:
        self.messages.append((logging.INFO, message))


def _prepare_nesterov(request: _Request) -> None:
    request.arguments["nesterov"] = True
    if "momentum" not in request.arguments:
        request.warn("SGD with Nesterov momentum needs a momentum; 0.9 is used (--optimizer_args momentum=0.9).")
        request.arguments["momentum"] = 0.9


def _prepare_learning_rate_free(request: _Request) -> None:
    """Optimizers that estimate the step size themselves want lr near 1, the same for all groups."""
    rates = [group.get("lr", request.learning_rate) for group in request.groups] or [request.learning_rate]
    if rates[0] is not None and rates[0] <= 0.1:
        request.warn(f"The learning rate {rates[0]} is small for D-Adaptation and Prodigy: about 1.0 is expected.")
    if any(rate != rates[0] for rate in rates):
        request.warn(
            f"D-Adaptation and Prodigy use one learning rate for all parameter groups: of {rates} the first counts."
        )


def _prepare_adafactor(request: _Request) -> None:
    arguments = request.arguments
    relative_step = arguments.setdefault("relative_step", True)
    if not relative_step and arguments.get("warmup_init", False):
        request.inform("Adafactor: warmup_init=True needs relative_step=True, which is used now.")
        arguments["relative_step"] = relative_step = True
    if relative_step:
        _prepare_relative_step(request)
        return
    if request.options.max_grad_norm != 0.0:
        request.warn("Adafactor clips updates itself: --max_grad_norm 0 is recommended with relative_step=False.")
    if request.lr_scheduler != "constant_with_warmup":
        request.warn("--lr_scheduler constant_with_warmup is recommended for Adafactor with relative_step=False.")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        request.warn("clip_threshold=1.0 is recommended for Adafactor with relative_step=False.")


def _prepare_relative_step(request: _Request) -> None:
    """Adafactor finds its learning rate: ours only becomes the first value that its schedule reports."""
    if request.learning_rate != 0:
        request.warn(f"Adafactor with relative_step=True: learning rate {request.learning_rate} is the initial one.")
    if any("lr" in group for group in request.groups):
        request.warn("Adafactor with relative_step=True: the learning rates of parameter groups are ignored.")
        request.group_learning_rates_removed = True
    for group in request.groups:
        group.pop("lr", None)
    request.lr_scheduler = f"adafactor:{request.learning_rate}"
    request.inform(f"Adafactor with relative_step=True: its own schedule {request.lr_scheduler} is used.")
    request.learning_rate = None


_BNB = "bitsandbytes.optim"
_BUILT_IN: dict[str, _Entry] = {
    "AdamW": _Entry("torch.optim", "AdamW"),
    "AdamW8bit": _Entry(_BNB, "AdamW8bit"),
    "PagedAdamW": _Entry(_BNB, "PagedAdamW", "0.39"),
    "PagedAdamW8bit": _Entry(_BNB, "PagedAdamW8bit", "0.39"),
    "PagedAdamW32bit": _Entry(_BNB, "PagedAdamW32bit", "0.39"),
    "Lion8bit": _Entry(_BNB, "Lion8bit", "0.38"),
    "PagedLion8bit": _Entry(_BNB, "PagedLion8bit", "0.39"),
    "SGDNesterov8bit": _Entry(_BNB, "SGD8bit", prepare=_prepare_nesterov),
    "SGDNesterov": _Entry("torch.optim", "SGD", prepare=_prepare_nesterov),
    "Lion": _Entry("lion_pytorch", "Lion"),
    "DAdaptation": _Entry("dadaptation.experimental", "DAdaptAdamPreprint", prepare=_prepare_learning_rate_free),
    "DAdaptAdamPreprint": _Entry("dadaptation.experimental", "DAdaptAdamPreprint", prepare=_prepare_learning_rate_free),
    "DAdaptAdaGrad": _Entry("dadaptation", "DAdaptAdaGrad", prepare=_prepare_learning_rate_free),
    "DAdaptAdam": _Entry("dadaptation", "DAdaptAdam", prepare=_prepare_learning_rate_free),
    "DAdaptAdan": _Entry("dadaptation", "DAdaptAdan", prepare=_prepare_learning_rate_free),
    "DAdaptAdanIP": _Entry("dadaptation.experimental", "DAdaptAdanIP", prepare=_prepare_learning_rate_free),
    "DAdaptLion": _Entry("dadaptation", "DAdaptLion", prepare=_prepare_learning_rate_free),
    "DAdaptSGD": _Entry("dadaptation", "DAdaptSGD", prepare=_prepare_learning_rate_free),
    "Prodigy": _Entry("prodigyopt", "Prodigy", prepare=_prepare_learning_rate_free),
    "Adafactor": _Entry("transformers.optimization", "Adafactor", prepare=_prepare_adafactor),
    "AdamWScheduleFree": _Entry("schedulefree", "AdamWScheduleFree"),
    "SGDScheduleFree": _Entry("schedulefree", "SGDScheduleFree"),
    "RAdamScheduleFree": _Entry("schedulefree", "RAdamScheduleFree"),
}
_BY_LOWER_NAME = {name.lower(): entry for name, entry in _BUILT_IN.items()}
#: A class reached by a dotted path is prepared like the same class reached by its name.
_PREPARE_BY_CLASS = {
    entry.class_name: entry.prepare for name, entry in _BUILT_IN.items() if entry.prepare and name == entry.class_name
}


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer that the options ask for, as typed; the legacy flags and the default count."""
    if options.use_8bit_adam and options.use_lion_optimizer:
        raise UserError("--use_8bit_adam and --use_lion_optimizer exclude each other.")
    for flag, given, meant in (
        ("--use_8bit_adam", options.use_8bit_adam, "AdamW8bit"),
        ("--use_lion_optimizer", options.use_lion_optimizer, "Lion"),
    ):
        if given and options.optimizer_type:
            raise UserError(f"{flag} means --optimizer_type {meant}; remove it or --optimizer_type.")
        if given:
            return meant
    return options.optimizer_type or "AdamW"


def is_schedule_free(name: str) -> bool:
    """Whether an `--optimizer_type` has train and eval modes and takes no learning-rate schedule."""
    return name.lower().endswith("schedulefree")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that an `--optimizer_type` names.

    Built-in names ignore case; other names without a dot are looked up in torch.optim, names with dots are imported.
    Raises UserError for an unknown name (with the valid ones) and MissingPackageError for a package that is not there.
    """
    return _resolve(name)[0]


def _resolve(name: str) -> tuple[type[torch.optim.Optimizer], Callable[[_Request], None] | None]:
    entry = _BY_LOWER_NAME.get(name.lower())
    if entry is not None:
        return _built_in_class(name, entry), entry.prepare
    if "." in name:
        found = _class_at_path(name)
        return found, _PREPARE_BY_CLASS.get(found.__name__)
    class_of_torch = getattr(torch.optim, name, None)
    if inspect.isclass(class_of_torch) and issubclass(class_of_torch, torch.optim.Optimizer):
        return class_of_torch, None
    raise UserError(_unknown_name(name))


def _built_in_class(name: str, entry: _Entry) -> type[torch.optim.Optimizer]:
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        raise MissingPackageError(
            f"--optimizer_type {name} needs the package {entry.package}, which cannot be imported ({error}). "
            f"Install it: pip install {entry.package}"
        ) from error
    found = getattr(module, entry.class_name, None)
    if found is None:
        version = f" {entry.minimum_version} or newer" if entry.minimum_version else ""
        raise MissingPackageError(
            f"--optimizer_type {name}: the installed {entry.package} has no {entry.class_name}. "
            f"Install {entry.package}{version}: pip install -U {entry.package}"
        )
    return found


def _class_at_path(path: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise MissingPackageError(
            f"--optimizer_type {path}: the module {module_name} cannot be imported ({error}). "
            "Install the package that contains it, or correct the path."
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(
            f"--optimizer_type {path}: the module {module_name} has no class {class_name} (upper and lower case count)."
        )
    return found


def _torch_names() -> list[str]:
    return sorted(
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    )


def _unknown_name(name: str) -> str:
    candidates = {candidate.lower(): candidate for candidate in [*_torch_names(), *_BUILT_IN]}
    close = difflib.get_close_matches(name.lower(), candidates, n=1)
    hint = f" Did you mean {candidates[close[0]]}?" if close else ""
    return (
        f"--optimizer_type {name} is unknown.{hint} Built in: {', '.join(_BUILT_IN)}. "
        f"From torch.optim (exactly so): {', '.join(_torch_names())}. "
        "Any other class: its dotted path, such as bitsandbytes.optim.AdEMAMix8bit."
    )


# --- creation ----------------------------------------------------------------------------------------------
def create_optimizer(
    options: OptimizerOptions, parameters: Parameters, *, is_one_of_several: bool = False, is_silent: bool = False
) -> CreatedOptimizer:
    """The optimizer that the options ask for, over a list of parameters or of groups (a group's "lr" wins).

    `is_one_of_several` marks fused and blockwise optimizers, where Adafactor's relative step is refused. Warnings go
    to the log unless `is_silent`. Raises UserError for a bad name, bad arguments, or arguments that the class does not
    take.
    """
    name = optimizer_name(options)
    found, prepare = _resolve(name)
    request = _Request(
        parameters=[dict(item) if isinstance(item, Mapping) else item for item in parameters],
        learning_rate=options.learning_rate,
        arguments=read_literals(options.optimizer_args, "--optimizer_args"),
        options=options,
        lr_scheduler=options.lr_scheduler,
    )
    if not request.parameters:
        raise UserError("There is nothing to train: no parameter group is left (are all learning rates 0?).")
    if prepare is not None:
        prepare(request)
    if is_one_of_several and request.learning_rate is None:
        raise UserError(
            "Several fused optimizers cannot share Adafactor's relative step: "
            "add relative_step=False (and scale_parameter=False, warmup_init=False) to --optimizer_args."
        )
    for level, message in request.messages:
        if not is_silent:
            logger.log(level, message)
    optimizer = _construct(name, found, request)
    train_mode = getattr(optimizer, "train", None)
    if callable(train_mode):
        train_mode()
    kind = type(optimizer)
    return CreatedOptimizer(
        optimizer=optimizer,
        name=f"{kind.__module__}.{kind.__qualname__}",
        args_text=",".join(f"{key}={value}" for key, value in request.arguments.items()),
        is_schedule_free=is_schedule_free(name),
        learning_rate=request.learning_rate,
        lr_scheduler=request.lr_scheduler,
        group_learning_rates_removed=request.group_learning_rates_removed,
    )


def _construct(name: str, found: type[torch.optim.Optimizer], request: _Request) -> torch.optim.Optimizer:
    arguments = {"lr": request.learning_rate} | request.arguments
    try:
        return found(request.parameters, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(
            f"--optimizer_type {name} cannot be made with {given}: {error}. "
            "Check --optimizer_args and the learning rate."
        ) from error
