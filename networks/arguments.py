"""Typed access to the key=value arguments of a network (`--network_args`), with errors that name the argument."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from networks.known import modules_with_argument

logger = logging.getLogger(__name__)

_TRUE = {"true", "1", "yes"}
_FALSE = {"false", "0", "no"}


class NetworkArguments:
    """Reads values that are text (command line) or numbers (other tools) and remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any], network: str) -> None:
        self.values = dict(values)
        self.network = network
        self._known = {"dropout"}  # trainers pass it on top of neuron_dropout, for other networks

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number, or `default` if the argument is absent."""
        return self._read(key, default, int, "a whole number")

    def number(self, key: str, default: float | None = None) -> float | None:
        """A finite number, or `default` if the argument is absent."""
        return self._read(key, default, _finite, "a number")

    def probability(self, key: str) -> float | None:
        """The probability of a dropout, in [0, 1), or None if the argument is absent."""
        value = checked_probability(self._read(key, None, _finite, "a number"), f"network argument {key}")
        if value == 1.0:
            raise ValueError(
                f"network argument {key}=1 drops everything at every step, so nothing would be trained: it must be "
                "below 1."
            )
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        """true/1/yes or false/0/no in any case, or `default` if the argument is absent."""
        return bool(self._read(key, default, _boolean, "true or false"))

    def text(self, key: str) -> str | None:
        """The value as text, or None if the argument is absent."""
        return self._read(key, None, str, "text")

    def integers(self, key: str) -> list[int] | None:
        """Comma-separated whole numbers."""
        return self._read(key, None, _list_of(int), "whole numbers separated by commas")

    def numbers(self, key: str) -> list[float] | None:
        """Comma-separated numbers."""
        return self._read(key, None, _list_of(_finite), "numbers separated by commas")

    def select(self, *keys: str) -> dict[str, Any]:
        """The given arguments that are present, uninterpreted."""
        self._known.update(keys)
        return {key: self.values[key] for key in keys if self.values.get(key) is not None}

    @property
    def known(self) -> frozenset[str]:
        """What readers have asked for so far."""
        return frozenset(self._known - {"dropout"})

    def ignore(self, *keys: str, reason: str) -> None:
        """One warning about the arguments among `keys` that are given and have no effect."""
        given = self.select(*keys)
        if given:
            logger.warning("%s: no effect of the network arguments %s: %s", self.network, ", ".join(given), reason)

    def refuse_unknown(self) -> None:
        """Raises ValueError if there are arguments which no reader asked for; a sentence for each."""
        unknown = sorted(self.values.keys() - self._known)
        if unknown:
            raise ValueError(" ".join(self._unknown(name) for name in unknown))
        if isinstance(self.values.get("dropout"), str):
            logger.warning("%s ignores the network argument dropout; use --network_dropout", self.network)

    def _unknown(self, name: str) -> str:
        others = [module for module in modules_with_argument(name) if module != self.network]
        if others:
            return f"network argument {name}: {self.network} does not have it; it is for {' and '.join(others)}."
        close = difflib.get_close_matches(name, self.known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"network argument {name} is unknown to {self.network}; {hint}Known: {', '.join(sorted(self.known))}."

    def _read(self, key: str, default: Any, convert: Callable[[Any], Any], expected: str) -> Any:
        self._known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        try:
            return convert(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"network argument {key}={value}: expected {expected}.") from error


def argument_problems(read: Callable[[NetworkArguments], object], values: Mapping[str, Any], network: str) -> list[str]:
    """What is wrong with the arguments of a network, one sentence each; `read` reads them and needs no models."""
    problems = [
        text for key, value in values.items() if (text := _problem(read, NetworkArguments({key: value}, network)))
    ]
    together = None if problems else _problem(read, NetworkArguments(values, network))
    texts = [*problems, *([together] if together else [])]
    return [f"--network_args: {text.removeprefix('network argument ')}" for text in texts]


def _problem(read: Callable[[NetworkArguments], object], arguments: NetworkArguments) -> str | None:
    try:
        read(arguments)
    except ValueError as error:
        return str(error)
    return None


def checked_probability(value: float | None, origin: str) -> float | None:
    """`value` if it is None or in [0, 1]; otherwise ValueError."""
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"{origin} is {value}; a dropout probability lies between 0 and 1.")
    return value


def checked_rank(rank: int, origin: str) -> int:
    """`rank` if it is not negative; otherwise ValueError."""
    if rank < 0:
        raise ValueError(f"{origin} is {rank}; a rank is a positive number, or 0 for no modules.")
    return rank


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError(value)
    return text in _TRUE


def _list_of(convert: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def read(value: Any) -> list[Any]:
        items = value.split(",") if isinstance(value, str) else value
        return [convert(item) for item in items]

    return read
