"""Pickles execute nothing: what they may name is a fixed list, everything else is refused or discarded by its name."""

from __future__ import annotations

import functools
import io
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.checkpoints import unpickle
from library.checkpoints.unpickle import load_pickle

#: (module, name, arguments as opcodes are given them); every one would leave a file or read one
GADGETS = (
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"),
    ("builtins", "compile"), ("builtins", "open"), ("builtins", "setattr"), ("__builtin__", "eval"),
    ("torch", "save"), ("torch", "load"), ("torch.hub", "load"), ("torch", "hub.load"), ("torch.serialization", "load"),
    ("torch.jit", "load"), ("torch.nn", "Module"), ("torch.utils.data", "DataLoader"), ("functools", "partial"),
    ("numpy", "load"), ("numpy", "fromfile"), ("numpy.core.multiarray", "_reconstruct"), ("os", "system"),
    ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "check_output"),
    ("codecs", "open"), ("codecs", "encode"), ("_codecs", "decode"), ("pickle", "loads"), ("_pickle", "loads"),
    ("shutil", "rmtree"), ("importlib", "import_module"), ("operator", "attrgetter"), ("types", "CodeType"),
    ("types", "FunctionType"), ("pty", "spawn"), ("webbrowser", "open"), ("runpy", "run_path"),
    ("library.checkpoints.unpickle", "load_pickle"), ("collections", "namedtuple"), ("torch._utils", "sys.modules"),
)  # fmt: skip


def test_the_list_of_what_a_pickle_may_name_is_this_one():
    assert unpickle.ALLOWED == {
        ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"), ("torch", "Size"), ("torch", "device"),
        ("torch.serialization", "_get_layout"), ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"), ("_codecs", "encode"),
    }  # fmt: skip


# --- opcodes ---------------------------------------------------------------------------------------------------
def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def reduce(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + _text(argument) + b"tR"


def inst(module: str, name: str, argument: str) -> bytes:
    return b"(" + _text(argument) + f"i{module}\n{name}\n".encode()


def obj(module: str, name: str, argument: str) -> bytes:
    return b"(" + f"c{module}\n{name}\n".encode() + _text(argument) + b"o"


def newobj(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + _text(argument) + b"t\x81"


def newobj_ex(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + _text(argument) + b"t}\x92"


def stack_global(module: str, name: str, argument: str) -> bytes:
    return _text(module) + _text(name) + b"\x93(" + _text(argument) + b"tR"


def build(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"}" + _text("a") + _text(argument) + b"sb"


def persistent(module: str, name: str, argument: str) -> bytes:
    """A persistent id whose parts are made by the gadget."""
    return b"(" + _text("storage") + reduce(module, name, argument) + _text("0") + _text("cpu") + b"K\x01tQ"


OPCODES = (reduce, inst, obj, newobj, newobj_ex, stack_global, build, persistent)


def state_with(opcode: bytes, protocol: int) -> bytes:
    """The pickle of {"w": <made by these opcodes>}."""
    header = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
    return header + b"}" + _text("w") + opcode + b"s."


def write(path: Path, content: bytes, *, is_zip: bool) -> Path:
    """`content` as the pickle of a torch file of either format."""
    if is_zip:
        torch.save({"w": 1}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else data)
        return path
    file = io.BytesIO()
    torch.save({"w": 1}, file, _use_new_zipfile_serialization=False)
    start = file.getvalue()
    position = len(start) - len(pickle.dumps({"w": 1}, protocol=2)) - len(pickle.dumps([], protocol=2))
    path.write_bytes(start[:position] + content + pickle.dumps([], protocol=2))
    return path


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("opcode", OPCODES, ids=lambda opcode: opcode.__name__)
def test_no_gadget_runs_and_each_is_refused_by_name(opcode, is_zip, tmp_path):
    proof = tmp_path / "executed"
    arguments = (f"touch {proof}", f"open({str(proof)!r}, 'w')", str(proof))
    for index, (module, name) in enumerate(GADGETS):
        for protocol in range(6):
            argument = arguments[(index + protocol) % 3]
            path = write(tmp_path / "x.ckpt", state_with(opcode(module, name, argument), protocol), is_zip=is_zip)
            with pytest.raises(ValueError, match=r"x\.ckpt") as error:
                load_pickle(path)
            assert f"{module}.{name}" in str(error.value), (module, name, protocol)
            assert not proof.exists(), (module, name, protocol)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_gadgets_made_by_pickle_itself_are_refused(protocol, tmp_path):
    class Gadget:
        def __init__(self, call: Callable[..., object], *arguments: object) -> None:
            self.made = call, arguments

        def __reduce__(self) -> tuple[object, ...]:
            return self.made

    proof = str(tmp_path / "executed")
    for call, arguments in (
        (eval, (f"open({proof!r}, 'w')",)), (os.system, (f"touch {proof}",)), (torch.save, (1, proof)),
        (functools.partial, (open, proof, "w")), (np.save, (proof, 1)), (exec, (f"open({proof!r}, 'w')",)),
    ):  # fmt: skip
        for zipped in (True, False):
            path = tmp_path / "x.pt"
            torch.save({"w": Gadget(call, *arguments)}, path, pickle_protocol=protocol,
                       _use_new_zipfile_serialization=zipped)  # fmt: skip
            with pytest.raises(ValueError, match=r"x\.pt") as error:
                load_pickle(path)
            assert call.__name__ in str(error.value)
    assert not list(tmp_path.glob("executed*"))


def test_an_allowed_function_can_be_called_but_not_changed(tmp_path):
    before = torch._utils._rebuild_parameter.__dict__.copy(), torch._utils._rebuild_parameter.__defaults__
    for state in (b"}" + _text("a") + b"K\x01s", b"(N}" + _text("__defaults__") + b"K\x01\x85st"):
        content = state_with(b"ctorch._utils\n_rebuild_parameter\n" + state + b"b", 2)
        with pytest.raises(ValueError, match=r"x\.pt"):
            load_pickle(write(tmp_path / "x.pt", content, is_zip=True))
    after = torch._utils._rebuild_parameter.__dict__.copy(), torch._utils._rebuild_parameter.__defaults__
    assert after == before


def test_no_other_encoding_than_that_of_numbers_is_looked_up(tmp_path):
    content = state_with(b"cos\nsystem\n0c_codecs\nencode\n(" + _text("x") + _text("punycode") + b"tR", 2)
    with pytest.raises(ValueError, match="punycode"):
        load_pickle(write(tmp_path / "x.pt", content, is_zip=True))


def test_a_file_that_names_a_large_memo_reserves_no_memory(tmp_path):
    content = state_with(b"cos\nsystem\nr\xff\xff\xff\x7f", 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"os\.system"):
        load_pickle(write(tmp_path / "x.pt", content, is_zip=True))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_programs_in_torch_script_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"x\.pt cannot be read as a checkpoint"):
        load_pickle(tmp_path / "x.pt")


def test_what_training_programs_really_store_is_read(tmp_path):
    content = {
        "state_dict": {"w": nn.Parameter(torch.ones(2)), "h": torch.ones(2).bfloat16(), "i": torch.arange(2)},
        "epoch": np.int64(3), "global_step": 7, "lr": np.float32(0.5), "size": torch.Size([1]),
        "device": torch.device("cpu"), "layout": torch.strided, "class": np.dtype("f4"),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        read = load_pickle(tmp_path / "x.ckpt")
        assert set(read.tensors) == {"w", "h", "i"}
        assert read.global_step == 7
        assert read.discarded == []
