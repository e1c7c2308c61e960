"""Reads `.ckpt`/`.pt`/`.bin` pickles without ever executing anything that a file asks for."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ALLOWED: frozenset[tuple[str, str]] = frozenset(
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


def _restricted_pickle_module(discarded: set[str]) -> Any:
    """An object that torch accepts as `pickle_module`: every global that is not allowed becomes inert."""

    class RestrictedUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if (module, name) in _ALLOWED:
                return super().find_class(module, name)
            discarded.add(f"{module}.{name}")
            return type(name, (DiscardedObject,), {"origin": f"{module}.{name}"})

    def load(file: Any, **options: Any) -> Any:
        return RestrictedUnpickler(file, **options).load()

    return SimpleNamespace(Unpickler=RestrictedUnpickler, load=load, __name__="restricted_pickle")


def _read(path: Path) -> tuple[Any, set[str]]:
    discarded: set[str] = set()
    try:
        return torch.load(path, map_location="cpu", weights_only=True), discarded
    except pickle.UnpicklingError:
        logger.debug("%s holds more than tensors; reading it with everything else discarded", path)
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}. It may be incomplete.") from error
    try:
        module = _restricted_pickle_module(discarded)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module), discarded
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}: {error}). "
            "Only tensors and plain containers are read from pickles; convert the file to .safetensors."
        ) from error


def load_pickle(path: str | Path, *, entry: str = "state_dict") -> PickledCheckpoint:
    """The tensors of a pickle: of its `entry` if there is one, else of the bare dictionary.

    Objects of other programs beside that entry (callbacks, optimizer states) are discarded with one warning.
    Raises ValueError, naming the class, if the entry itself holds anything but tensors and numbers.
    """
    path = Path(path)
    content, discarded = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {_origin(content)}, not a dictionary of tensors.")
    state = content.get(entry, content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: its {entry!r} is a {_origin(state)}, not a dictionary of tensors.")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, DiscardedObject) or isinstance(key, DiscardedObject):
            raise ValueError(f"{path}: {key} is a {_origin(value)}; only tensors and plain containers are allowed.")
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


def _origin(value: Any) -> str:
    return value.origin if isinstance(value, DiscardedObject) else type(value).__name__
