"""The caching tools: files that training then uses as they are, for every family; several processes; mistakes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from library import tool_launch
from library.config_schema import SubsetConfig
from library.data.cache import CacheOptions, cache_latents
from tests.golden import FOLDER
from tests.picture_folder import SPEC, dataset_config, encode, group_of, records_of, save_pictures
from tests.training import TOKENIZERS, run_script, write_config

MODELS = FOLDER / "models"
MODEL = "--pretrained_model_name_or_path"
ENCODERS: list[str | Path] = [
    "--clip_l", MODELS / "clip_l_tiny.safetensors", "--t5xxl", MODELS / "t5xxl_tiny.safetensors",
]  # fmt: skip
CLIP_G: list[str | Path] = ["--clip_g", MODELS / "clip_g_tiny.safetensors"]
AE: list[str | Path] = ["--ae", MODELS / "flux_ae_tiny.safetensors"]
#: family -> its switch, what latents need, what texts need, the script that trains and its network
FAMILIES: dict[str, tuple[list[str | Path], list[str | Path], list[str | Path], str, str]] = {
    "sd": ([], [MODEL, MODELS / "sd1_tiny.safetensors"], [], "train_network", "networks.lora"),
    "sdxl": (
        ["--sdxl"], [MODEL, MODELS / "sdxl_tiny.safetensors"], [MODEL, MODELS / "sdxl_tiny.safetensors"],
        "sdxl_train_network", "networks.lora",
    ),
    "flux": (
        ["--flux"], AE, [MODEL, MODELS / "flux_tiny.safetensors", *ENCODERS], "flux_train_network",
        "networks.lora_flux",
    ),
    "sd3": (
        ["--sd3"], [MODEL, MODELS / "sd3_tiny.safetensors"],
        [MODEL, MODELS / "sd3_tiny.safetensors", *ENCODERS, *CLIP_G], "sd3_train_network", "networks.lora_sd3",
    ),
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three small pictures with captions, and the dataset file that names them."""
    pictures = save_pictures(tmp_path / "pictures", [(128, 128), (128, 128), (256, 128)])
    for picture, caption in zip(pictures, ("a red cat", "a blue dog on a mat", "!"), strict=True):
        picture.with_suffix(".txt").write_text(caption, encoding="utf-8")
    path = write_config(tmp_path, pictures[0].parent, subset="flip_aug = true")
    path.write_text(path.read_text("utf-8").replace("resolution = 192", "resolution = 128"), encoding="utf-8")
    return path


def files(dataset: Path) -> dict[str, int]:
    """Cache file -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((dataset.parent / "pictures").glob("*.npz"))}


def run(tool: str, dataset: Path, *words: str | Path) -> None:
    run_script(f"tools.{tool}", "--dataset_config", dataset, "--tokenizer_cache_dir", TOKENIZERS, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"), [("sd", "no"), ("sdxl", "no"), ("flux", "bf16"), ("sd3", "no")]
)
def test_training_afterwards_encodes_nothing(
    family: str, precision: str, dataset: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    switch, latents, texts, script, network = FAMILIES[family]
    words: list[str | Path] = ["--mixed_precision", precision]
    run("cache_latents", dataset, *switch, *latents, *words)
    assert "latents: 3 encoded" in capsys.readouterr().out
    caching: list[str | Path] = ["--cache_latents_to_disk"]
    if texts:
        run("cache_text_encoder_outputs", dataset, *switch, *texts, *words)
        assert "text-encoder outputs: 3 encoded" in capsys.readouterr().out
        caching.append("--cache_text_encoder_outputs_to_disk")
    written = files(dataset)
    assert len(written) == (6 if texts else 3)
    with caplog.at_level(logging.INFO):
        run_script(
            script, "--dataset_config", dataset, "--tokenizer_cache_dir", TOKENIZERS, *(texts or latents),
            *(AE if family == "flux" else []), *caching, "--network_module", network, "--network_dim", "2",
            "--network_train_unet_only", "--max_train_steps", "1", "--learning_rate", "1", "--seed", "1",
            "--max_data_loader_n_workers", "0", "--output_dir", dataset.parent / "out", *words,
        )  # fmt: skip
    assert files(dataset) == written
    assert "latents: 0 encoded (0 of them replace stale or damaged entries), 3 reused" in caplog.text
    assert not texts or "text-encoder outputs: 0 encoded" in caplog.text
    assert (dataset.parent / "out").is_dir()


def test_second_run_of_the_tools_changes_nothing(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    switch, latents, texts, _, _ = FAMILIES["sdxl"]
    for _ in range(2):
        run("cache_latents", dataset, *switch, *latents)
        run("cache_text_encoder_outputs", dataset, *switch, *texts)
        written = files(dataset)
    assert "latents: 0 encoded (0 of them replace stale or damaged entries), 3 reused" in capsys.readouterr().out
    assert files(dataset) == written


MISTAKES = {
    "texts of Stable Diffusion 1": (
        "cache_text_encoder_outputs", FAMILIES["sd"][1], "cannot be cached: give --sdxl, --flux or --sd3",
    ),
    "two families": ("cache_latents", ["--sdxl", "--flux", *AE], "--sdxl and --flux exclude each other"),
    "another family's model": (
        "cache_latents", [MODEL, MODELS / "sdxl_tiny.safetensors"], "looks like an SDXL checkpoint",
    ),
    "no model": ("cache_latents", ["--sdxl"], "--pretrained_model_name_or_path is missing"),
    "weights for T5": (
        "cache_text_encoder_outputs", ["--flux", *FAMILIES["flux"][2], "--weighted_captions"], "--weighted_captions",
    ),
    "8-bit T5": (
        "cache_text_encoder_outputs", ["--flux", *FAMILIES["flux"][2], "--t5xxl_dtype", "fp8"], "--t5xxl_dtype fp8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, words, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        run(tool, dataset, *words)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert files(dataset) == {}


def test_options_of_training_are_said_to_mean_nothing(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("cache_latents", dataset, *FAMILIES["sd"][1], "--max_train_steps", "5", "--skip_existing")
    assert "mean nothing for caching: --max_train_steps." in caplog.text and "--skip_existing has no" in caplog.text


# --- prepared buckets -----------------------------------------------------------------------------------------
def prepare(*words: str | Path) -> None:
    from finetune.prepare_buckets_latents import TOOL

    tool_launch.main(TOOL, [str(word) for word in words])


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    save_pictures(tmp_path / "pictures", [(128, 128), (200, 140), (256, 64)])
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"a0": {"caption": "é", "extra": 1}, "a1": {}}), encoding="utf-8")
    return path


SMALL = "--max_resolution 128,128 --min_bucket_reso 64 --max_bucket_reso 256 --bucket_reso_steps 64".split()


@pytest.mark.parametrize("model", ["sd1_tiny.safetensors", "flux_ae_tiny.safetensors"])
def test_prepared_latents_train(
    model: str, metadata: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pictures, prepared = metadata.parent / "pictures", metadata.parent / "out.json"
    if model.startswith("flux"):
        with pytest.raises(SystemExit):
            prepare(pictures, metadata, prepared, MODELS / model, *SMALL)
        assert "16 latent channels" in capsys.readouterr().err
        return
    prepare(pictures, metadata, prepared, MODELS / model, "--flip_aug", "--alpha_mask", *SMALL)
    written = json.loads(prepared.read_text("ascii"))
    assert written["a0"] == {"caption": "é", "extra": 1, "train_resolution": [128, 128]}
    assert set(written) == {"a0", "a1", "a2"} and written["a2"]["train_resolution"] == [256, 64]
    with np.load(pictures / "a2.npz") as file:
        assert set(file.files) == {
            "latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask", "identity"
        }
        assert file["latents"].shape == (4, 8, 32) and file["alpha_mask"].shape == (64, 256)
    output = capsys.readouterr().out
    assert "bucket 256x64: 1 image(s)" in output and "mean error of the aspect ratio" in output
    before = {path: path.stat().st_mtime_ns for path in pictures.glob("*.npz")}
    with caplog.at_level(logging.INFO):
        run_script(
            "fine_tune", MODEL, MODELS / model, "--tokenizer_cache_dir", TOKENIZERS, "--in_json", prepared,
            "--train_data_dir", pictures, "--resolution", "128,128", "--enable_bucket", "--min_bucket_reso", "64",
            "--max_bucket_reso", "256", "--bucket_reso_steps", "64", "--cache_latents_to_disk", "--max_train_steps",
            "1", "--seed", "1", "--output_dir", metadata.parent / "trained", "--max_data_loader_n_workers", "0",
        )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in pictures.glob("*.npz")} == before
    assert "latents: 0 encoded (0 of them replace stale or damaged entries), 3 reused" in caplog.text


def test_existing_files_are_kept_when_asked(metadata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [metadata.parent / "pictures", metadata, metadata.parent / "out.json", MODELS / "sd1_tiny.safetensors"]
    encoded = []
    for option in ([], [], ["--skip_existing"]):
        prepare(*words, *SMALL, *option)
        encoded.append(capsys.readouterr().out.split("latents: ")[1].split()[0])
    assert encoded == ["3", "3", "0"]


def test_sub_folders_need_whole_paths(metadata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, model = metadata.parent / "pictures", MODELS / "sd1_tiny.safetensors"
    save_pictures(pictures / "more", [(64, 64)])
    with pytest.raises(SystemExit) as stop:
        prepare(pictures, metadata, metadata.parent / "out.json", model, "--recursive", *SMALL)
    assert stop.value.code == 2 and "--recursive needs --full_path" in capsys.readouterr().err
    prepare(pictures, metadata, metadata.parent / "out.json", model, "--recursive", "--full_path", *SMALL)
    assert (pictures / "more" / "a0.npz").is_file()
    assert str(pictures / "more" / "a0.png") in json.loads((metadata.parent / "out.json").read_text("ascii"))


# --- several processes ----------------------------------------------------------------------------------------
def test_unfinished_files_of_other_processes_are_left_alone(tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path, [(64, 64)] * 4)
    options = CacheOptions(to_disk=True, vae_identity="vae")
    for rank in range(3):
        target = group_of((dataset_config(SubsetConfig(), resolution=(64, 64)), records_of(pictures)))
        cache_latents(target, encode, spec=SPEC, options=options, rank=rank, world_size=3)
    assert len(list(tmp_path.glob("*.npz"))) == 4 and not list(tmp_path.glob(".*"))
