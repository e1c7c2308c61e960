"""The whole script on real photographs and the tiny model: what users do, and what the files then hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.training import PHOTOS, train, write_config


@pytest.fixture
def photos(tmp_path) -> Path:
    """The photographs in a folder of their own (caches are written beside images)."""
    return Path(shutil.copytree(PHOTOS, tmp_path / "photos"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_equal_files(first: Path, second: Path) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different[:3]


def assert_finite_and_trained(path: Path) -> None:
    tensors = load_file(path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_up" in key)


AUGMENTATION = """flip_aug = true
shuffle_caption = true
caption_dropout_rate = 0.3
token_warmup_min = 1
token_warmup_step = 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", ["", AUGMENTATION])
def test_a_resumed_run_equals_the_straight_run_bit_for_bit(augmentation, photos, tmp_path):
    """Pyramid noise draws from Python's generator, the warm-up of tokens depends on the step."""
    config = write_config(tmp_path, photos, general=augmentation)
    for caption in photos.glob("*.txt"):
        caption.write_text(", ".join(f"{caption.stem} {number}" for number in range(8)), encoding="utf-8")
    common = ["--dataset_config", config, "--cache_latents", "--network_dropout", "0.1", "--lr_scheduler", "cosine",
              "--gradient_accumulation_steps", "2"]
    common += ["--multires_noise_iterations", "3"] if augmentation else []
    straight = train(*common, "--max_train_steps", "5", "--save_state", "--save_every_n_steps", "3",
                     output_dir=tmp_path / "straight")
    state = tmp_path / "straight" / "run-step00000003-state"
    shutil.move(state, tmp_path / "moved-state")
    resumed = train(*common, "--max_train_steps", "5", "--resume", tmp_path / "moved-state",
                    output_dir=tmp_path / "resumed")
    assert_equal_files(straight, resumed)


@pytest.mark.slow
def test_latents_cached_on_disk_in_memory_and_not_at_all_train_alike(photos, tmp_path, capfd):
    config = write_config(tmp_path, photos)
    common = ["--dataset_config", config, "--max_train_epochs", "2", "--save_every_n_epochs", "1"]
    disk = train(*common, "--cache_latents", "--cache_latents_to_disk", output_dir=tmp_path / "disk")
    assert (tmp_path / "disk" / "run-000001.safetensors").is_file()
    caches = sorted(path.name for path in photos.glob("*_sd.npz"))
    assert caches == ["astronaut_0288x0220_sd.npz", "cat_0300x0200_sd.npz", "coffee_0200x0133_sd.npz",
                      "galaxies_0200x0200_sd.npz", "rocket_0180x0256_sd.npz"]
    again = train(*common, "--cache_latents_to_disk", output_dir=tmp_path / "again")
    memory = train(*common, "--cache_latents", output_dir=tmp_path / "memory")
    for path in (disk, again, memory, train(*common, output_dir=tmp_path / "plain")):
        assert_finite_and_trained(path)
    lines = capfd.readouterr().out.splitlines()
    assert "epoch 1/2" in lines and "epoch 2/2" in lines
    assert f"saving checkpoint: {disk}" in lines


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer_type", "AdamW8bit", "--gradient_checkpointing"],
        ["--optimizer_type", "Adafactor", "--network_train_unet_only"],
        ["--mixed_precision", "bf16", "--full_bf16", "--save_precision", "bf16"],
        ["--mixed_precision", "bf16", "--network_args", "conv_dim=2", "conv_alpha=1", "loraplus_lr_ratio=4"],
        ["--network_train_text_encoder_only", "--text_encoder_lr", "5e-4", "--clip_skip", "2"],
        ["--min_snr_gamma", "5", "--noise_offset", "0.05", "--ip_noise_gamma", "0.1",
         "--multires_noise_iterations", "4"],
        ["--scale_weight_norms", "0.01", "--max_token_length", "150", "--weighted_captions"],
        ["--loss_type", "smooth_l1", "--huber_schedule", "exponential", "--lr_scheduler", "polynomial",
         "--lr_warmup_steps", "25%", "--optimizer_type", "SGDNesterov"],
        ["--optimizer_type", "AdamWScheduleFree", "--max_grad_norm", "0", "--lowram", "--no_half_vae"],
    ],
    ids=lambda options: options[1] if options[0] == "--optimizer_type" else options[0],
)  # fmt: skip
def test_option_combinations_train(options, photos, tmp_path):
    config = write_config(tmp_path, photos)
    path = train("--dataset_config", config, "--max_train_steps", "2", *options, output_dir=tmp_path)
    assert_finite_and_trained(path)
    tensors = load_file(path)
    has_text = any(key.startswith("lora_te_text_model_encoder_layers_") for key in tensors)
    has_unet = any(key.startswith("lora_unet_down_blocks_") for key in tensors)
    assert has_text == ("--network_train_unet_only" not in options)
    assert has_unet == ("--network_train_text_encoder_only" not in options)
    if "--save_precision" in options:
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_plain_folders_with_class_tokens_and_regularisation_images(photos, tmp_path):
    for folder in ("train/3_sks cat", "train/1_rocket", "reg/1_cat"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(photos / "cat.jpg", tmp_path / "train" / "3_sks cat")
    shutil.copy(photos / "rocket.jpg", tmp_path / "train" / "1_rocket")
    shutil.copy(photos / "coffee.png", tmp_path / "reg" / "1_cat")
    path = train("--train_data_dir", tmp_path / "train", "--reg_data_dir", tmp_path / "reg", "--resolution", "128",
                 "--train_batch_size", "2", "--prior_loss_weight", "0.5", "--max_train_epochs", "1",
                 output_dir=tmp_path / "out")
    saved = metadata_of(path)
    assert json.loads(saved["ss_dataset_dirs"]) == {
        "1_rocket": {"n_repeats": 1, "img_count": 1}, "3_sks cat": {"n_repeats": 3, "img_count": 1},
    }
    assert json.loads(saved["ss_reg_dataset_dirs"])["1_cat"]["img_count"] == 1
    assert json.loads(saved["ss_tag_frequency"])["3_sks cat"] == {"sks cat": 1}
    assert (saved["ss_resolution"], saved["ss_num_reg_images"]) == ("(128, 128)", "4")


@pytest.mark.slow
def test_sample_images_are_drawn_and_do_not_change_the_training(photos, tmp_path):
    config = write_config(tmp_path, photos)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 128 --h 64 --s 2 --d 7 --l 3 --n rocket\n# no\n(coffee:1.2) --w 64 --h 64 --s 2\n")
    common = ["--dataset_config", config, "--max_train_steps", "4", "--cache_latents"]
    plain = train(*common, output_dir=tmp_path / "plain")
    sampled = train(*common, "--sample_prompts", prompts, "--sample_every_n_steps", "2", "--sample_at_first",
                    "--sample_sampler", "euler_a", output_dir=tmp_path / "sampled")
    names = sorted(path.name for path in (tmp_path / "sampled" / "sample").iterdir())
    assert [name[:13] for name in names] == ["run_000002_00", "run_000002_01", "run_000004_00", "run_000004_01",
                                             "run_e000000_0", "run_e000000_0"]
    assert sum(name.endswith("_7.png") for name in names) == 3
    assert_equal_files(plain, sampled)


@pytest.mark.slow
def test_training_goes_on_from_network_weights_and_base_weights_change_the_model(photos, tmp_path):
    config = write_config(tmp_path, photos)
    common = ["--dataset_config", config, "--max_train_steps", "2"]
    first = train(*common, output_dir=tmp_path / "first")
    more = train(*common, "--network_weights", first, "--dim_from_weights", output_dir=tmp_path / "more")
    zero = train(*common, "--network_weights", first, "--learning_rate", "1e-12", output_dir=tmp_path / "same")
    before, after, same = load_file(first), load_file(more), load_file(zero)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.allclose(before[key], same[key], atol=1e-6) for key in before)
    strong = {key: value * 50 if "lora_up" in key else value for key, value in before.items()}
    save_file(strong, tmp_path / "strong.safetensors")
    merged = train(*common, "--base_weights", tmp_path / "strong.safetensors", "--base_weights_multiplier", "0.5",
                   output_dir=tmp_path / "merged")
    assert any(not torch.equal(before[key], load_file(merged)[key]) for key in before)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_whatever_the_number_of_workers(photos, tmp_path):
    config = write_config(tmp_path, photos, general="shuffle_caption = true\nflip_aug = true\nrandom_crop = true")
    common = ["--dataset_config", config, "--max_train_steps", "3"]
    alone = train(*common, output_dir=tmp_path / "none")
    workers = train(*common, "--max_data_loader_n_workers", "2", output_dir=tmp_path / "two")
    assert_equal_files(alone, workers)


@pytest.mark.slow
def test_saved_forms_and_retention(photos, tmp_path):
    config = write_config(tmp_path, photos)
    out = tmp_path / "out"
    train("--dataset_config", config, "--max_train_steps", "4", "--save_model_as", "pt", "--save_every_n_steps", "1",
          "--save_last_n_steps", "1", "--save_state_on_train_end", "--no_metadata", output_dir=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "run-state", "run-step00000003.pt", "run-step00000004.pt", "run.pt",
    ]
    assert all(isinstance(value, torch.Tensor) for value in torch.load(out / "run.pt", weights_only=True).values())


@pytest.mark.slow
def test_tensorboard_gets_the_scalars_that_users_know(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_config(tmp_path, photos)
    train("--dataset_config", config, "--max_train_steps", "3", "--logging_dir", tmp_path / "logs",
          "--log_prefix", "p_", "--unet_lr", "2e-3", "--text_encoder_lr", "1e-4", "--scale_weight_norms", "1",
          output_dir=tmp_path / "out")
    [folder] = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("p_20")
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet", "max_norm/keys_scaled",
        "max_norm/max_key_norm", "norm/avg_key_norm",
    }
    assert [event.step for event in events.Scalars("loss/current")] == [1, 2, 3]
    assert events.Scalars("lr/unet")[0].value == pytest.approx(2e-3)
    assert events.Scalars("lr/textencoder")[0].value == pytest.approx(1e-4)


def test_a_metadata_file_gives_captions_and_tags(photos, tmp_path):
    entries = {"cat": {"caption": "a cat", "tags": "whiskers, looking"}, "rocket.jpg": {"caption": "a rocket"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    path = train("--train_data_dir", photos, "--in_json", tmp_path / "meta.json", "--resolution", "128",
                 "--max_train_steps", "2", output_dir=tmp_path / "out")
    assert_finite_and_trained(path)
    assert json.loads(metadata_of(path)["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 1, "img_count": 2}}


@pytest.mark.slow
def test_mask_images_decide_where_the_loss_counts(photos, tmp_path):
    masks = {"white": 255, "half": None, "black": 0}
    results = {}
    for name, level in masks.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in photos.glob("*.jpg"):
            mask = Image.new("RGB", Image.open(path).size, (level or 0,) * 3)
            if level is None:
                mask.paste((255, 255, 255), (0, 0, mask.width // 2, mask.height))
            mask.save(folder / f"{path.stem}.png")
        images = Path(shutil.copytree(photos, tmp_path / f"images-{name}", ignore=shutil.ignore_patterns("coffee*")))
        config = write_config(tmp_path, images, subset=f"conditioning_data_dir = {str(folder)!r}")
        results[name] = load_file(train("--dataset_config", config, "--masked_loss", "--max_train_steps", "1",
                                        output_dir=tmp_path / f"out-{name}"))
    plain = load_file(train("--dataset_config", write_config(tmp_path, tmp_path / "images-white"),
                            "--max_train_steps", "1", output_dir=tmp_path / "out-plain"))
    ups = [key for key in plain if "lora_up" in key]
    assert all(torch.allclose(plain[key], results["white"][key], atol=1e-6) for key in ups)
    assert any(not torch.allclose(plain[key], results["half"][key], atol=1e-5) for key in ups)
    assert all(results["black"][key].abs().max() == 0 for key in ups)


@pytest.mark.slow
def test_the_environment_of_a_launcher_changes_no_run(photos, tmp_path, monkeypatch, caplog, capfd):
    config = write_config(tmp_path, photos)
    common = ["--dataset_config", config, "--max_train_steps", "9", "--max_train_epochs", "1"]
    plain = train(*common, output_dir=tmp_path / "plain")
    assert "override steps. steps for 1 epochs is: 4" in capfd.readouterr().out
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert_equal_files(plain, train(*common, output_dir=tmp_path / "launched"))
    assert caplog.text.count("ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not used") == 1


@pytest.mark.parametrize("use_cpu", ["", "true"])
def test_fp16_without_a_gpu_is_one_line(use_cpu, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = write_config(tmp_path, photos)
    with pytest.raises(SystemExit) as stop:
        train("--dataset_config", config, "--mixed_precision", "fp16", output_dir=tmp_path)
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--mixed_precision fp16 needs a GPU" in line and "bf16" in line
