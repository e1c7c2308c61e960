"""A training script called from another program: `NetworkTrainer().train(args)` and `train(args)` are the script."""

from __future__ import annotations

import argparse
from typing import ClassVar

from library import launch
from library.options.declare import specs_of
from library.options.errors import UserError

SUPPORTED = frozenset({"train"})


class Trainer:
    """What a training script offers as a class. `train` does what its command line does, with all of its checks.

    The inner steps of a run are no methods of this class: a subclass that overrides one gets an error, because nothing
    would call it. A model or a way of training of one's own is a family or a method (docs/architecture.md).
    """

    script: ClassVar[launch.Script]

    def train(self, args: argparse.Namespace) -> None:
        """Train as `args` say, which the script's parser made; ends the process as the script would (status 2, 130)."""
        with launch.exit_status(self.script.name):
            refuse_overridden(type(self))
            launch.run(self.script, launch.from_namespace(self.script, args))


def refuse_overridden(trainer: type[Trainer]) -> None:
    """Raises UserError if a subclass has public methods that no run would call."""
    own = {
        name: cls.__name__
        for cls in reversed(trainer.__mro__)
        if issubclass(cls, Trainer) and "script" not in vars(cls) and cls is not Trainer
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("_") and name not in SUPPORTED
    }
    if own:
        names = ", ".join(f"{cls}.{name}" for name, cls in sorted(own.items()))
        raise UserError(
            f"{names}: inner steps of training cannot be overridden here, nothing would call them. Use a method or "
            "family of your own (docs/architecture.md); a helper of yours gets a name that begins with _."
        )


def train(script: launch.Script, args: argparse.Namespace) -> None:
    """The same for scripts that offer a function `train(args)`."""
    with launch.exit_status(script.name):
        launch.run(script, launch.from_namespace(script, args))


def add_arguments(parser: argparse.ArgumentParser, groups: tuple[type, ...], exclude: frozenset[str]) -> None:
    """Add the options of these groups to a parser of another program; options that it has already stay as they are."""
    known = exclude | {action.dest for action in parser._actions}
    launch.add_options(parser, [spec for group in groups for spec in specs_of(group) if spec.name not in known])
