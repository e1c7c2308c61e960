"""SDXL through its entry scripts: networks with live and cached text, full training, LyCORIS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.sdxl_tiny import MODEL, sdxl_family
from tests.test_third_party_networks import lycoris_presets  # noqa: F401 (a fixture)
from tests.training import PHOTOS, TOKENIZERS, run_script, write_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path, Path(shutil.copytree(PHOTOS, tmp_path / "photos")))


def train(script: str, config: Path, *arguments: str | Path) -> Path:
    """Two steps with the given options on top of small defaults; returns the output folder."""
    folder = config.parent / "out"
    run_script(
        script, "--pretrained_model_name_or_path", MODEL, "--tokenizer_cache_dir", TOKENIZERS, "--dataset_config",
        config, "--max_data_loader_n_workers", "0", "--seed", "42", "--learning_rate", "1e-3", "--max_train_steps", "2",
        "--output_dir", folder, "--output_name", "run", *arguments,
    )  # fmt: skip
    return folder


LORA = ("--network_module", "networks.lora", "--network_dim", "2")


@pytest.mark.slow
def test_a_network_for_all_parts_trains_and_draws_samples(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.3) cat --w 64 --h 64 --s 2 --d 1\n")
    folder = train(
        "sdxl_train_network", config, *LORA, "--sample_prompts", prompts, "--sample_every_n_steps", "2",
        "--gradient_checkpointing", "--cache_latents",
    )  # fmt: skip
    saved = load_file(folder / "run.safetensors")
    for prefix in ("lora_te1_text_model_encoder_layers_0", "lora_te2_text_model_encoder_layers_1", "lora_unet_input_"):
        ups = [value for key, value in saved.items() if key.startswith(prefix) and "lora_up" in key]
        assert ups and any(value.abs().max() > 0 for value in ups), prefix
    with safe_open(folder / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    [sample] = (folder / "sample").iterdir()
    with Image.open(sample) as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_cached_text_trains_as_live_text(config):
    arguments = (*LORA, "--network_train_unet_only", "--cache_latents")
    live = load_file(train("sdxl_train_network", config, *arguments) / "run.safetensors")
    cached = load_file(
        train("sdxl_train_network", config, *arguments, "--cache_text_encoder_outputs_to_disk") / "run.safetensors"
    )
    assert set(live) == set(cached) and not any("lora_te" in key for key in live)
    assert any(value.abs().max() > 0 for key, value in cached.items() if "lora_up" in key)
    assert all(torch.allclose(cached[key], live[key], atol=1e-5) for key in live)
    assert len(list((config.parent / "photos").glob("*_te_outputs.npz"))) == len(list(PHOTOS.glob("*.txt")))


def test_cached_text_and_a_trained_encoder_are_refused(config, capsys):
    with pytest.raises(SystemExit) as stop:
        train("sdxl_train_network", config, *LORA, "--cache_text_encoder_outputs", "--cache_latents")
    assert stop.value.code == 2
    assert "--network_train_unet_only" in capsys.readouterr().err


@pytest.mark.slow
def test_full_training_of_all_parts_gives_a_model_that_loads(config):
    folder = train(
        "sdxl_train", config, "--train_text_encoder", "--learning_rate_te1", "1e-3", "--learning_rate_te2", "0",
        "--save_model_as", "safetensors", "--save_precision", "fp16", "--cache_latents",
    )  # fmt: skip
    saved, source = load_file(folder / "run.safetensors"), load_file(MODEL)
    assert set(source) - set(saved) == set() and all(value.dtype == torch.float16 for value in saved.values())
    changed = {key for key in source if not torch.equal(saved[key], source[key].half())}
    assert any(key.startswith("conditioner.embedders.0.transformer.text_model.encoder.layers.0") for key in changed)
    assert any(key.startswith("model.diffusion_model.input_blocks.4") for key in changed)
    assert not any(key.startswith(("conditioner.embedders.1", "first_stage_model")) for key in changed)
    assert not any("embedders.0" in key and ("layers.2." in key or "final_layer_norm" in key) for key in changed)
    sdxl_family(folder / "run.safetensors")


@pytest.mark.slow
def test_block_learning_rates_train_only_their_blocks_also_with_cached_text(config):
    rates = ["0"] * 23
    rates[0], rates[5], rates[22] = "1e-3", "2e-3", "1e-3"
    folder = train(
        "sdxl_train", config, "--block_lr", ",".join(rates), "--save_model_as", "diffusers", "--use_safetensors",
        "--cache_text_encoder_outputs", "--cache_latents",
    )  # fmt: skip
    saved, source_family = sdxl_family(folder / "run"), sdxl_family()
    for one, other in zip(saved.text_encoders, source_family.text_encoders, strict=True):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    trained, source = saved.denoiser.state_dict(), source_family.denoiser.state_dict()
    changed = {key for key in source if not torch.equal(trained[key], source[key])}
    places = {".".join(key.split(".")[: 2 if "_blocks" in key else 1]) for key in changed}
    assert places == {"time_embed", "label_emb", "input_blocks.4", "out"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_lycoris_trains_all_parts_under_the_usual_names(algorithm, lycoris_presets, config):  # noqa: F811
    folder = train(
        "sdxl_train_network", config, "--network_module", "lycoris.kohya", "--network_dim", "4", "--network_alpha", "2",
        "--network_args", f"algo={algorithm}", "factor=4", "--cache_latents",
    )  # fmt: skip
    saved = load_file(folder / "run.safetensors")
    modules = {key.partition(".")[0] for key in saved}
    counts = [sum(name.startswith(prefix) for name in modules) for prefix in ("lora_te1_", "lora_te2_", "lora_unet_")]
    assert counts[:2] == [18, 18] and counts[2] > 100
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in modules
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in modules
    trained = "lora_up" if algorithm == "lora" else "lokr_w"
    assert any(value.abs().max() > 0 for key, value in saved.items() if trained in key)
