"""Tensors whose names or shapes contradict each other: what their sizes are read from says so, with the file's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: what comes out of arithmetic with shapes that no model has
_MISFITS = (KeyError, IndexError, TypeError, ZeroDivisionError, AssertionError, StopIteration, OverflowError)


@contextmanager
def naming_file(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Around the reading of a model's sizes from shapes: every failure becomes a ValueError that names the file."""
    source = str(getattr(tensors, "source", "the given tensors"))
    try:
        yield
    except ValueError as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except _MISFITS as error:
        raise ValueError(
            f"{source} is damaged or of an unknown kind: the names and shapes of its tensors do not fit each other "
            f"({type(error).__name__}: {error})."
        ) from error
