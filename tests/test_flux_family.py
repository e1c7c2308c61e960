"""The FLUX family: text, latents, prediction, options, and training through its scripts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library import training_loop
from library.checkpoints.tensors import open_tensors
from library.data.records import Batch
from library.families.flux import Flux
from library.methods.base import LossRecipe, batch_latents
from library.methods.network import NetworkTraining
from library.models.flux import FluxResiduals
from tests.flux_tiny import (
    FILES,
    NOTHING_ELSE,
    SHORT,
    TRANSFORMER,
    dataset,
    flux_family,
    flux_options,
    load,
    prediction,
    problems,
    train_flux,
    without_guidance,
)
from tests.golden import FOLDER


@pytest.fixture(scope="module")
def family() -> Flux:
    """Shared by tests that change nothing."""
    return flux_family(**SHORT)


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    """The tiny model as a Diffusers folder."""
    path = tmp_path_factory.mktemp("flux") / "pipeline"
    family.save(path, layout="diffusers_safetensors", dtype=None, metadata={})
    return path


# --- text ------------------------------------------------------------------------------------------------------
def test_text_equals_that_of_the_diffusers_pipeline(folder):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None)
    prompts = ["a cat girl, best quality", "dog " * 300]
    with torch.no_grad():
        context, pooled, _ = pipeline.encode_prompt(prompts, None, device="cpu", max_sequence_length=512)
    family = flux_family()
    positive, negative = family.encode_prompts(prompts, ["", "bad"])
    assert_close(positive["context"], context, rtol=1e-4, atol=1e-4)
    assert_close(positive["pooled"], pooled, rtol=1e-5, atol=1e-5)
    assert set(positive.tensors) == {"context", "pooled"}
    assert negative["context"].shape == (2, 512, 256)
    assert not torch.allclose(negative["pooled"], positive["pooled"])


def test_length_follows_the_model_unless_an_option_says_otherwise(tmp_path):
    dev = Flux(flux_options())
    schnell = Flux(flux_options(pretrained_model_name_or_path=str(without_guidance(tmp_path))))
    assert (dev.text_length, schnell.text_length) == (512, 256)
    assert Flux(flux_options(**SHORT)).text_length == 24
    assert dev.tokenize(["a"])["t5xxl"].shape == (1, 512)
    assert {key: value.shape for key, value in pickle.loads(pickle.dumps(schnell.tokenize))(["a", "b"]).items()} == {
        "clip_l": (2, 77), "t5xxl": (2, 256), "t5xxl_mask": (2, 256),
    }  # fmt: skip
    assert dev.model_metadata()["architecture"] == "flux-1-dev"
    assert schnell.model_metadata()["architecture"] == "flux-1-schnell"


def test_cached_parts_replace_released_encoders_one_by_one():
    family = flux_family(**SHORT)
    tokens = family.tokenize(["a cat", "girl"])
    with torch.no_grad():
        live = family.encode_text(tokens)
        arrays = {name: value.float() for name, value in family.encode_text_for_cache(tokens).items()}
        spec = family.text_cache
        assert tuple(arrays) == spec.arrays and arrays["txt_ids"].shape == (2, 24, 3)
        assert {name: arrays[name].shape[1] for name in spec.lengths} == dict(spec.lengths)
        clip_l = family.text_encoders[0]
        family.release_text_encoders([False, True])
        mixed = family.encode_text({"clip_l": tokens["clip_l"]}, {k: v for k, v in arrays.items() if k != "l_pooled"})
        family.release_text_encoders([True, True])
        cached = family.encode_text({}, arrays)
    assert clip_l is not None and family.text_encoders == [None, None]
    for name in live.tensors:
        assert torch.equal(mixed[name], live[name]) and torch.equal(cached[name], live[name])
    with pytest.raises(RuntimeError, match="cached outputs are missing: t5_out"):
        family.encode_text({}, {"l_pooled": arrays["l_pooled"]})


def test_t5_is_never_cached_while_it_is_trained():
    family = Flux(flux_options())
    assert family.cached_text_encoders([True, False]) == [False, True]
    assert family.cached_text_encoders([False, False]) == [True, True]
    with pytest.raises(ValueError, match="train_t5xxl"):
        family.cached_text_encoders([True, True])
    arguments = {"network_module": "networks.lora_flux", "network_args": ["train_t5xxl=True"]}
    trained = {
        str(further): NetworkTraining(options := flux_options(**further), Flux(options)).trained_text_encoders()
        for further in ({}, arguments, {"network_train_unet_only": True})
    }
    assert list(trained.values()) == [[True, False], [True, True], [False, False]]


def test_the_attention_mask_hides_padding_from_t5_and_from_the_model(family):
    masked = flux_family(**SHORT, apply_t5_attn_mask=True)
    tokens = masked.tokenize(["a cat"])
    noisy = {**tokens, "t5xxl": torch.where(tokens["t5xxl_mask"] > 0, tokens["t5xxl"], 7)}
    length = int(tokens["t5xxl_mask"].sum())
    with torch.no_grad():
        clean, changed = masked.encode_text(tokens), masked.encode_text(noisy)
        open_clean, open_changed = family.encode_text(tokens), family.encode_text(noisy)
        assert_close(clean["context"][:, :length], changed["context"][:, :length])
        assert (open_clean["context"] - open_changed["context"])[:, :length].abs().max() > 1e-3
        assert torch.equal(clean["mask"], tokens["t5xxl_mask"]) and "mask" not in open_clean.tensors
        x_t, timesteps = torch.zeros(1, 16, 4, 4), torch.tensor([300.0])
        assert_close(masked.predict(x_t, timesteps, clean), masked.predict(x_t, timesteps, changed))
    assert masked.text_cache.flags == {"apply_t5_attn_mask": True}


# --- latents ---------------------------------------------------------------------------------------------------
def test_latents_are_scaled_as_in_the_diffusers_pipeline(family, folder):
    from diffusers import FluxImg2ImgPipeline

    pipeline = FluxImg2ImgPipeline.from_pretrained(
        folder, transformer=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None
    )
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = family.encode_images(images[:1], torch.Generator().manual_seed(1))
        theirs = pipeline._encode_vae_image(images[:1], torch.Generator().manual_seed(1))
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        vae = pipeline.vae
        decoded = vae.decode(ours / vae.config.scaling_factor + vae.config.shift_factor).sample
        assert_close(family.decode_latents(ours), decoded, rtol=1e-5, atol=1e-5)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)


def test_uncached_images_become_model_input_once(family):
    """Latents of this family are cached as the model takes them; encoding in the step must not scale twice."""
    images = torch.zeros(1, 3, 32, 32)
    torch.manual_seed(0)
    expected = family.encode_images(images)
    torch.manual_seed(0)
    batch = Batch(
        captions=["a"], loss_weights=torch.ones(1), original_sizes_hw=torch.zeros(1, 2, dtype=torch.int64),
        crop_top_lefts=torch.zeros(1, 2, dtype=torch.int64), target_sizes_hw=torch.zeros(1, 2, dtype=torch.int64),
        network_multipliers=torch.ones(1), image_keys=["a"], images=images,
    )  # fmt: skip
    assert torch.equal(batch_latents(family, batch, 1), expected)


# --- denoising -------------------------------------------------------------------------------------------------
def test_guidance_is_that_of_the_conditioning_else_that_of_the_options(family):
    own = prediction(family, guidance=torch.tensor([1.0]))
    assert not torch.allclose(own, prediction(family))
    assert_close(prediction(flux_family(**SHORT, guidance_scale=1.0)), own)
    assert_close(prediction(family), prediction(family, guidance=torch.tensor([3.5])))


def test_schnell_ignores_guidance_and_has_even_steps(family, tmp_path):
    schnell = flux_family(**SHORT, pretrained_model_name_or_path=str(without_guidance(tmp_path)))
    assert torch.equal(prediction(schnell), prediction(schnell, guidance=torch.tensor([9.0])))
    spec, dev = schnell.sampling_spec(), family.sampling_spec()
    assert (spec.defaults.guidance_scale, dev.defaults.guidance_scale) == (None, 3.5)
    assert spec.flow_sigmas is not None and dev.flow_sigmas is not None
    assert_close(spec.flow_sigmas(4, (64, 64), None), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    large, small = dev.flow_sigmas(4, (128, 128), None), dev.flow_sigmas(4, (32, 32), None)
    assert float(large[2]) == pytest.approx(1 / (1 + 2.718281828**-1.15), rel=1e-5)  # mu 1.15 at 4096 tokens
    assert float(small[2]) == pytest.approx(1 / (1 + 2.718281828**-0.5), rel=1e-5)  # 0.5 at 256
    assert_close(dev.flow_sigmas(2, (128, 128), 3.0), torch.tensor([1.0, 0.75, 0.0]))


def test_residuals_of_a_control_net_reach_the_blocks(family):
    plain = prediction(family)
    size = family.denoiser.params.hidden_size
    zeros = FluxResiduals((torch.zeros(1, 24, size),), (torch.zeros(1, 48, size),))
    ones = FluxResiduals((torch.ones(1, 24, size),), ())
    assert_close(prediction(family, residuals=zeros), plain)
    assert not torch.allclose(prediction(family, residuals=ones), plain)


def test_blocks_are_in_forward_order(family):
    assert [name for name, _ in family.blocks()] == [
        "double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sampling", "prediction_type"),
    [
        ({}, "sigma", "raw"),
        ({"timestep_sampling": "flux_shift", "model_prediction_type": "additive"}, "resolution_shift", "additive"),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 2.0}, "shift", "raw"),
    ],
)
def test_objectives_follow_the_options(changes, sampling, prediction_type):
    config = Flux(flux_options(**changes)).make_objective().config
    assert (config.timestep_sampling, config.prediction_type) == (sampling, prediction_type)
    assert config.shift == changes.get("discrete_flow_shift", 3.0)


def test_the_default_prediction_type_is_warned_about(caplog):
    Flux(flux_options(model_prediction_type="sigma_scaled")).make_objective()
    assert "--model_prediction_type raw is recommended" in caplog.text


def test_timestep_limits_are_honoured():
    options = flux_options(timestep_sampling="sigmoid", min_timestep=200, max_timestep=400)
    level = Flux(options).make_objective().sample_timesteps(64, (8, 8), "cpu")
    assert 200 <= float(level.timesteps.min()) and float(level.timesteps.max()) <= 400


# --- options ---------------------------------------------------------------------------------------------------
def test_options_are_checked_before_anything_is_loaded(tmp_path):
    assert problems() == []
    assert problems(ae=None, clip_l=None, t5xxl=None)[0].endswith(
        "holds the transformer alone: --ae, --clip_l, --t5xxl must be given."
    )
    assert problems(ae="no.safetensors", t5xxl="nor") == [
        "--ae no.safetensors: no such file or folder.", "--t5xxl nor: no such file or folder.",
    ]  # fmt: skip
    assert "holds no T5 encoder" in problems(t5xxl=str(FILES["clip_l"]))[0]
    assert "holds no CLIP text encoder" in problems(clip_l=str(FILES["t5xxl"]))[0]
    assert "holds no VAE" in problems(ae=str(FILES["clip_l"]))[0]
    four_channels = FOLDER / "models" / "sd1_tiny.safetensors"
    assert "this VAE has 4 latent channels, the model needs 16" in problems(ae=str(four_channels))[0]
    other = FOLDER / "models" / "sdxl_tiny.safetensors"
    assert "looks like an SDXL checkpoint, but the command expects a FLUX.1 model" in problems(
        pretrained_model_name_or_path=str(other)
    )[0]
    assert problems(model_type="chroma") == ["--model_type chroma: only flux can be used here."]
    assert "T5 takes no prompt weights" in problems(weighted_captions=True)[0]
    assert "--huber_schedule exponential" in problems(loss_type="huber")[0]
    assert "at least 1" in problems(t5xxl_max_token_length=0)[0]


def test_models_with_further_input_channels_are_refused(tmp_path):
    path = tmp_path / "fill.safetensors"
    tensors = load_file(TRANSFORMER)
    save_file({**tensors, "img_in.weight": torch.zeros(64, 384)}, path)
    assert "takes 384 channels per token and gives 64 (a Fill, Canny or Depth model?)" in problems(
        pretrained_model_name_or_path=str(path)
    )[0]


def test_options_without_effect_are_named_with_their_reason(caplog):
    options = flux_options(
        noise_offset=0.1, min_snr_gamma=5.0, clip_skip=2, sigmoid_scale=2.0, discrete_flow_shift=2.0,
        weighting_scheme="logit_normal", timestep_sampling="uniform",
    )  # fmt: skip
    training_loop.warn_without_effect(options, Flux(options).without_effect)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for name in (
        "noise_offset", "min_snr_gamma", "clip_skip", "sigmoid_scale", "discrete_flow_shift", "weighting_scheme",
    ):  # fmt: skip
        assert f"--{name} has no effect:" in said
    caplog.clear()
    options = flux_options(discrete_flow_shift=2.0, weighting_scheme="logit_normal", logit_mean=0.5)
    training_loop.warn_without_effect(options, Flux(options).without_effect)
    assert not caplog.records


def test_noise_options_without_effect_change_no_draw():
    """What is warned about as having no effect has none: the noise of a step is plain."""
    changed = flux_options(noise_offset=0.5, multires_noise_iterations=6, ip_noise_gamma=0.1)
    noise = LossRecipe.from_options(changed, Flux(changed)).noise
    assert (noise.noise_offset, noise.multires_noise_iterations, noise.ip_noise_gamma) == (None, None, 0.1)


# --- training --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_full_training_moves_the_transformer_and_saves_every_form(tmp_path):
    common = ("--dataset_config", dataset(tmp_path), "--cache_latents", "--cache_text_encoder_outputs",
              "--t5xxl_max_token_length", "24", "--max_train_steps", "2", "--gradient_checkpointing")  # fmt: skip
    path = train_flux("flux_train", *common, output_dir=tmp_path / "file")
    saved, source = load_file(path), load_file(TRANSFORMER)
    assert saved.keys() == source.keys()
    still = [key for key in saved if torch.equal(saved[key].float(), source[key].float())]
    assert not still
    metadata = open_tensors(path).metadata
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert metadata["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    folder = train_flux(
        "flux_train", *common, "--save_model_as", "diffusers_safetensors", output_dir=tmp_path / "folder", suffix=""
    )
    again = load(folder, **NOTHING_ELSE)
    assert all(torch.equal(value, saved[key].float()) for key, value in again.denoiser.state_dict().items())


def test_schnell_is_saved_as_schnell_and_sampled(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --n blurry --l 2 --w 64 --h 64 --s 1 --d 2\n")
    path = train_flux(
        "flux_train", "--pretrained_model_name_or_path", without_guidance(tmp_path), "--dataset_config",
        dataset(tmp_path), "--cache_text_encoder_outputs", "--t5xxl_max_token_length", "24", "--max_train_steps", "1",
        "--sample_prompts", prompts, "--sample_every_n_steps", "1", output_dir=tmp_path / "out",
    )  # fmt: skip
    assert open_tensors(path).metadata["modelspec.architecture"] == "flux-1-schnell"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
