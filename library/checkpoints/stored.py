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
    """`fill_module`, which inside `remembering` also remembers what a cast to `dtype` takes away.

    Of safetensors files only the place is remembered; tensors of a pickle stay in memory until `forget_stored`.
    """
    fill_module(module, tensors, component=component, dtype=dtype, device=device)
    kinds = {kind for kind in dtypes_of(tensors).values() if kind.is_floating_point}
    if not _is_remembering.get() or dtype is None or all(torch.promote_types(kind, dtype) == dtype for kind in kinds):
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
    """What to write for a module: the tensors it was filled with unless they were forgotten, else its own."""
    stored: _Stored | None = getattr(module, _ATTRIBUTE, None)
    if stored is None:
        return module.state_dict()
    changed = [path for path, identity in stored.files.items() if not path.is_file() or _identity(path) != identity]
    if changed:
        logger.warning("%s has changed since it was read: parts that are not trained are rounded.", changed[0])
        forget_stored(module)
        return module.state_dict()
    return stored.tensors


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
