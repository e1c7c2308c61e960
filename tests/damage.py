"""Damage to model files of every sort, drawn from a seed: bytes, lengths, the header's structure, pickles."""

from __future__ import annotations

import json
import random
from typing import Any

JSON_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**60, 2**63, -(2**60), 10**30, 0.5, 1e300, "", "F32", "x", [], [0], {},
    [[]], {"a": 1},
    ["a"], [None], [-1, 4], [2**60, 2**60], [0, 2**62, 2**62],
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U16", "U64", "BOOL", "F8_E4M3", "F4", "C64", "f32")


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, body: bytes) -> bytes:
    """A file with this header, whatever it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# --- of bytes --------------------------------------------------------------------------------------------------
def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((draw.randrange(16), draw.randrange(4096), draw.randrange(len(data)), len(data) - 1))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    reach = draw.choice((16, 600, min(len(data), 40_000)))
    for _ in range(draw.choice((1, 1, 2, 5, 50))):
        changed[draw.randrange(min(reach, len(data)))] = draw.choice(
            (draw.randrange(256), ord(draw.choice('{}[]":,0-9')))
        )
    return bytes(changed)


def cut_or_doubled(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(min(len(data), 5000))
    end = begin + draw.randrange(1, 300)
    return data[:begin] + (data[end:] if draw.random() < 0.5 else data[begin:end] + data[begin:])


def other_length(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    choices = (0, 1, length - 1, length + 1, length * 2, len(data) - 8, len(data), 2**31, 2**60, 2**64 - 1)
    return draw.choice((*choices, draw.randrange(2**64), draw.randrange(len(data)))).to_bytes(8, "little") + data[8:]


# --- of the header ---------------------------------------------------------------------------------------------
def other_header(data: bytes, draw: random.Random) -> bytes:
    header, body = split(data)
    for _ in range(draw.choice((1, 1, 1, 3))):
        names = [name for name in header if name != "__metadata__"]
        name = draw.choice(names)
        draw.choice(HEADER_CHANGES)(header, name, draw)
    return join(header, body)


def _field(header: dict[str, Any], name: str, draw: random.Random) -> None:
    if isinstance(header[name], dict):
        header[name][draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice(JSON_VALUES)


def _missing_field(header: dict[str, Any], name: str, draw: random.Random) -> None:
    if isinstance(header[name], dict):
        header[name].pop(draw.choice(("dtype", "shape", "data_offsets")), None)


def _entry(header: dict[str, Any], name: str, draw: random.Random) -> None:
    header[name] = draw.choice(JSON_VALUES)


def _dtype(header: dict[str, Any], name: str, draw: random.Random) -> None:
    if isinstance(header[name], dict):
        header[name]["dtype"] = draw.choice(DTYPES)


def _shape(header: dict[str, Any], name: str, draw: random.Random) -> None:
    """Another shape, often of the same size."""
    entry = header[name]
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return
    shape = entry["shape"]
    flat = 1
    for side in shape:
        flat *= side if isinstance(side, int) else 1
    entry["shape"] = draw.choice((
        shape[::-1], [flat], [1, *shape], [*shape, 1], [flat, 1, 1, 1], [1] * 70, [1] * 5 + [flat], [*shape, 2**60],
        [side * 2 if isinstance(side, int) else side for side in shape], [-1, *shape], shape[:-1], [0, *shape],
    ))  # fmt: skip


def _same_bytes(header: dict[str, Any], name: str, draw: random.Random) -> None:
    """A consistent entry of another dtype or without elements: nothing in the header contradicts it."""
    entry = header[name]
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("data_offsets"), list)
        or len(entry["data_offsets"]) != 2
    ):
        return
    begin, end = entry["data_offsets"]
    if not (isinstance(begin, int) and isinstance(end, int)):
        return
    dtype, size = draw.choice((("U8", 1), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("U16", 2), ("BF16", 2), ("F4", 1)))
    header[name] = {"dtype": dtype, "shape": [(end - begin) // size], "data_offsets": [begin, end]}


def _offsets(header: dict[str, Any], name: str, draw: random.Random) -> None:
    entry = header[name]
    if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
        begin, end = entry["data_offsets"]
        if isinstance(begin, int) and isinstance(end, int):
            move = draw.choice((1, 4, -4, 1000, 2**40, -(2**40)))
            entry["data_offsets"] = draw.choice(
                ([end, begin], [begin + move, end + move], [begin, end + move], [begin - move, end], [0, end - begin])
            )


def _renamed(header: dict[str, Any], name: str, draw: random.Random) -> None:
    digits = [index for index, letter in enumerate(name) if letter.isdigit()]
    new = draw.choice(("", "x", "a.b.c.d.e", "\u0000", "é\n", name + ".", name.replace(".", ""), name[1:], "\ud800"))
    if digits and draw.random() < 0.7:
        place = draw.choice(digits)
        new = (
            name[:place]
            + draw.choice(("9", "99", "4000000000", "9" * 30, "-1", "٣", "x", "0" * 20))
            + name[place + 1 :]
        )
    header[new] = header.pop(name)


def _removed(header: dict[str, Any], name: str, draw: random.Random) -> None:
    """Gone with its bytes: what stays is a whole file without this tensor."""
    del header[name]
    if not len(header):
        header["x"] = None


def _emptied(header: dict[str, Any], name: str, draw: random.Random) -> None:
    """A tensor without bytes that claims any width."""
    entry = header[name]
    if isinstance(entry, dict):
        header["filler"] = dict(entry)
        begin = entry.get("data_offsets", [0])
        begin = begin[0] if isinstance(begin, list) and begin else 0
        header[name] = {
            "dtype": "F32", "shape": draw.choice(([0], [0, 4], [2**20, 0], [0, 2**40], [2**40, 0, 3, 3], [])),
            "data_offsets": [begin, begin],
        }  # fmt: skip


def _metadata(header: dict[str, Any], name: str, draw: random.Random) -> None:
    texts = ({"lora_adapter_metadata": text} for text in ("{", "[1]", '{"a": 1}'))
    header["__metadata__"] = draw.choice((*JSON_VALUES, {"a": None}, {"modelspec.prediction_type": 5}, *texts))


HEADER_CHANGES = (
    _field, _missing_field, _entry, _dtype, _shape, _shape, _same_bytes, _offsets, _renamed, _renamed, _removed,
    _emptied, _metadata,
)  # fmt: skip


def other_text(data: bytes, draw: random.Random) -> bytes:
    """A header that is no table, or no JSON, or JSON that is hard to take."""
    header, body = split(data)
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    texts = (
        "[]", "null", "3", '"x"', "", "{", "{}", "[" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "NaN",
        "{" + "9" * 6000 + "}", f'{{"a": {"9" * 6000}}}', text[:-1], text + "}",
        text[:-1] + f',{json.dumps(name)}:{json.dumps(header[name])}}}',
        text.replace('"dtype"', '"Dtype"'), text.replace(":", ";", 1), text.replace("]", ""), " " * 40 + text,
        text.encode("utf-16").decode("latin1"), json.dumps([header]), text[:-1] + ',"q":Infinity}',
    )  # fmt: skip
    return join(draw.choice(texts).encode("utf-8", "surrogatepass"), body)


SAFETENSORS = (
    truncated, flipped, cut_or_doubled, other_length, other_header, other_header, other_header, other_header,
    other_text,
)  # fmt: skip
PICKLES = (truncated, flipped, flipped, flipped, cut_or_doubled)


def damaged(data: bytes, draw: random.Random, *, is_pickle: bool) -> bytes:
    """One damage, seldom two."""
    kinds = PICKLES if is_pickle else SAFETENSORS
    changed = draw.choice(kinds)(data, draw)
    if draw.random() < 0.1:
        changed = flipped(changed, draw) if changed else changed
    return changed
