"""Cache files that are spoilt while a run trains: made anew between two steps, and the run goes on."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from library.caching import CacheRepair, fill_text_caches, text_encoding
from library.data.cache import CacheOptions, cache_latents
from library.data.loader import BatchLoader
from library.data.records import Batch
from library.launch import resolve
from library.methods.network import NetworkTraining
from library.options import make_options
from library.train_util import Precision
from tests import flux_tiny, sd3_tiny, sdxl_tiny
from tests.golden import FOLDER
from tests.picture_folder import dataset_config, group_of, records_of, save_pictures
from tests.training import TOKENIZERS, clean_process, run_script, write_config

MODELS = FOLDER / "models"
SDXL: list[str | Path] = ["--pretrained_model_name_or_path", MODELS / "sdxl_tiny.safetensors"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three small pictures with captions, and the dataset file that names them."""
    pictures = save_pictures(tmp_path / "pictures", [(64, 64), (64, 64), (128, 64)])
    for picture, caption in zip(pictures, ("a red cat", "a blue dog on a mat", "!"), strict=True):
        picture.with_suffix(".txt").write_text(caption, encoding="utf-8")
    path = write_config(tmp_path, pictures[0].parent)
    text = path.read_text("utf-8").replace("resolution = 192", "resolution = 64").replace("= 128", "= 64")
    path.write_text(text, encoding="utf-8")
    return path


def train(dataset: Path, name: str, *words: str | Path) -> dict[str, torch.Tensor]:
    folder = dataset.parent / name
    run_script(
        "sdxl_train_network", *SDXL, "--dataset_config", dataset, "--tokenizer_cache_dir", TOKENIZERS,
        "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only", "--seed", "7",
        "--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_epochs", "2", "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk", *words, "--output_dir", folder, "--output_name", "run",
    )  # fmt: skip
    return load_file(folder / "run.safetensors")


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def spoil_after_first_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Calls a function once, when the first batch of the run has been served."""

    def install(damage: Callable[[], None]) -> None:
        served = BatchLoader.epoch

        def epoch(self: BatchLoader, number: int, **position: int) -> Iterator[Batch]:
            for index, batch in enumerate(served(self, number, **position)):
                yield batch
                if number == 1 and index == 0:
                    damage()

        monkeypatch.setattr(BatchLoader, "epoch", epoch)

    return install


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_with_the_same_result(
    workers: int, dataset: Path, caplog: pytest.LogCaptureFixture,
    spoil_after_first_batch: Callable[[Callable[[], None]], None],
) -> None:
    words = ["--max_data_loader_n_workers", str(workers)]
    train(dataset, "first", *words)  # fills the caches
    undisturbed = train(dataset, "undisturbed", *words)
    files = sorted((dataset.parent / "pictures").glob("*.npz"))
    assert len(files) == 6

    def damage() -> None:
        for path in files:
            spoil(path)

    spoil_after_first_batch(damage)
    with caplog.at_level(logging.WARNING):
        disturbed = train(dataset, "disturbed", *words)
    remade = {Path(record.args[0]).name for record in caplog.records if "the cache is made anew" in record.message}
    assert {path.name for path in files if path.name.endswith("_te_outputs.npz")} & remade
    assert {path.name for path in files if path.name.endswith("_sdxl.npz")} & remade
    for key, value in undisturbed.items():  # a remade latent has other noise of the VAE, and everything else is equal
        assert torch.allclose(value, disturbed[key], atol=0.05), key
    train(dataset, "last", *words)
    for path in files:
        with np.load(path) as file:
            assert {"identity"} <= set(file.files)


@pytest.mark.slow
def test_encoders_that_cannot_be_had_again_end_the_run_with_the_file_named(
    dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    spoil_after_first_batch: Callable[[Callable[[], None]], None],
) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes((MODELS / "sdxl_tiny.safetensors").read_bytes())
    SDXL_COPY = ["--pretrained_model_name_or_path", model, "--max_data_loader_n_workers", "0"]

    def damage() -> None:
        save_file({key: value * 2 for key, value in load_file(model).items()}, model)
        for path in (dataset.parent / "pictures").glob("*_te_outputs.npz"):
            spoil(path)

    spoil_after_first_batch(damage)
    with pytest.raises(SystemExit) as stop:
        train(dataset, "run", *SDXL_COPY)
    assert stop.value.code == 2
    assert "_te_outputs.npz: the cache is spoilt (" in capsys.readouterr().err


@pytest.fixture
def alone() -> Iterator[None]:
    """No accelerator of another test before, none of this test after it."""
    with clean_process():
        yield


# --- one file -------------------------------------------------------------------------------------------------
FILES: dict[str, dict[str, Path]] = {
    "sdxl": {"pretrained_model_name_or_path": sdxl_tiny.MODEL},
    "flux": {"pretrained_model_name_or_path": flux_tiny.TRANSFORMER, **flux_tiny.FILES},
    "sd3": {**sd3_tiny.FILES},
}  # fmt: skip


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("name", "precision"), [("sdxl", "bf16"), ("flux", "bf16"), ("sd3", "no"), ("sd3", "bf16")])
def test_a_file_is_made_anew_as_it_was_without_random_numbers_of_the_run(
    name: str, precision: str, tmp_path: Path
) -> None:
    options = make_options(**{
        **{key: str(path) for key, path in FILES[name].items()}, "tokenizer_cache_dir": str(TOKENIZERS),
        "mixed_precision": precision, "cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True,
    })  # fmt: skip
    family = resolve(importlib.import_module(f"{name}_train_network").SCRIPT.family)(options)
    method, accelerator = NetworkTraining(options, family), Accelerator(cpu=True, mixed_precision=precision)
    dtype = Precision.from_options(options).weight
    family.load(weight_dtype=dtype, vae_dtype=torch.float32, device="cpu")
    pictures = save_pictures(tmp_path, [(64, 64)])
    group = group_of((dataset_config(resolution=(64, 64)), records_of(pictures)), spec=family.latent)
    cache_latents(
        group, family.encode_images, spec=family.latent,
        options=CacheOptions(to_disk=True, vae_identity=family.vae_identity),
    )
    with text_encoding(family, accelerator):
        fill_text_caches(options, family, method.tokenize, group, accelerator)
    repair = CacheRepair(method, group, accelerator)
    latents, text = sorted(tmp_path.glob("*.npz"), key=lambda path: "_te" in path.name)
    torch.manual_seed(3)
    before, whole = torch.get_rng_state(), {path: arrays_in(path) for path in (latents, text)}
    for path in whole:
        spoil(path)
        assert repair(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not repair(tmp_path / "nothing.npz")
    again = arrays_in(text)
    assert again.keys() == whole[text].keys()
    assert all(np.array_equal(again[key], array) for key, array in whole[text].items())
    assert arrays_in(latents).keys() == whole[latents].keys()  # latents have other noise of the VAE
    (batch,) = BatchLoader(group).epoch(1)
    assert batch.latents is not None and batch.text_outputs is not None


@pytest.mark.usefixtures("alone")
def test_text_that_is_not_cached_is_not_made_anew(tmp_path: Path) -> None:
    family = sdxl_tiny.sdxl_family()
    group = group_of((dataset_config(resolution=(64, 64)), records_of(save_pictures(tmp_path, [(64, 64)]))))
    repair = CacheRepair(NetworkTraining(family.options, family), group, Accelerator(cpu=True))
    assert not repair(tmp_path / "a0_sdxl_te_outputs.npz")
