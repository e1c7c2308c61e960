"""The learning-rate schedule, made for an optimizer of one parameter: its name, its arguments, some of its steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from library.lr_schedulers import LR_SCHEDULERS, create_lr_scheduler, unknown_name
from library.optimizers import CreatedOptimizer
from library.options.errors import UserError
from library.options.optimizer import OptimizerOptions
from library.preflight.optimizer import trial_optimizer
from library.preflight.subject import Subject


def problems(subject: Subject) -> Iterator[str]:
    """What the schedule says about the options; the number of steps is `--max_train_steps`."""
    options: OptimizerOptions = subject.options.optimizer
    name = options.lr_scheduler
    if not options.lr_scheduler_type and name not in LR_SCHEDULERS and not name.startswith("adafactor"):
        yield unknown_name(name)  # without an optimizer, whose first instance costs torch seconds of imports
        return
    total = max(1, subject.options.training.max_train_steps or 1)
    try:
        schedule = create_lr_scheduler(options, _optimizer(options), num_training_steps=total)
        for factor in schedule.lr_lambdas[:1] if isinstance(schedule, LambdaLR) else []:
            for step in (0, total // 2, total):
                factor(step)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        yield f"--lr_scheduler_args: --lr_scheduler {options.lr_scheduler} cannot work with these values: {error}."


def _optimizer(options: OptimizerOptions) -> CreatedOptimizer:
    """The run's, or a stand-in where that one cannot be made (which is another check's subject)."""
    try:
        return trial_optimizer(options)
    except UserError:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1, 1))], lr=options.learning_rate)
        return CreatedOptimizer(optimizer, "", "", False, options.learning_rate, options.lr_scheduler)
