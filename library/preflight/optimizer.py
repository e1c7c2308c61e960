"""The optimizer, made on one parameter: its name, its package, its arguments and their values."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
from torch import nn

from library.optimizers import CreatedOptimizer, argument_problems, create_optimizer
from library.options.optimizer import OptimizerOptions
from library.preflight.subject import Subject


def problems(subject: Subject) -> Iterator[str]:
    """What the optimizer's class says about the options."""
    options: OptimizerOptions = subject.options.optimizer
    unknown = argument_problems(options)
    if unknown:
        yield from unknown
        return
    trial_optimizer(options)


def trial_optimizer(options: OptimizerOptions) -> CreatedOptimizer:
    """The optimizer of these options over one number. Raises UserError as `create_optimizer` does."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    with contextlib.redirect_stdout(io.StringIO()):  # some optimizers greet
        return create_optimizer(options, [{"params": [parameter]}], is_silent=True)
