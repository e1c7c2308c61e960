"""Reading TOML that people write by hand: what is wrong with which line, and how to write it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: what a line looks like -> what to write instead
_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r'"[^"]*\\'),
        "in double quotes a backslash has a meaning of its own; write the path with / or in single quotes, "
        r"'C:\Users\me'",
    ),
    (re.compile(r"=\s*\[?\s*(True|False)\b"), "write true and false in small letters"),
    (re.compile(r"=\s*(None|null|none|nil)\b"), "TOML has no empty value; leave the line out"),
    (re.compile(r"^\s*[\w.-]+\s*:"), "write = between a key and its value, not a colon"),
    (re.compile(r"=\s*$|=\s*#"), "the value is missing; leave the line out if there is none"),
    (re.compile(r"""=\s*[^"'\[{\d+\-\s][^"']*$"""), "a text needs quotes around it"),
    (re.compile(r"""=\s*(['"])(?:(?!\1).)*$"""), "the quote at the end is missing"),
)
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_LOST_BACKSLASH = re.compile(r"^[A-Za-z]:[^\n]*[\x00-\x1f]|^[A-Za-z]:[\x00-\x1f]")


def decoded(content: bytes) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark. Raises ValueError that names the line."""
    encoding = _ENCODINGS.get(content[:2]) or ("UTF-16" if b"\0" in content[:200] else None)
    if encoding:
        raise ValueError(f"the file is {encoding} text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        text = content.splitlines()[line - 1].decode("cp1252", "replace").strip()
        raise ValueError(
            f"line {line}: the file is not UTF-8 text but has another encoding, perhaps Windows-1252 "
            f"({_shown(text)}); save it as UTF-8"
        ) from error


def parsed(text: str) -> dict[str, Any]:
    """The content of a TOML text. Raises ValueError with the line, what is wrong with it and how to write it."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(_explained(str(error), text)) from error
    for key, value in _texts(content):
        if _LOST_BACKSLASH.search(value):
            raise ValueError(f"{key} = {value!r}: {_ADVICE[0][1]}")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file in UTF-8. Raises OSError, or ValueError as `decoded` and `parsed` do."""
    return parsed(decoded(path.read_bytes()))


def _explained(message: str, text: str) -> str:
    """A parser's message with the line that it means and advice for it."""
    lines = text.splitlines() or [""]
    place = re.search(r"\(at line (\d+)", message)
    number = min(int(place[1]) if place else len(lines), len(lines))
    number = next((n for n in range(number, 0, -1) if lines[n - 1].strip()), number)
    line = lines[number - 1].strip()
    reason = re.sub(r" \(at (line \d+, column \d+|end of document)\)", "", message)
    advice = next((words for pattern, words in _ADVICE if pattern.search(line)), None)
    return f"line {number}: {_shown(line)}: {reason}" + (f": {advice}" if advice else "")


def _shown(line: str) -> str:
    return line if len(line) <= 80 else line[:77] + "..."


def _texts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, str):
                yield key, item
            elif isinstance(item, Mapping):
                yield from _texts(item)
