"""How one command-line option is declared: a dataclass field that carries its type, default, choices and help."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def whole_or_fraction(text: str) -> int | float:
    """A number of steps (`100` -> int), or a fraction of all steps (`0.1` or `10%` -> float). Raises ValueError."""
    text = text.strip()
    number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if text.endswith("%") and 0 <= number <= 1 or 0 < number < 1:
        return number
    if text.endswith("%") or number < 0 or not number.is_integer():
        raise ValueError(f"{text} is neither a whole number of steps nor a fraction of all steps")
    return int(number)


def whole_number(text: str) -> int:
    """`8`, `8.0` and `1e3` -> int. Raises ValueError for everything else."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


READERS: Mapping[str, Callable[[str], Any]] = types.MappingProxyType(
    {"str": str, "int": whole_number, "float": float, "int_or_float": whole_or_fraction, "Path": Path}
)
WANTED: Mapping[str, str] = types.MappingProxyType(
    {
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "int_or_float": "a number of steps, a fraction below 1 or a percentage",
        "Path": "a path",
        "flag": "true or false",
    }
)


NOTHING = ("none", "null")  # how programs write that an option is not given


@dataclass(frozen=True)
class OptionSpec:
    """Everything about one option. `name` is the field name, the argparse destination and the key in TOML files."""

    name: str
    type_name: str  # a key of WANTED
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    nargs: str | int | None = None
    flags: tuple[str, ...] = ()
    convert: Callable[[Any], Any] | None = None  # text, number or list of a TOML file -> the option's final value
    required: bool = False  # of tools only; scripts check what is missing together with everything else
    off: tuple[Any, ...] = ()  # values beyond type and choices that mean the same as not giving the option

    @property
    def is_flag(self) -> bool:
        return self.type_name == "flag"

    @property
    def is_positional(self) -> bool:
        return not self.flags

    def means_nothing(self, value: Any) -> bool:
        """Whether a value, of a TOML file or of the command line, says the same as not giving the option at all.

        Programs that write options fill in what is empty or off in many ways: "", [], false, "None".
        """
        if isinstance(value, str):
            word = value.strip().lower()
            if not word or word in {str(item).lower() for item in self.off}:
                return True
            is_text = self.type_name in ("str", "Path") and self.choices is None
            return word in NOTHING and not is_text and not (self.choices and word in self.choices)
        if isinstance(value, list | tuple):
            return self.nargs is not None and all(isinstance(item, str) and not item.strip() for item in value)
        return (value is False and not self.is_flag) or (not isinstance(value, bool) and value in self.off)

    def read(self, text: str) -> Any:
        """One word of the command line -> value (before `convert`). Raises ValueError that says what is wanted."""
        if self.choices is not None and None in self.choices and text.lower() == "none":
            return None
        try:
            return READERS[self.type_name](text)
        except ValueError as error:
            raise ValueError(f"{text!r} is not {WANTED[self.type_name]}") from error

    def read_value(self, value: Any) -> Any:
        """A value of a TOML file -> the same value that the command line would give. Raises ValueError."""
        if self.convert is not None and self.nargs is None:
            self.convert(value)
            return value
        if self.nargs is not None:
            return [self._read_item(item) for item in self._items(value)]
        return self._read_item(value)

    def check_choice(self, value: Any) -> None:
        """Raises ValueError that lists the choices if `value` (or one of its items) is none of them."""
        for item in value if self.nargs is not None and value is not None else (value,):
            if self.choices is not None and item is not None and item not in self.choices:
                allowed = ", ".join("none" if choice is None else str(choice) for choice in self.choices)
                raise ValueError(f"{item!r} is not one of: {allowed}")

    def final(self, value: Any) -> Any:
        """The value that the typed options hold: converted, and lists as tuples."""
        if value is None:
            return None
        if self.convert is not None:
            return self.convert(value)
        return tuple(value) if self.nargs is not None else value

    def _items(self, value: Any) -> list[Any]:
        """The values of an option that takes several; numbers may stand in one text, with blanks or commas."""
        if isinstance(value, str) and self.type_name not in ("str", "Path"):
            return value.replace(",", " ").split()
        items = value if isinstance(value, list | tuple) else [value]
        return [item for item in items if not (isinstance(item, str) and not item.strip())]

    def _read_item(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise ValueError(f"{value!r} is not {WANTED[self.type_name]}")
        if self.is_flag:
            return _read_bool(value)
        if isinstance(value, bool):
            if self.type_name != "str":
                raise ValueError(f"{str(value).lower()} is not {WANTED[self.type_name]}")
            return str(value).lower()
        if isinstance(value, float) and self.type_name == "int" and value.is_integer():
            return int(value)
        return self.read(value if isinstance(value, str) else str(value))


def _read_bool(value: Any) -> bool:
    word = str(value).strip().lower()
    if word in ("true", "1", "1.0"):
        return True
    if word in ("false", "0", "0.0"):
        return False
    raise ValueError(f"{value!r} is not true or false")


def option(
    help: str,
    default: Any = None,
    *,
    type: str = "str",  # noqa: A002 - argparse's word
    choices: tuple[Any, ...] | None = None,
    nargs: str | int | None = None,
    convert: Callable[[Any], Any] | None = None,
    required: bool = False,
    off: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field for an option that takes a value; `type` is a key of READERS."""
    details = {
        "type_name": type, "help": help, "choices": choices, "nargs": nargs, "convert": convert, "required": required,
        "off": off,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata={"option": details})


def positional(help: str, *, type: str = "str") -> Any:  # noqa: A002 - argparse's word
    """A dataclass field for a word that a tool's command line must have, without `--`, in the order of the fields."""
    return dataclasses.field(default="", metadata={"option": {"type_name": type, "help": help, "flags": ()}})


def flag(help: str) -> Any:
    """A dataclass field for an option without a value; false unless given."""
    return dataclasses.field(default=False, metadata={"option": {"type_name": "flag", "help": help}})


@functools.cache
def specs_of(group: type) -> tuple[OptionSpec, ...]:
    """The options that a group class declares, in order."""
    return tuple(
        OptionSpec(**{
            "name": field.name, "default": field.default, "flags": (f"--{field.name}",), **field.metadata["option"],
        })
        for field in dataclasses.fields(group)
        if "option" in field.metadata
    )  # fmt: skip
