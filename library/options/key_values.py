"""The one reader of `key=value` arguments: of optimizers, schedules and networks, for training and for drawing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Any

from library.options.errors import UserError

WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
_KEY = re.compile(r"\s+([A-Za-z_]\w*)\s*=")
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


def read_texts(items: Iterable[str] | None, option: str) -> dict[str, str]:
    """`key=value` items as a dictionary of texts, each cut at its first `=`.

    One item may hold several pairs (`"a=1 b=2"`), with quotes around them or around values, and a comma after each.
    Raises UserError that names `option` and the item.
    """
    arguments: dict[str, str] = {}
    for key, text, item in _pairs(items, option):
        if key in arguments and arguments[key] != text:
            raise UserError(f"{option}: {key} is given twice, as {arguments[key]} and {text} ({item!r}).")
        arguments[key] = text
    return {key: _unquoted(text) for key, text in arguments.items()}


def read_literals(items: Iterable[str] | None, option: str) -> dict[str, Any]:
    """The same with values that are Python literals, or true, false, none in any case.

    `betas=0.9,0.99` gives a tuple. Raises UserError that names `option` and the item.
    """
    arguments: dict[str, Any] = {}
    for key, text, item in _pairs(items, option):
        if not key.isidentifier():
            raise UserError(_no_pair(option, item))
        value = _literal(text, item, option)
        if key in arguments and arguments[key] != value:
            raise UserError(f"{option}: {key} is given twice, as {arguments[key]} and {text} ({item!r}).")
        arguments[key] = value
    return arguments


def _literal(text: str, item: str, option: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UserError(
            f"{option}: the value in {item!r} is not a number, true, false, none, a tuple such as (0.9,0.99) "
            "or a quoted text such as 'text'."
        ) from None


def _pairs(items: Iterable[str] | None, option: str) -> Iterator[tuple[str, str, str]]:
    """(key, value, the item that holds them) of every pair, in order."""
    for item in items or ():
        for piece in _pieces(str(item), option):
            key, sign, text = piece.partition("=")
            if not sign or not re.fullmatch(r"[^\s'\"]+", key.strip()):
                raise UserError(_no_pair(option, str(item)))
            yield key.strip(), _without_comma(text.strip()), str(item)


def _no_pair(option: str, item: str) -> str:
    return f"{option}: {item!r} is not of the form key=value."


def _pieces(item: str, option: str) -> list[str]:
    """The pairs that one item holds, without quotes around whole pairs."""
    rest = item.strip()
    if not rest or rest[0] not in _QUOTES:
        return _split_at_keys(rest)
    pieces: list[str] = []
    while rest:
        end = rest.find(rest[0], 1)
        if rest[0] not in _QUOTES or end < 0:
            raise UserError(_no_pair(option, item))
        pieces += _split_at_keys(rest[1:end].strip())
        rest = rest[end + 1 :].lstrip(" \t\n,")
    return pieces


def _split_at_keys(text: str) -> list[str]:
    """Cut before every ` key=` that stands outside of quotes and brackets.

    A comma before it belongs to the value if the value is itself a list of pairs (`dims=a=4, b=8`).
    """
    starts, depth, quote = [0], 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter.isspace() and depth == 0 and _KEY.match(text, place):
            before = text[starts[-1] : place].rstrip()
            is_inner = before.endswith("=") or (before.endswith(",") and before.count("=") > 1)
            if "=" in before and not is_inner:
                starts.append(place)
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _without_comma(text: str) -> str:
    """A comma at the end separates pairs; `(1,)` is a value."""
    return text[:-1].rstrip() if text.endswith(",") else text


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] in _QUOTES and text[0] == text[-1] and text[0] not in text[1:-1]
    return text[1:-1] if is_quoted else text
