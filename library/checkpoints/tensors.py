"""Tensor files: lazy reading, strict filling of modules, and writing that a kill at any moment cannot damage."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from library.checkpoints.extras import without_left_overs
from library.checkpoints.file_kind import holds_safetensors, is_named_safetensors, read_json_table
from library.checkpoints.finite import count_non_finite, notice_non_finite
from library.checkpoints.safetensors_header import Header, read_header
from library.checkpoints.unpickle import load_pickle

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Operation = Callable[[Tensor], Tensor]

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: stands for a dtype that is not known here: such a tensor has a name and a shape, but cannot be read
UNREADABLE = torch.bits8
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[A-Za-z]+)$")


#: by name, for files to be written; what a file that exists holds is `file_kind`'s question
is_safetensors = is_named_safetensors


# --- reading ---------------------------------------------------------------------------------------------------
class LazyTensors(Mapping[str, Tensor]):
    """Named tensors whose shapes are known without reading; `self[key]` reads one into memory of its own."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    source: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def is_readable(self, key: str) -> bool:
        """Whether the tensor's dtype is known here."""
        return self.dtypes[key] != UNREADABLE

    def name_in_file(self, key: str) -> str:
        """What the file calls a tensor, which may stand here under another name."""
        return key


class SafetensorsFile(LazyTensors):
    """One safetensors file, read tensor by tensor with plain reads, so that nothing of it stays mapped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = str(path)
        header: Header = read_header(self.path)
        self.metadata = header.metadata
        self._entries = header.entries
        self.shapes = {key: entry.shape for key, entry in header.entries.items()}
        self.dtypes = {key: _DTYPES.get(entry.dtype, UNREADABLE) for key, entry in header.entries.items()}

    def __getitem__(self, key: str) -> Tensor:
        entry, dtype = self._entries[key], self.dtypes[key]
        if dtype == UNREADABLE:
            raise ValueError(f"{self.path}: {key} has dtype {entry.dtype}, which is not supported.")
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        buffer = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.begin)
            view = buffer.numpy().data
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.path} ends inside {key}: the file is incomplete. Copy it again.")
                view = view[count:]
        return buffer.view(dtype).reshape(entry.shape)


class TensorDict(LazyTensors):
    """Tensors that are in memory already (a pickle, or modules on their way to a file)."""

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str, metadata: Mapping[str, str] | None = None):
        self._tensors = dict(tensors)
        self.source = source
        self.metadata = dict(metadata or {})
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}
        self.dtypes = {key: value.dtype for key, value in self._tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]


class RenamedTensors(LazyTensors):
    """A view of other tensors under new names; `plan` maps each new name to (old name, operation or None)."""

    def __init__(self, tensors: Mapping[str, Tensor], plan: Mapping[str, tuple[str, Operation | None]]):
        self._tensors = tensors
        self._plan = dict(plan)
        self.source = getattr(tensors, "source", "the given tensors")
        self.metadata = dict(getattr(tensors, "metadata", {}))
        shapes, dtypes = shapes_of(tensors), dtypes_of(tensors)
        self.shapes, self.dtypes = {}, {}
        for new, (old, operation) in self._plan.items():
            shape, dtype = shapes[old], dtypes[old]
            if operation is not None:
                try:
                    result = operation(torch.empty(shape, dtype=dtype, device="meta"))
                except (RuntimeError, IndexError) as error:
                    raise ValueError(f"{self.source}: {old} has the shape {list(shape)}, which is wrong.") from error
                shape, dtype = tuple(result.shape), result.dtype
            self.shapes[new], self.dtypes[new] = shape, dtype

    def origins(self) -> dict[str, str]:
        """Old name -> new name (the last one, where several new tensors come from one old)."""
        return {old: new for new, (old, _) in self._plan.items()}

    def name_in_file(self, key: str) -> str:
        return name_in_file(self._tensors, self._plan[key][0])

    def __getitem__(self, key: str) -> Tensor:
        name, operation = self._plan[key]
        tensor = self._tensors[name]
        return tensor if operation is None else operation(tensor)


def select(tensors: Mapping[str, Tensor], prefix: str) -> RenamedTensors:
    """The tensors below `prefix`, without it."""
    return RenamedTensors(tensors, {key.removeprefix(prefix): (key, None) for key in tensors if key.startswith(prefix)})


class JoinedTensors(LazyTensors):
    """Tensors that are each one or several others, joined along the first dimension; read when they are asked for.

    The two halves of the keys in `swapped` change places after joining.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]], swapped: Collection[str] = ()
    ) -> None:
        self._tensors, self._parts, self._swapped = tensors, parts, frozenset(swapped)
        self.source = getattr(tensors, "source", "the given tensors")
        self.metadata = dict(getattr(tensors, "metadata", {}))
        shapes, dtypes = shapes_of(tensors), dtypes_of(tensors)
        self.shapes = {}
        for key, names in parts.items():
            first = shapes[names[0]]
            self.shapes[key] = first if len(names) == 1 else (sum(shapes[name][0] for name in names), *first[1:])
        self.dtypes = {key: dtypes[names[0]] for key, names in parts.items()}

    def name_in_file(self, key: str) -> str:
        return ", ".join(name_in_file(self._tensors, name) for name in self._parts[key])

    def __getitem__(self, key: str) -> Tensor:
        names = self._parts[key]
        tensor = self._tensors[names[0]]
        if len(names) > 1:
            tensor = torch.cat([tensor, *(self._tensors[name].to(tensor.dtype) for name in names[1:])])
        return swap_halves(tensor) if key in self._swapped else tensor


def swap_halves(tensor: Tensor) -> Tensor:
    """Scale and shift of a modulation in the other order: the two halves of the first dimension change places."""
    return torch.cat(tensor.chunk(2)[::-1])


class _ShardedTensors(LazyTensors):
    def __init__(self, parts: list[LazyTensors], source: str) -> None:
        self._owner = {key: part for part in parts for key in part}
        self.source = source
        self.metadata = dict(parts[0].metadata)
        self.shapes = {key: part.shapes[key] for key, part in self._owner.items()}
        self.dtypes = {key: part.dtypes[key] for key, part in self._owner.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._owner[key][key]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape, without reading lazy tensors."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {key: tuple(value.shape) for key, value in tensors.items()}


def name_in_file(tensors: Mapping[str, Tensor], key: str) -> str:
    """What the file calls the tensor `key`."""
    return tensors.name_in_file(key) if isinstance(tensors, LazyTensors) else key


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Key -> dtype, without reading lazy tensors."""
    if isinstance(tensors, LazyTensors):
        return tensors.dtypes
    return {key: value.dtype for key, value in tensors.items()}


def shard_paths(path: str | Path) -> list[Path]:
    """The files that belong together: those of an index file, all shards of a `-0000i-of-0000K` name, or one alone.

    Raises FileNotFoundError that names the first missing shard.
    """
    path = Path(path)
    if _INDEX.search(path.name):
        weight_map = read_json_table(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path}: weight_map is missing or no table of file names.")
        paths = [path.parent / name for name in sorted(set(weight_map.values()))]
    elif match := _SHARD.match(path.name):
        count = int(match["count"])
        names = [f"{match['stem']}-{i:05d}-of-{count:05d}{match['suffix']}" for i in range(1, count + 1)]
        paths = [path.parent / name for name in names]
    else:
        paths = [path]
    for item in paths:
        if not item.exists():
            raise FileNotFoundError(f"{item} does not exist" + (f" (needed by {path})." if item != path else "."))
    return paths


def open_tensors(path: str | Path) -> LazyTensors:
    """A tensor file (or all its shards) for lazy reading. Pickles are read at once, safetensors tensor by tensor.

    What it is goes by its content, not by its name. Raises FileNotFoundError, or ValueError when the file is
    incomplete, damaged, something else, or holds anything but tensors.
    """
    parts: list[LazyTensors] = []
    for item in shard_paths(path):
        if holds_safetensors(item):
            parts.append(SafetensorsFile(item))
        else:
            parts.append(TensorDict(load_pickle(item).tensors, source=str(item)))
    return parts[0] if len(parts) == 1 else _ShardedTensors(parts, str(path))


def load_tensors(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of a file on `device`; floating ones cast to `dtype` if given, one at a time.

    Those of an unknown dtype are left out with a warning.
    """
    tensors = open_tensors(path)
    unreadable = [key for key in tensors if not tensors.is_readable(key)]
    if unreadable:
        logger.warning("%s: left out, their dtype is not known: %s", path, ", ".join(unreadable[:10]))
    return {key: cast(tensors[key], dtype=dtype, device=device) for key in tensors if key not in set(unreadable)}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file; empty for pickles, which have none."""
    return SafetensorsFile(path).metadata if holds_safetensors(path) else {}


def cast(tensor: Tensor, *, dtype: torch.dtype | None, device: torch.device | str | None = None) -> Tensor:
    """`tensor` on `device`; only floating tensors change their dtype."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


# --- filling modules -------------------------------------------------------------------------------------------
def fill_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    component: str,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a module built on the meta device its tensors, read and cast one by one; nothing may be missing or left.

    Non-persistent buffers must be rebuilt by the caller first. Raises ValueError with file, component and up to ten
    missing, unexpected and misshapen keys, for integers where numbers are needed, and for NaN and infinite numbers
    (which `finite.only_warned` lets pass).
    """
    state = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in state.items()}
    source = getattr(tensors, "source", "the given tensors")
    shapes = without_left_overs(expected, shapes_of(tensors), source=source)
    check_keys(expected, shapes, component=component, source=source)
    spoilt = []
    for key in expected:
        stored = tensors[key]
        if state[key].is_floating_point() and not stored.is_floating_point():
            raise ValueError(f"{source}: {name_in_file(tensors, key)} holds {stored.dtype}; float weights are needed.")
        count = count_non_finite(stored)
        if count:
            spoilt.append((name_in_file(tensors, key), count))
        tensor = cast(stored, dtype=dtype, device=device)
        owner_name, _, name = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[name] = tensor
    notice_non_finite(source, spoilt)
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"{component} of {source}: never filled: {', '.join(left[:10])}")


def check_keys(expected: Shapes, found: Shapes, *, component: str, source: str) -> None:
    """Raises ValueError unless both sides have the same keys and shapes."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [key for key in expected if key in found and tuple(expected[key]) != tuple(found[key])]
    if not (missing or unexpected or wrong):
        return
    lines = [f"{source}: the weights do not fit the {component}."]
    if missing:
        lines.append(f"{len(missing)} missing: {', '.join(missing[:10])}.")
    if unexpected:
        lines.append(f"{len(unexpected)} unexpected: {', '.join(unexpected[:10])}.")
    for key in wrong[:10]:
        lines.append(f"{key} is {list(found[key])}, expected {list(expected[key])}.")
    raise ValueError(" ".join(lines))


# --- writing ---------------------------------------------------------------------------------------------------
@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` only when everything in it has reached the disk.

    A failure or a kill before that leaves the previous file whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file atomically, one tensor at a time; floating ones are cast to `dtype` if given.

    Tensors that share storage are written as separate copies. Order: larger element types first, then by name.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = _text_metadata(metadata)
    dtypes = {
        key: dtype if dtype is not None and stored.is_floating_point else stored
        for key, stored in dtypes_of(tensors).items()
    }
    order = sorted(tensors, key=lambda key: (-dtypes[key].itemsize, key))
    shapes = shapes_of(tensors)
    offset = 0
    for key in order:
        if dtypes[key] not in _DTYPE_NAMES:
            raise ValueError(f"{path}: {key} has dtype {dtypes[key]}, which safetensors cannot hold.")
        size = math.prod(shapes[key]) * dtypes[key].itemsize
        header[key] = {
            "dtype": _DTYPE_NAMES[dtypes[key]], "shape": list(shapes[key]), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 256)
    with atomic_write(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for key in order:
            flat = tensors[key].detach().to(device="cpu", dtype=dtypes[key]).contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


def _text_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise ValueError(f"metadata key {key!r} is not text.")
        if not isinstance(value, str):
            logger.warning("metadata %s is a %s; written as text", key, type(value).__name__)
    return {key: str(value) for key, value in metadata.items()}


def save_pickle(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a dictionary of tensors and plain values with torch's pickle format, atomically."""
    with atomic_write(path) as file:
        torch.save(dict(content), file)
