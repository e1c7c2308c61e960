"""`sd3_train_network.py` and `sd3_train.py` from command line to files, on one picture and the tiny model."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.sd3_tiny import FILES
from tests.training import run_script

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "1_boat"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "boat.png")
    (folder / "boat.txt").write_text("a small boat on the lake")
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    return folder


def train(script: str, folder: Path, *further: str, steps: int = 2) -> Path:
    """Run the script on the pictures in `folder`; returns the output folder."""
    out = folder.parent.parent / "out"
    words: dict[str, object] = {
        **FILES, "train_data_dir": folder.parent, "resolution": 64, "caption_extension": ".txt", "output_dir": out,
        "output_name": "run", "max_train_steps": steps, "learning_rate": "1e-2", "seed": 1,
        "max_data_loader_n_workers": 0,
    }  # fmt: skip
    run_script(script, *(str(word) for name, value in words.items() for word in (f"--{name}", value)), *further)
    return out


def changed(path: Path, source: str, prefix: str = "") -> set[str]:
    """Keys whose values differ from the tiny file's."""
    before: dict[str, Tensor] = load_file(FILES[source])
    after = load_file(path)
    assert after.keys() == before.keys()
    return {key for key in after if key.startswith(prefix) and not torch.equal(after[key].float(), before[key].float())}


def test_a_network_trains_with_cached_text_and_draws_samples(picture, caplog):
    with caplog.at_level(logging.WARNING):
        out = train(
            "sd3_train_network", picture, "--network_module", "networks.lora_sd3", "--network_dim", "2",
            "--cache_latents", "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk",
            "--network_train_unet_only", "--gradient_checkpointing", "--noise_offset", "0.1", "--save_clip",
            "--sample_prompts", str(picture.parent.parent / "prompts.txt"), "--sample_every_n_steps", "2",
            "--weighting_scheme", "logit_normal",
        )  # fmt: skip
    assert "--noise_offset has no effect" in caplog.text and "--save_clip has no effect" in caplog.text
    assert len(list((out / "sample").glob("*.png"))) == 1
    with np.load(picture / "boat_sd3_te.npz") as file:
        assert {"lg_out", "t5_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask",
                "apply_lg_attn_mask", "apply_t5_attn_mask"} <= set(file)  # fmt: skip
        assert file["lg_out"].shape == (77, 192) and file["t5_out"].shape == (256, 256)
    with safe_open(out / "run.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert any(file.get_tensor(key).any() for key in keys if key.endswith("lora_up.weight"))
    assert all(key.startswith("lora_unet_joint_blocks_") for key in keys)
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-large/lora"
    assert metadata["ss_base_model_version"] == "5-large"
    assert metadata["ss_weighting_scheme"] == "logit_normal"


def test_a_network_trains_both_clips_live_while_t5_is_cached(picture):
    out = train(
        "sd3_train_network", picture, "--network_module", "networks.lora_sd3", "--network_dim", "2",
        "--cache_text_encoder_outputs", "--clip_l_dropout_rate", "0.5", "--sample_at_first", "--sample_prompts",
        str(picture.parent.parent / "prompts.txt"),
    )  # fmt: skip
    trained = {key for key, value in load_file(out / "run.safetensors").items() if "lora_up" in key and value.any()}
    assert {key[:8] for key in trained} == {"lora_te1", "lora_te2", "lora_une"}
    assert len(list((out / "sample").glob("*.png"))) == 1


def test_full_training_leaves_frozen_blocks_alone_and_rotates_encoders_with_the_model(picture):
    out = train(
        "sd3_train", picture, "--train_text_encoder", "--use_t5xxl_cache_only", "--num_last_block_to_freeze", "1",
        "--learning_rate_te1", "0", "--save_every_n_steps", "1", "--save_last_n_steps", "1", steps=3,
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        f"{stem}{end}.safetensors"
        for stem in ("run", "run-step00000002", "run-step00000003")
        for end in ("", "_clip_l", "_clip_g")
    }
    moved = changed(out / "run.safetensors", "pretrained_model_name_or_path")
    assert "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight" in moved
    assert "model.diffusion_model.joint_blocks.2.context_block.attn.qkv.weight" in moved
    assert not any(".joint_blocks.2.x_block." in key or key.startswith("first_stage_model.") for key in moved)
    assert "model.diffusion_model.pos_embed" not in moved
    assert changed(out / "run_clip_l.safetensors", "clip_l") == set()
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in changed(out / "run_clip_g.safetensors", "clip_g")


def test_t5_trains_on_request_and_everything_can_be_saved_as_a_folder(picture):
    out = train(
        "sd3_train", picture, "--train_text_encoder", "--train_t5xxl", "--save_model_as", "diffusers",
        "--use_safetensors", "--t5xxl_max_token_length", "32",
    )  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["run"]
    assert changed(out / "run" / "text_encoder_3" / "model.safetensors", "t5xxl")
    assert (out / "run" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("sd3_train", ("--train_t5xxl",), "--train_t5xxl needs --train_text_encoder"),
        ("sd3_train", ("--train_text_encoder", "--cache_text_encoder_outputs"), "cannot be combined"),
        ("sd3_train", ("--train_text_encoder", "--train_t5xxl", "--use_t5xxl_cache_only"), "cannot be combined"),
        ("sd3_train_network", ("--network_module", "networks.lora_sd3", "--weighted_captions"), "--weighted_captions"),
        ("sd3_train_network", ("--network_module", "networks.lora_sd3", "--cache_text_encoder_outputs",
                               "--network_args", "train_t5xxl=True"), "train_t5xxl"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_work_end_with_one_sentence(picture, capsys, script, words, said):
    with pytest.raises(SystemExit) as caught:
        train(script, picture, *words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
