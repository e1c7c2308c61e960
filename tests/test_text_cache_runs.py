"""Training with cached text-encoder outputs is training without: same weights, same sample images, for every family."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import launch
from library.data.npz_files import State
from library.data.text_cache_files import TextEntry, check, read, write
from library.families.base import ModelFamily
from library.generation.kept_prompts import KeptPrompts
from library.generation.training_samples import TrainingSampler
from library.options import make_options
from tests.generation import difference
from tests.golden import FOLDER
from tests.picture_folder import save_pictures
from tests.training import TOKENIZERS, run_script, write_config

pytestmark = pytest.mark.slow  # trains often; `--quick` leaves it out

MODELS = FOLDER / "models"
ENCODERS = {"--clip_l": MODELS / "clip_l_tiny.safetensors", "--t5xxl": MODELS / "t5xxl_tiny.safetensors"}
FAMILIES = {
    "sdxl": {
        "--pretrained_model_name_or_path": MODELS / "sdxl_tiny.safetensors", "--network_module": "networks.lora",
    },
    "flux": {
        "--pretrained_model_name_or_path": MODELS / "flux_tiny.safetensors", "--network_module": "networks.lora_flux",
        "--ae": MODELS / "flux_ae_tiny.safetensors", **ENCODERS,
    },
    "sd3": {
        "--pretrained_model_name_or_path": MODELS / "sd3_tiny.safetensors", "--network_module": "networks.lora_sd3",
        "--clip_g": MODELS / "clip_g_tiny.safetensors", **ENCODERS,
    },
}  # fmt: skip
CACHE, TO_DISK = "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"
UNET_ONLY = "--network_train_unet_only"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three small pictures with captions, and the dataset file that names them."""
    pictures = save_pictures(tmp_path / "pictures", [(64, 64), (64, 64), (128, 64)])
    for picture, caption in zip(pictures, ("a red cat", "a blue dog on a mat", "!"), strict=True):
        picture.with_suffix(".txt").write_text(caption, encoding="utf-8")
    path = write_config(tmp_path, pictures[0].parent, general='caption_prefix = "photo,"')
    text = path.read_text("utf-8").replace("resolution = 192", "resolution = 64").replace("= 128", "= 64")
    path.write_text(text, encoding="utf-8")
    return path


def train(family: str, dataset: Path, name: str, *arguments: str | Path) -> dict[str, Tensor]:
    """The network after two steps; sample images, if asked for, lie in `<folder of dataset>/<name>/sample`."""
    folder = dataset.parent / name
    words: list[str | Path] = [word for pair in FAMILIES[family].items() for word in pair]
    words += ["--dataset_config", dataset, "--tokenizer_cache_dir", TOKENIZERS, "--network_dim", "2", "--seed", "7"]
    words += ["--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_steps", "2", "--cache_latents"]
    if "--max_data_loader_n_workers" not in arguments:
        words += ["--max_data_loader_n_workers", "0"]
    run_script(f"{family}_train_network", *words, *arguments, "--output_dir", folder, "--output_name", "run")
    return load_file(folder / "run.safetensors")


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second) and any(value.any() for key, value in first.items() if "lora_up" in key)
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=1e-4, atol=1e-6), key


def assert_same_samples(dataset: Path, first: str, second: str) -> None:
    """Both runs drew the same images."""
    one, other = (
        sorted((dataset.parent / name / "sample").glob("*.png"), key=lambda path: path.stem.split("_")[-1])
        for name in (first, second)
    )
    assert one
    for picture, copy in zip(one, other, strict=True):
        assert difference(picture, copy) <= 1


def write_prompts(dataset: Path, *lines: str) -> list[str | Path]:
    """The options for sample images of these prompts at the start and the end of a run."""
    path = dataset.parent / "prompts.txt"
    path.write_text("".join(f"{line} --w 64 --h 64 --s 1\n" for line in lines), encoding="utf-8")
    return ["--sample_prompts", path, "--sample_every_n_steps", "2"]


# --- a run with cached text is a run without ------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_training_is_training(family: str, dataset: Path) -> None:
    prompts = write_prompts(dataset, "a (cat:1.2) --n ugly --l 3 --d 1", "a dog --l 1 --d 2")
    live = train(family, dataset, "live", UNET_ONLY, *prompts)
    assert_equal(live, train(family, dataset, "memory", UNET_ONLY, CACHE, *prompts))
    assert not list(dataset.parent.glob("pictures/*.npz"))
    assert_equal(live, train(family, dataset, "disk", UNET_ONLY, TO_DISK, "--max_data_loader_n_workers", "1"))
    assert len(list(dataset.parent.glob("pictures/*.npz"))) == 3
    assert_same_samples(dataset, "live", "memory")


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_changes_nothing_of_that(family: str, dataset: Path) -> None:
    live = train(family, dataset, "live", UNET_ONLY, "--mixed_precision", "bf16")
    assert_equal(live, train(family, dataset, "cached", UNET_ONLY, "--mixed_precision", "bf16", TO_DISK))


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_trained_encoders_stay_live_beside_cached_ones(family: str, dataset: Path) -> None:
    prompts = write_prompts(dataset, "a cat --n ugly --l 3 --d 1")
    live = train(family, dataset, "live", *prompts)
    assert any("lora_te1" in key and value.any() for key, value in live.items() if "lora_up" in key)
    assert_equal(live, train(family, dataset, "cached", CACHE, *prompts))
    assert_same_samples(dataset, "live", "cached")


def test_weighted_captions_are_cached_with_their_weights(dataset: Path) -> None:
    (dataset.parent / "pictures" / "a0.txt").write_text("a (red:1.4) cat", encoding="utf-8")
    live = train("sdxl", dataset, "live", UNET_ONLY, "--weighted_captions")
    assert_equal(live, train("sdxl", dataset, "cached", UNET_ONLY, "--weighted_captions", TO_DISK))


def test_files_serve_the_next_run_with_the_same_encoders(dataset: Path, tmp_path: Path) -> None:
    first = train("flux", dataset, "first", UNET_ONLY, TO_DISK)
    files = sorted(dataset.parent.glob("pictures/*_flux_te.npz"))
    written = [path.stat().st_mtime_ns for path in files]
    assert len(written) == 3
    assert_equal(first, train("flux", dataset, "second", UNET_ONLY, TO_DISK))
    assert [path.stat().st_mtime_ns for path in files] == written
    changed = {key: value * 1.5 for key, value in load_file(ENCODERS["--t5xxl"]).items()}
    save_file(changed, tmp_path / "t5.safetensors")
    train("flux", dataset, "third", UNET_ONLY, TO_DISK, "--t5xxl", tmp_path / "t5.safetensors")
    assert all(path.stat().st_mtime_ns > before for path, before in zip(files, written, strict=True))


# --- one batch ------------------------------------------------------------------------------------------------
def load(name: str, dtype: torch.dtype = torch.float32, **values: object) -> ModelFamily:
    """The tiny family `name`, loaded."""
    options = {option.removeprefix("--"): str(value) for option, value in FAMILIES[name].items()}
    script = importlib.import_module(f"{name}_train_network").SCRIPT
    options = make_options(**{"tokenizer_cache_dir": str(TOKENIZERS), **options, **values})
    family = launch.resolve(script.family)(options)
    assert family.check_options() == []
    family.load(weight_dtype=dtype, vae_dtype=dtype, device="cpu")
    return family


CASES = [
    ("sdxl", torch.float32, {}), ("sdxl", torch.bfloat16, {"max_token_length": 150}),
    ("flux", torch.float32, {"apply_t5_attn_mask": True}), ("flux", torch.bfloat16, {}),
    ("sd3", torch.float32, {"apply_lg_attn_mask": True, "apply_t5_attn_mask": True}), ("sd3", torch.bfloat16, {}),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype", "values"), CASES, ids=lambda part: str(part))
def test_conditioning_from_a_file_is_the_live_one(
    name: str, dtype: torch.dtype, values: dict[str, object], tmp_path: Path
) -> None:
    family, captions = load(name, dtype, **values), ["a cat", "", "a dog, " * 30]
    trained = [False] * len(family.text_encoders)
    tokens, spec = family.tokenize(captions), family.text_cache
    live, outputs = family.encode_text(tokens), family.encode_text_for_cache(tokens)
    stored = []
    for row, caption in enumerate(captions):
        entry = TextEntry(tmp_path / f"{row}{spec.suffix}", caption, family.text_identity)
        rows = {name: array[row] for name, array in outputs.items()}
        write(entry, spec, rows)
        assert check(entry, spec, rows) == (State.VALID, "")
        stored.append(read(entry, spec))
    batch = {name: torch.stack([arrays[name] for arrays in stored]) for name in spec.arrays}
    assert all(array.dtype == torch.float32 for array in batch.values())
    family.release_text_encoders(family.cached_text_encoders(trained))
    cached = family.encode_text({}, batch)
    assert family.text_encoders == [None] * len(trained) and set(cached.tensors) == set(live.tensors)
    for part, value in live.tensors.items():
        assert cached[part].dtype == value.dtype
        assert torch.allclose(cached[part].float(), value.float(), atol=1e-6), part


# --- prompts of sample images ---------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(("name", "trained"), [("sdxl", []), ("flux", []), ("flux", [0]), ("sd3", [0])])
def test_kept_prompts_are_encoded_as_before(name: str, trained: list[int]) -> None:
    family = load(name)
    released = family.cached_text_encoders([index in trained for index in range(len(family.text_encoders))])
    kept = KeptPrompts(family, keeps_encoders=not all(released))
    kept.keep(["a cat"], ["ugly"], clip_skip=None)
    before = family.encode_prompts(["a cat"], ["ugly"], clip_skip=None)
    family.release_text_encoders(released)
    for one, other in zip(before, kept(["a cat"], ["ugly"]), strict=True):
        assert set(one.tensors) == set(other.tensors)
        assert all(torch.equal(value, other[part]) for part, value in one.tensors.items())
    for index in trained:  # what training changes shows in later samples
        for parameter in family.text_encoders[index].parameters():
            parameter.data.mul_(1.1)
        positive, _ = kept(["a cat"], ["ugly"])
        assert any(not torch.allclose(value, positive[part]) for part, value in before[0].tensors.items())
    with pytest.raises(ValueError, match="this prompt was not in the file when training began"):
        kept(["a dog"], ["ugly"])


def test_prompts_added_during_training_are_skipped_with_the_reason(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import Accelerator

    _, path, *_ = write_prompts(dataset, "a cat --l 1 --d 1")
    family = load(
        "flux", sample_prompts=str(path), sample_every_n_steps=1, output_dir=str(dataset.parent), output_name="run"
    )
    sampler = TrainingSampler(family.options, accelerator=Accelerator(cpu=True))
    released = family.cached_text_encoders([False, False])
    sampler.prepare(family, released)
    family.release_text_encoders(released)
    write_prompts(dataset, "a dog --l 1 --d 1", "a cat --l 1 --d 5")
    with caplog.at_level(logging.WARNING):
        files = sampler.draw(family, epoch=None, step=1)
    assert [path.stem.split("_")[-1] for path in files] == ["5"]
    (message,) = [record.message for record in caplog.records if "Sample image skipped" in record.message]
    assert "line 1: this prompt was not in the file when training began" in message


# --- refusals before anything is loaded -----------------------------------------------------------------------
REFUSALS = {
    "sdxl, encoders trained": ("sdxl", [CACHE], "cached text encoders cannot be trained"),
    "flux, T5 trained": ("flux", [CACHE, "--network_args", "train_t5xxl=True"], "T5 is trained"),
    "shuffled captions": ("flux", [CACHE, "SHUFFLE"], "cannot be combined with shuffle_caption ("),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_models_load(
    case: str, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, arguments, message = REFUSALS[case]
    if "SHUFFLE" in arguments:
        text = dataset.read_text("utf-8").replace("[general]", "[general]\nshuffle_caption = true")
        dataset.write_text(text, encoding="utf-8")
    script = importlib.import_module(f"{family}_train_network").SCRIPT
    monkeypatch.setattr(launch.resolve(script.family), "load", lambda *_, **__: pytest.fail("models were loaded"))
    with pytest.raises(SystemExit) as caught:
        train(family, dataset, "refused", *[word for word in arguments if word != "SHUFFLE"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "SHUFFLE" not in arguments or "dataset.toml, datasets[0].subsets[0]" in errors
