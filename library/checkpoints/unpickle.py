"""Reads `.ckpt`/`.pt`/`.bin` pickles without ever executing anything that a file asks for."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.file_kind import FileKind, file_kind

logger = logging.getLogger(__name__)

#: every class and function that a pickle may name, beside torch's dtypes and storages
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
    }
)


class DiscardedObject:
    """Stands for an object of a class that is not allowed: it accepts all that pickle does to it and keeps nothing."""

    origin = "?"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> DiscardedObject:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> DiscardedObject:
        return self

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...

    def add(self, _item: Any) -> None: ...


@dataclass(frozen=True)
class PickledCheckpoint:
    """The useful content of a pickled checkpoint: its tensors and the counters beside them."""

    tensors: dict[str, Tensor]
    epoch: int | None = None
    global_step: int | None = None
    discarded: list[str] = field(default_factory=list)  # class names outside the state dict that were left out


class _Function:
    """An allowed function that a pickle may call but not change (BUILD would set its attributes)."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, _state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How numpy's numbers store their bytes; no other encoding is looked up."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _restricted_pickle_module(discarded: set[str]) -> Any:
    """An object that torch accepts as `pickle_module`: every global that is not allowed becomes inert.

    It is built on Python's own unpickler, because the one in C reserves memory for whatever index a file names.
    """

    class RestrictedUnpickler(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if (module, name) == ("_codecs", "encode"):
                return _Function(_encode)
            if (module, name) in ALLOWED:
                found = super().find_class(module, name)
                return found if isinstance(found, type) else _Function(found)
            discarded.add(f"{module}.{name}")
            return type("DiscardedObject", (DiscardedObject,), {"origin": f"{module}.{name}"})

    def load(file: Any, **options: Any) -> Any:
        return RestrictedUnpickler(file, **options).load()

    return SimpleNamespace(Unpickler=RestrictedUnpickler, load=load, __name__="restricted_pickle")


def _read(path: Path) -> tuple[Any, set[str]]:
    """The content and the names of what was discarded. Files are opened here: torch looks at a path's ending."""
    discarded: set[str] = set()
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True), discarded
    except (EOFError, RuntimeError, OSError, MemoryError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {_first_line(error)}. It may be incomplete."
        ) from error
    except Exception:
        logger.debug("%s holds more than tensors; reading it with everything else discarded", path)
    try:
        module = _restricted_pickle_module(discarded)
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module), discarded
    except Exception as error:
        found = f"It asks for {', '.join(sorted(discarded)[:10])}. " if discarded else ""
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}: {_first_line(error)}). {found}"
            "Only tensors and plain containers are read from pickles; convert the file to .safetensors."
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200].rstrip(".")


def load_pickle(path: str | Path, *, entry: str = "state_dict") -> PickledCheckpoint:
    """The tensors of a pickle: of its `entry` if there is one, else of the bare dictionary.

    Objects of other programs beside that entry (callbacks, optimizer states) are discarded with one warning.
    Raises ValueError, naming the class, if the entry itself holds anything but tensors and numbers.
    """
    path = Path(path)
    if file_kind(path) is not FileKind.PICKLE:
        raise ValueError(f"{path} is a safetensors file, not a pickle.")
    content, discarded = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {_origin(content)}, not a dictionary of tensors.")
    state = content.get(entry, content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: its {entry!r} is a {_origin(state)}, not a dictionary of tensors.")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        foreign = next((part for part in (value, key) if _is_foreign(part)), None)
        if foreign is not None:
            raise ValueError(f"{path}: {key} is a {_origin(foreign)}; only tensors and plain containers are allowed.")
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
    if discarded:
        logger.warning("%s: left out objects of %s", path, ", ".join(sorted(discarded)))
    counters = content if state is not content else {}
    return PickledCheckpoint(
        tensors, _integer(counters.get("epoch")), _integer(counters.get("global_step")), sorted(discarded)
    )


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_foreign(value: Any) -> bool:
    """Whether a value stands for an object, a class or a function that was discarded."""
    return isinstance(value, DiscardedObject) or (isinstance(value, type) and issubclass(value, DiscardedObject))


def _origin(value: Any) -> str:
    return str(value.origin) if _is_foreign(value) else type(value).__name__
