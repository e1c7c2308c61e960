"""What a name that a script does not know may have meant: another script's option, or one that looks like it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from library.options.declare import OptionSpec, specs_of
from library.options.script_options import ScriptOptions

MOST_SCRIPTS = 4  # that one message names
OWN_ADVANTAGE = 0.1  # by so much the option of another script must be more like a name than the script's own


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def meaning(name: str, specs: Mapping[str, OptionSpec], script: str, *, dashes: str = "--") -> str | None:
    """A phrase about an unknown name: `an option of ...`, `did you mean ...?`, or None when nothing is like it.

    `specs` are the options of the script of that name; other scripts of its kind come first.
    """
    places = where(name, script)
    if places:
        return f"an option of {listed(places)}"
    own = nearest(name, specs)
    guess = nearest(name, sorted({option for options in _options().values() for option in options}))
    if own and (guess is None or _likeness(name, own) >= _likeness(name, guess) - OWN_ADVANTAGE):
        return f"did you mean {dashes}{own}?"
    return guess and f"did you mean {dashes}{guess}, an option of {listed(where(guess, script))}?"


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def where(name: str, script: str) -> list[str]:
    """The scripts that have an option of this name; of these only the ones of the same kind as `script`, if any."""
    found = [other for other, options in _options().items() if name in options and other != script]
    return [other for other in found if _kind(other) == _kind(script)] or found


def listed(scripts: Sequence[str]) -> str:
    """Names in words; what names of one kind have in common is said once: `sdxl_ and sd3_train.py`."""
    words = []
    for kind in dict.fromkeys(map(_kind, scripts)):
        same = [name for name in scripts if _kind(name) == kind]
        words += [*(name.removesuffix(kind) or kind for name in same[:-1]), same[-1]]
    if len(words) > MOST_SCRIPTS:
        words = [*words[: MOST_SCRIPTS - 1], f"{len(words) - MOST_SCRIPTS + 1} other scripts"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _kind(script: str) -> str:
    """`sdxl_train_network.py` -> `train_network.py`."""
    from library.options.family_scripts import PREFIXES

    name = PurePosixPath(script).name
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _options() -> dict[str, frozenset[str]]:
    """Script -> the names of its options."""
    from library.options.family_scripts import SCRIPTS

    return {name: frozenset(_names(row)) for name, row in SCRIPTS.items()}


def _names(row: Any) -> Iterable[str]:
    if isinstance(row, str):  # a tool declares its options beside its function
        module, _, attribute = row.partition(":")
        row = getattr(importlib.import_module(module), attribute)
    return row.specs() if isinstance(row, ScriptOptions) else (spec.name for spec in specs_of(row))
