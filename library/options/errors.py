"""Errors that end a script with one line: mistakes of its user (exit status 2), what fails while it runs (1)."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """One or more mistakes in what the user gave; `problems` holds one sentence each.

    `hints` are warnings that are shown with them, because they may explain them.
    """

    def __init__(self, problems: str | Sequence[str], hints: Sequence[str] = ()) -> None:
        self.hints = tuple(hints)
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(RuntimeError):
    """What ends a running script although its user made no mistake, in one line; exit status 1."""
