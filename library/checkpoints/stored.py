"""What a module was filled with, bit for bit: parts that nobody trains are written as they were read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.tensors import dtypes_of, fill_module, is_safetensors, shard_paths

logger = logging.getLogger(__name__)

_ATTRIBUTE = "stored_tensors"
_is_remembering = ContextVar("is_remembering", default=False)


@contextmanager
def remembering() -> Iterator[None]:
    """Modules that are loaded inside will be written as they were read, unless `forget_stored` says otherwise."""
    token = _is_remembering.set(True)
    try:
        yield
    finally:
        _is_remembering.reset(token)


@dataclass(frozen=True)
class _Stored:
    """Tensors under the module's names, and the files they are read from (none: they are in memory)."""

    tensors: Mapping[str, Tensor]
    files: Mapping[Path, tuple[int, int]]


def fill_from_file(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    component: str,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> None:
    """`fill_module`, which inside `remembering` also remembers where the tensors come from.

    Of safetensors files only the place is remembered; tensors of a pickle stay in memory until `forget_stored`.
    """
    fill_module(module, tensors, component=component, dtype=dtype, device=device)
    if not _is_remembering.get():
        return
    source = Path(str(getattr(tensors, "source", "")))
    if source.is_file() and is_safetensors(shard_paths(source)[0]):
        stored = _Stored(tensors, {path: _identity(path) for path in shard_paths(source)})
    else:
        stored = _Stored({key: tensors[key] for key in tensors}, {})
    object.__setattr__(module, _ATTRIBUTE, stored)


def forget_stored(module: Any) -> None:
    """The module's own values count from now on: it is trained, or not going to be written."""
    if module is not None:
        vars(module).pop(_ATTRIBUTE, None)


def weights_of(module: nn.Module) -> Mapping[str, Tensor]:
    """What to write for a module: its own tensors, or those it was filled with where its dtype took something away."""
    stored: _Stored | None = getattr(module, _ATTRIBUTE, None)
    own = module.state_dict()
    if stored is None or _can_hold(own, stored.tensors):
        return own
    changed = [path for path, identity in stored.files.items() if not path.is_file() or _identity(path) != identity]
    if changed:
        logger.warning("%s has changed since it was read: parts that are not trained are rounded.", changed[0])
        forget_stored(module)
        return own
    return stored.tensors


def _can_hold(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether every floating tensor of a module has room for all values of the one it was filled with."""
    dtypes = dtypes_of(stored)
    return all(
        torch.promote_types(dtypes[key], tensor.dtype) == tensor.dtype
        for key, tensor in own.items()
        if tensor.is_floating_point()
    )


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
