"""Every training script learns: a short run lowers the loss of its batch, and a rate of next to nothing does not."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter

from library import training_loop
from library.data.records import BatchRequest
from library.train_util import Run
from tests import flux_tiny, sd3_tiny
from tests.golden import FOLDER
from tests.test_cli_parity import TRAINING
from tests.training import MODEL, TOKENIZERS, run_script

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

SIZE = 64
WORD = "mychar"
STILL = "1e-20"  # a learning rate that moves no float32 weight

#: old name -> the script that it starts
OLD_NAMES = {
    "train_controlnet": "train_control_net", "sdxl_train_control_net_lllite_old": "sdxl_train_control_net_lllite",
}  # fmt: skip

SD = ("--pretrained_model_name_or_path", MODEL)
SDXL = ("--pretrained_model_name_or_path", FOLDER / "models" / "sdxl_tiny.safetensors")
FLUX = (
    "--pretrained_model_name_or_path", flux_tiny.TRANSFORMER, "--model_prediction_type", "raw", "--guidance_scale", 1,
    *(word for name, path in flux_tiny.FILES.items() for word in (f"--{name}", path)), "--t5xxl_max_token_length", 24,
)  # fmt: skip
SD3 = tuple(word for name, path in sd3_tiny.FILES.items() for word in (f"--{name}", path))
NEW_WORD = ("--token_string", WORD, "--num_vectors_per_token", 8)
LORA = ("--network_module", "networks.lora", "--network_dim", 4)


@dataclass(frozen=True)
class Case:
    """A script's own options, the data it takes ("folder", "metadata", "hints"), and what its run must show.

    `falls_to`: the share of its first value that the loss must be below after the run.
    """

    words: tuple[object, ...]
    rate: str
    falls_to: float
    data: str = "folder"
    steps: int = 12
    rate_options: tuple[str, ...] = ("--learning_rate",)


CASES = {
    "train_network": Case((*SD, *LORA), "1e-2", 0.9),
    "sdxl_train_network": Case((*SDXL, *LORA), "1e-2", 0.9),
    "flux_train_network": Case((*FLUX, "--network_module", "networks.lora_flux", "--network_dim", 4), "1e-2", 0.9),
    "sd3_train_network": Case((*SD3, "--network_module", "networks.lora_sd3", "--network_dim", 4), "1e-2", 0.9),
    "train_db": Case(SD, "1e-3", 0.7),
    "fine_tune": Case(SD, "1e-3", 0.7, "metadata"),
    "sdxl_train": Case(SDXL, "1e-3", 0.7),
    "flux_train": Case((*FLUX, "--cache_text_encoder_outputs"), "1e-3", 0.7),
    "sd3_train": Case((*SD3, "--cache_text_encoder_outputs"), "2e-3", 0.7),
    "train_textual_inversion": Case((*SD, *NEW_WORD), "0.5", 0.93, steps=20),
    "sdxl_train_textual_inversion": Case((*SDXL, *NEW_WORD), "0.5", 0.93, steps=20),
    "train_textual_inversion_XTI": Case((*SD, *NEW_WORD), "0.5", 0.93, steps=20),
    "train_control_net": Case(SD, "5e-3", 0.8, "hints"),
    "sdxl_train_control_net": Case(
        SDXL, "8e-3", 0.85, "hints", steps=20, rate_options=("--learning_rate", "--control_net_lr")
    ),
    "flux_train_control_net": Case(FLUX, "5e-3", 0.8, "hints"),
    "sdxl_train_control_net_lllite": Case(
        (*SDXL, "--cond_emb_dim", 16, "--network_dim", 16), "3e-2", 0.85, "hints", steps=20
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One batch of two pictures with captions, metadata and hints, and a dataset file for each kind of data."""
    folder = tmp_path_factory.mktemp("data")
    pictures, hints = folder / "pictures", folder / "hints"
    metadata = {}
    for name in ("a1", "b1"):
        with Image.open(FOLDER / "dataset" / f"{name}.png") as image:
            small = image.convert("RGB").resize((SIZE, SIZE))
        for place, content in ((pictures, small), (hints, small.filter(ImageFilter.FIND_EDGES))):
            place.mkdir(exist_ok=True)
            content.save(place / f"{name}.png")
        caption = f"{WORD} {name}"
        (pictures / f"{name}.txt").write_text(caption, encoding="utf-8")
        metadata[str(pictures / f"{name}.png")] = {"caption": caption}
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    subsets = {
        "folder": 'caption_extension = ".txt"',
        "metadata": f"metadata_file = {str(folder / 'metadata.json')!r}",
        "hints": f'caption_extension = ".txt"\nconditioning_data_dir = {str(hints)!r}',
    }
    for name, subset in subsets.items():
        for kind, size in (("pair", 2), ("single", 1)):
            (folder / f"{name}-{kind}.toml").write_text(
                f"[[datasets]]\nresolution = {SIZE}\nbatch_size = {size}\n"
                f"[[datasets.subsets]]\nimage_dir = {str(pictures)!r}\n{subset}\n",
                encoding="utf-8",
            )
    return folder


def loss_of(run: Run, group: training_loop.DatasetGroup) -> float:
    """The run's loss on its batch, with noise and timesteps that are always the same."""
    batch = group[BatchRequest(epoch=1, index=0, step=0)]
    assert batch.latents is not None
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return float(run.method.loss(batch, torch.full((len(batch.captions),), 500.0), noise).mean())


def change_of_loss(
    script: str, rate: str, steps: int, data: Path, output: Path, monkeypatch, batches: str = "pair"
) -> float:
    """Loss after a run of the script, as a share of the loss before its first step."""
    case = CASES[script]
    losses = []
    run_epochs = training_loop.run_epochs

    def watched(run: Run, group: training_loop.DatasetGroup, *rest: object) -> None:
        losses.append(loss_of(run, group))
        run_epochs(run, group, *rest)
        losses.append(loss_of(run, group))

    monkeypatch.setattr(training_loop, "run_epochs", watched)
    tokenizers = () if "--tokenizer_cache_dir" in case.words else ("--tokenizer_cache_dir", TOKENIZERS)
    run_script(
        script, *map(str, (
            *case.words, *tokenizers, *(word for option in case.rate_options for word in (option, rate)),
            "--dataset_config", data / f"{case.data}-{batches}.toml", "--cache_latents", "--max_data_loader_n_workers",
            0, "--seed", 42, "--min_timestep", 500, "--max_timestep", 501, "--max_train_steps", steps,
            "--output_dir", output, "--output_name", "run", "--save_model_as", "safetensors",
        )),
    )  # fmt: skip
    before, after = losses
    return after / before


@pytest.mark.parametrize("script", CASES)
def test_a_short_run_lowers_the_loss(script, data, tmp_path, monkeypatch):
    case = CASES[script]
    change = change_of_loss(script, case.rate, case.steps, data, tmp_path, monkeypatch)
    assert change < case.falls_to


@pytest.mark.parametrize("script", CASES)
def test_without_a_learning_rate_the_loss_of_a_single_small_picture_stays(script, data, tmp_path, monkeypatch):
    change = change_of_loss(script, STILL, 1, data, tmp_path, monkeypatch, batches="single")
    assert change == pytest.approx(1.0, abs=1e-4)


def test_no_training_script_is_left_out():
    assert CASES.keys() | OLD_NAMES.keys() == TRAINING.keys()
    for old, new in OLD_NAMES.items():
        started, meant = (importlib.import_module(name).SCRIPT for name in (old, new))
        assert (started.family, started.method) == (meant.family, meant.method)
