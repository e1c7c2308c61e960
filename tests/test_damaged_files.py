"""Damaged model files of every sort given to what reads them: each works or ends in a named error, quickly."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library import flux_model_util, launch, sd3_model_util, sdxl_model_util
from library.checkpoints.embeddings import read_embeddings
from library.checkpoints.tensors import load_tensors
from library.families import drawn
from library.generation.attached_networks import attach_networks
from library.model_util import LoadSpec, load_model
from library.models.vae import load_vae
from library.options.generation import AttachedNetworkOptions
from networks import merge_lora
from tests import damage
from tests.golden import FOLDER
from tests.lora_files import tiny_family, tiny_model, write_lora
from tests.training import MODEL
from tools import convert_diffusers20_original_sd, show_metadata

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MODELS = FOLDER / "models"
CASES = 1000
SECONDS = 5.0  # after which one file counts as a hang
MEGABYTES = 600.0  # by which the process may grow over all files


class Hang(BaseException):
    """A reader took too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small sound files of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    lora = write_lora(folder / "lora.safetensors", tiny_model(), 1, rank=2)
    save_file({"emb_params": torch.ones(2, 32)}, folder / "word.safetensors")
    stored = load_tensors(MODEL)
    prefix = "first_stage_model."
    save_file(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}, folder / "vae.safetensors"
    )
    torch.save({"state_dict": stored, "global_step": 3}, folder / "model.ckpt")
    torch.save(load_tensors(lora), folder / "lora.pt", _use_new_zipfile_serialization=False)
    torch.save({"string_to_param": {"*": torch.ones(2, 32)}, "name": "word"}, folder / "word.pt")
    paths = [
        MODEL,
        *(MODELS / f"{name}_tiny.safetensors" for name in ("sdxl", "sd3", "flux", "clip_l", "t5xxl", "flux_ae")),
    ]
    return {path.name: path.read_bytes() for path in (*paths, *folder.iterdir())}


def merged(path: Path) -> None:
    options = merge_lora.MergeOptions(models=(str(path),), ratios=(1.0,), concat=True, save_to=str(path) + ".merged")
    merge_lora.merge(options)


def converted(path: Path) -> None:
    convert_diffusers20_original_sd.load(
        convert_diffusers20_original_sd.ConversionOptions(str(path), str(path) + ".out.safetensors", v1=True)
    )


def shown(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        show_metadata.show(show_metadata.ShowMetadataOptions(str(path), decode=True))


def sd3(path: Path) -> None:
    encoders = {name: str(MODELS / f"{name}_tiny.safetensors") for name in ("clip_l", "clip_g", "t5xxl")}
    spec = sd3_model_util.Sd3LoadSpec(str(path), encoders=encoders)
    sd3_model_util.problems_with_files(spec)
    sd3_model_util.load_model(spec)


def flux(path: Path, **changes: Path) -> None:
    given = {
        "vae": MODELS / "flux_ae_tiny.safetensors", "clip_l": MODELS / "clip_l_tiny.safetensors",
        "t5xxl": MODELS / "t5xxl_tiny.safetensors", **changes,
    }  # fmt: skip
    spec = flux_model_util.FluxLoadSpec(str(path), **{name: str(value) for name, value in given.items()})
    flux_model_util.problems(spec)
    flux_model_util.load_model(spec)


def flux_with(name: str) -> Callable[[Path], None]:
    return lambda path: flux(MODELS / "flux_tiny.safetensors", **{name: path})


class Readers:
    """What scripts do with a file, by the file's name."""

    def __init__(self) -> None:
        self.family = tiny_family()

    def attached(self, path: Path) -> None:
        options = AttachedNetworkOptions(
            network_module=("networks.lora",), network_weights=(str(path),), network_merge=True
        )
        attach_networks(options, self.family, device="cpu", dtype=torch.float32)

    def of(self, name: str) -> list[Callable[[Path], object]]:
        sd = [lambda path: load_model(LoadSpec(str(path))), converted, lambda path: drawn.model_kind(str(path))]
        table: dict[str, list[Callable[[Path], object]]] = {
            "sd1_tiny.safetensors": sd, "model.ckpt": sd,
            "sdxl_tiny.safetensors": [lambda path: sdxl_model_util.load_model(sdxl_model_util.LoadSpec(str(path)))],
            "sd3_tiny.safetensors": [sd3], "flux_tiny.safetensors": [flux],
            "clip_l_tiny.safetensors": [flux_with("clip_l")], "t5xxl_tiny.safetensors": [flux_with("t5xxl")],
            "flux_ae_tiny.safetensors": [flux_with("vae")], "vae.safetensors": [load_vae],
            "word.safetensors": [self.word], "word.pt": [self.word],
            "lora.safetensors": [merged, self.attached], "lora.pt": [merged, self.attached],
        }  # fmt: skip
        return [*table[name], shown]

    @staticmethod
    def word(path: Path) -> None:
        read_embeddings(path, ["clip_l"])


def frequency(name: str) -> int:
    """How often a file is drawn: those that are quick to read more often."""
    return 6 if name.startswith("word") else 1 if name == "lora.pt" else 2


def outcome_of(reader: Callable[[Path], object], path: Path) -> str:
    """Either "read" or "refused", or what is wrong with the way in which it failed."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with limited():
            reader(path)
        return "read"
    except launch.MISTAKES as error:
        return "refused" if path.name in str(error) else f"does not name the file: {type(error).__name__} {error}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.disable(level)


def test_a_thousand_damaged_files_are_read_or_refused_by_name(files: dict[str, bytes], tmp_path: Path) -> None:
    readers, outcomes, failures = Readers(), Counter[str](), []
    names = sorted(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES):
        draw = random.Random(case)
        name = draw.choices(names, [frequency(name) for name in names])[0]
        path = tmp_path / name
        path.write_bytes(damage.damaged(files[name], draw, is_pickle=not name.endswith(".safetensors")))
        for reader in readers.of(name):
            outcome = outcome_of(reader, path)
            outcomes[outcome if outcome in ("read", "refused") else "failed"] += 1
            if outcome not in ("read", "refused"):
                failures.append(f"case {case}, {name}, {getattr(reader, '__name__', reader)}: {outcome}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert failures == []
    assert outcomes["refused"] > CASES
    assert outcomes["read"] > CASES / 10, "the damage is too coarse: nothing is left to read"
    assert growth < MEGABYTES
