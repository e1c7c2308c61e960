"""Hashes of tensors equal the hashes of the file that safetensors itself would write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from library.hashes import legacy_file_hash, sshs_hashes

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16,
    torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64,
    torch.int64, torch.uint64,
]  # fmt: skip


def some_tensors(size: int) -> dict[str, torch.Tensor]:
    """Every dtype twice, with names whose order differs from the order of the dtypes, and an empty and a scalar one."""
    tensors = {}
    for index, dtype in enumerate(DTYPES):
        for name in (f"z{index % 5}.weight{index}", f"a{index % 3}.ünï\"code{index}"):
            tensors[name] = (torch.arange(size) % 2 + index % 2).to(dtype)
    return tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}


@pytest.mark.parametrize("metadata", [None, {"ss_a": "x"}, {"ss_quote": 'a "b" \\ \n\t\x01 ü €', "other": "dropped"}])
def test_hashes_equal_those_of_a_written_file(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = some_tensors(20_000)
    kept = {key: value for key, value in (metadata or {}).items() if key.startswith("ss_")}
    data = save(tensors, kept or None)
    assert len(data) > 0x110000, "the legacy hash must see real bytes"
    (tmp_path / "file.safetensors").write_bytes(data)
    body = data[8 + int.from_bytes(data[:8], "little") :]
    hashes = sshs_hashes(tensors, metadata)
    assert hashes.model_hash == hashlib.sha256(body).hexdigest()
    assert hashes.legacy_hash == legacy_file_hash(tmp_path / "file.safetensors")


def test_strided_tensors_hash_like_their_contiguous_copies() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    assert sshs_hashes({"w": weight.T}) == sshs_hashes({"w": weight.T.contiguous()}) != sshs_hashes({"w": weight})


def test_a_dtype_that_files_cannot_hold_is_named() -> None:
    with pytest.raises(ValueError, match="bad has the dtype torch.complex128"):
        sshs_hashes({"bad": torch.zeros(1, dtype=torch.complex128)})
