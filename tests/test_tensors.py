"""Tensor files: lazy reading, strict filling, atomic writing, and pickles that execute nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from library.checkpoints import tensors as tf
from library.checkpoints.unpickle import load_pickle

ROOT = Path(__file__).resolve().parent.parent


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 5, generator=generator).half()
    return {
        "a.half": half,
        "a.shared": half,
        "b.transposed": torch.randn(4, 7, generator=generator).t(),
        "c.strided": torch.randn(10, generator=generator)[::2],
        "c.repeated": torch.randn(1, generator=generator).expand(4),
        "scalar": torch.tensor(4.6),
        "empty": torch.empty(0, 3),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "brain": torch.randn(6, generator=generator).bfloat16(),
        "eight": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
    }


def test_written_file_is_read_by_the_standard_library_bit_for_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    tf.save_tensors(path, sample(), metadata={"name": "日本"})
    read = safetensors.torch.load_file(path)
    for key, value in sample().items():
        assert read[key].dtype == value.dtype
        assert read[key].shape == value.shape
        assert torch.equal(read[key].float(), value.float()), key
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"name": "日本"}
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 256 == 0


def test_reader_agrees_with_the_standard_writer_and_reads_each_tensor_alone(tmp_path):
    path = tmp_path / "x.SFT"
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in sample().items()}, path, metadata={"k": "v"})
    opened = tf.open_tensors(path)
    assert opened.metadata == tf.read_metadata(path) == {"k": "v"}
    assert opened.shapes["b.transposed"] == (7, 4)
    for key, value in sample().items():
        assert torch.equal(opened[key].float(), value.float()), key


def test_only_floating_tensors_are_cast(tmp_path):
    path = tmp_path / "x.safetensors"
    tf.save_tensors(path, sample(), dtype=torch.float32)
    read = tf.load_tensors(path, dtype=torch.float16)
    assert read["a.half"].dtype == torch.float16
    assert read["ids"].dtype == torch.int64
    assert tf.load_tensors(path)["a.half"].dtype == torch.float32


def test_truncated_file_is_refused_with_its_name(tmp_path):
    path = tmp_path / "x.safetensors"
    tf.save_tensors(path, sample())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="x.safetensors is incomplete"):
        tf.load_tensors(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        tf.load_tensors(path)


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path):
    for index in (1, 2):
        tf.save_tensors(tmp_path / f"m-0000{index}-of-00002.safetensors", {f"t{index}": torch.ones(index)})
    opened = tf.open_tensors(tmp_path / "m-00001-of-00002.safetensors")
    assert set(opened) == {"t1", "t2"}
    assert opened["t2"].tolist() == [1, 1]
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002"):
        tf.open_tensors(tmp_path / "m-00001-of-00002.safetensors")


def test_a_failing_save_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "x.safetensors"
    tf.save_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="dtype"):
        tf.save_tensors(path, {"a": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(RuntimeError):
        with tf.atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError
    assert tf.load_tensors(path)["a"].tolist() == [1, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tf.save_tensors(path, {"a": torch.zeros(1)})
    code = (
        "import sys, torch; from library.checkpoints.tensors import save_tensors\n"
        "tensors = {str(i): torch.full((1 << 20,), 7.0) for i in range(4)}\n"
        "print('ready', flush=True)\n"
        "while True: save_tensors(sys.argv[1], tensors)"
    )
    for delay in (0.0, 0.013, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        values = torch.cat([value.flatten() for value in tf.load_tensors(path).values()]).unique().tolist()
        assert values in ([0.0], [7.0])


def test_filling_a_module_is_strict_about_keys_and_shapes():
    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    whole = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in build().state_dict().items()}
    module = build()
    tf.fill_module(module, whole, component="thing", dtype=torch.float16)
    assert module[0].weight.dtype == torch.float16
    assert module[1].num_batches_tracked.dtype == torch.int64
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in module.parameters())
    missing = {key: value for key, value in whole.items() if key != "0.bias"}
    with pytest.raises(ValueError, match=r"thing.*1 missing: 0\.bias"):
        tf.fill_module(build(), missing, component="thing", dtype=None)
    with pytest.raises(ValueError, match="1 unexpected: other"):
        tf.fill_module(build(), {**whole, "other": torch.ones(1)}, component="thing", dtype=None)
    with pytest.raises(ValueError, match=r"0\.bias is \[4\], expected \[3\]"):
        tf.fill_module(build(), {**whole, "0.bias": torch.ones(4)}, component="thing", dtype=None)


class Callback:
    """Stands for a training program's object inside a checkpoint."""

    def __init__(self) -> None:
        self.best = 1


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_beside_the_weights_are_discarded_and_never_run(tmp_path, zipped):
    path, proof = tmp_path / "x.ckpt", tmp_path / "executed"
    content = {
        "state_dict": {"w": torch.arange(3.0)}, "epoch": 2, "global_step": 70,
        "callbacks": {"checkpoint": Callback(), "attack": Attack(proof)},
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = load_pickle(path)
    assert read.tensors["w"].tolist() == [0, 1, 2]
    assert (read.epoch, read.global_step) == (2, 70)
    assert any(name.endswith("Callback") for name in read.discarded)
    assert not proof.exists()


def test_a_foreign_object_among_the_weights_is_refused_by_name(tmp_path):
    path, proof = tmp_path / "x.pt", tmp_path / "executed"
    torch.save({"w": torch.ones(1), "bad": Attack(proof)}, path)
    with pytest.raises(ValueError, match=r"bad is a .*system"):
        load_pickle(path)
    assert not proof.exists()


def test_a_pickle_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match="x.pt"):
        load_pickle(path)


def test_bare_state_dict_of_parameters_loads(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert set(tf.load_tensors(path)) == {"weight", "bias"}
