"""SD 1/2 as a family, on the tiny SD 1 checkpoint and on an SD 2 made from it."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import logs, model_util
from library.families.sd import StableDiffusion
from library.models.layers import set_attention
from library.options import make_options
from library.text.clip import PromptStyle
from tests.sd2_tiny import sd2_tensors

GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = GOLDEN / "models" / "sd1_tiny.safetensors"
TOKENIZER = GOLDEN / "tokenizers" / "openai_clip-vit-large-patch14"


def make_family(model: Path = TINY, *, dtype: torch.dtype = torch.float32, **options) -> StableDiffusion:
    options = {"tokenizer_cache_dir": str(GOLDEN / "tokenizers"), **options}
    family = StableDiffusion(make_options(pretrained_model_name_or_path=str(model), **options))
    assert family.check_options() == []
    family.load(weight_dtype=dtype, vae_dtype=dtype, device="cpu")
    return family


@pytest.fixture(scope="module")
def family() -> StableDiffusion:
    return make_family()


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(TINY)


@pytest.fixture(scope="module")
def sd2_file(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd2")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    save_file(sd2_tensors(stored), folder / "sd2_tiny.safetensors")
    return folder / "sd2_tiny.safetensors"


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def noise_inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, 4, 16, 24, generator=generator), torch.tensor([7.0, 981.0])[:rows],
        torch.randn(rows, 77, 128, generator=generator),
    )  # fmt: skip


# --- loading ---------------------------------------------------------------------------------------------------
def test_conversion_agrees_with_the_library_s_own_converters(family, stored):
    from diffusers.loaders import single_file_utils as library

    unet = library.convert_ldm_unet_checkpoint(dict(stored), config={"layers_per_block": 2})
    levels = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    vae = library.convert_ldm_vae_checkpoint(dict(stored), config=levels)
    assert equal({k: v.float() for k, v in unet.items()}, family.denoiser.state_dict())
    assert equal({k: v.float() for k, v in vae.items()}, family.vae.state_dict())


def test_dimensions_come_from_the_file(family):
    assert family.denoiser.config.block_out_channels == (32, 32, 32, 64)
    assert family.denoiser.config.attention_head_dim == 8
    assert family.vae.config.block_out_channels == (32, 64, 32, 32)
    assert family.text_encoder.config.num_attention_heads == 2
    assert family.text_encoder.config.hidden_act == "quick_gelu"


def test_loaded_modules_are_frozen_in_eval_mode_and_whole(family):
    for module in (family.denoiser, family.vae, family.text_encoder):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    assert family.network_text_encoders() is family.text_encoder


def test_time_embedding_has_a_class_name_of_its_own(family):
    from diffusers.models.embeddings import TimestepEmbedding

    assert isinstance(family.denoiser.time_embedding, TimestepEmbedding)
    assert type(family.denoiser.time_embedding).__name__ != "TimestepEmbedding"
    assert type(family.denoiser).__name__ == "UNet2DConditionModel"


def test_loading_draws_nothing_from_the_training_generator():
    torch.manual_seed(11)
    wanted = torch.rand(1)
    torch.manual_seed(11)
    make_family()
    assert torch.equal(torch.rand(1), wanted)


def test_v2_and_a_v1_file_do_not_go_together(sd2_file):
    with pytest.raises(ValueError, match=r"looks like a Stable Diffusion 1\.x.*expects .* 2\.x.*Remove --v2"):
        model_util.load_checkpoint(TINY, v2=True)
    with pytest.raises(ValueError, match=r"looks like a Stable Diffusion 2\.x.*Add --v2"):
        model_util.load_checkpoint(sd2_file, v2=False)


def test_missing_weights_are_named(stored, tmp_path):
    key = "model.diffusion_model.middle_block.1.proj_out.bias"
    save_file({k: v for k, v in stored.items() if k != key}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors.*U-Net.*1 missing: mid_block\.attentions\.0\.proj_out\.bias"):
        model_util.load_checkpoint(tmp_path / "m.safetensors", v2=False)


def test_a_file_that_is_not_there_says_so_without_a_network():
    with pytest.raises(FileNotFoundError, match=r"--pretrained_model_name_or_path /no/such/model: no such file"):
        model_util.load_checkpoint("/no/such/model", v2=False)
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*huggingface\.co"):
        model_util.load_checkpoint("nobody/nothing", v2=False)


# --- VAE sources -----------------------------------------------------------------------------------------------
def test_every_form_of_a_vae_loads_to_the_same_weights(family, stored, tmp_path):
    prefix = "first_stage_model."
    bare = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(1)}}, tmp_path / "vae.ckpt")
    diffusers_names = {key: value.half() for key, value in family.vae.state_dict().items()}
    save_file(diffusers_names, tmp_path / "new.safetensors")
    old = {
        k.replace("0.to_q.", "0.query.").replace("0.to_k.", "0.key.").replace("0.to_v.", "0.value.")
        .replace("0.to_out.0.", "0.proj_attn."): v for k, v in diffusers_names.items()
    }  # fmt: skip
    torch.save(old, tmp_path / "old.bin")
    family.vae.save_pretrained(tmp_path / "folder" / "vae")
    for source in ("bare.safetensors", "vae.ckpt", "new.safetensors", "old.bin", "folder", "folder/vae"):
        vae = model_util.load_vae(tmp_path / source, dtype=torch.float32)
        assert equal(vae.state_dict(), family.vae.state_dict()), source


def test_a_vae_with_other_latents_is_refused(family, tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(**blocks, block_out_channels=(32,), latent_channels=16)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="16 latent channels, the model needs 4"):
        model_util.load_vae(tmp_path)


def test_vae_option_wins_and_changes_the_identity(stored, tmp_path, family):
    prefix = "first_stage_model."
    other = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    other["encoder.conv_in.bias"] = other["encoder.conv_in.bias"] + 1
    save_file(other, tmp_path / "vae.safetensors")
    changed = make_family(vae=str(tmp_path / "vae.safetensors"))
    assert torch.equal(changed.vae.encoder.conv_in.bias, stored[prefix + "encoder.conv_in.bias"].add(1).float())
    assert changed.vae_identity != family.vae_identity
    assert make_family(dtype=torch.bfloat16).vae_identity == family.vae_identity


# --- saving ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_and_save_reproduces_the_file_bit_for_bit(stored, tmp_path, dtype):
    modules = model_util.load_checkpoint(TINY, v2=False, dtype=dtype)
    modules.is_single_file = False  # nothing may come from the source file
    model_util.save_checkpoint(tmp_path / "out.safetensors", modules, v2=False, dtype=torch.float16)
    assert equal(load_file(tmp_path / "out.safetensors"), stored)


def test_pickles_carry_counters_and_foreign_keys_but_no_stale_averages(stored, tmp_path):
    extra = {"alphas_cumprod": torch.rand(5, dtype=torch.float64), "model_ema.decay": torch.ones(())}
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save({"state_dict": {**stored, **extra, **ids}, "epoch": 3, "global_step": 100}, tmp_path / "in.ckpt")
    modules = model_util.load_checkpoint(tmp_path / "in.ckpt", v2=False, dtype=torch.float32)
    model_util.save_checkpoint(tmp_path / "out.ckpt", modules, v2=False, dtype=torch.float16, counters=(2, 20))
    written = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (5, 120)
    assert equal(written["state_dict"], {**stored, "alphas_cumprod": extra["alphas_cumprod"]})


def test_files_without_the_text_model_level_are_saved_with_it_once(stored, tmp_path):
    renamed = {k.replace("transformer.text_model.", "transformer."): v for k, v in stored.items()}
    save_file(renamed, tmp_path / "in.safetensors")
    modules = model_util.load_checkpoint(tmp_path / "in.safetensors", v2=False)
    model_util.save_checkpoint(tmp_path / "out.safetensors", modules, v2=False)
    assert equal(load_file(tmp_path / "out.safetensors"), stored)


def test_sd2_round_trip_uses_all_but_the_last_block_and_keeps_it(sd2_file, tmp_path, family):
    loaded = make_family(sd2_file, dtype=torch.float16, v2=True, tokenizer_cache_dir=None)
    assert loaded.text_encoder.config.num_hidden_layers == 2
    assert loaded.text_encoder.config.hidden_act == "gelu"
    assert loaded.tokenizer.special.pad == 0
    assert isinstance(loaded.denoiser.mid_block.attentions[0].proj_in, torch.nn.Linear)
    loaded.save(tmp_path / "with_source.safetensors", layout="safetensors", dtype=None, metadata={})
    assert equal(load_file(tmp_path / "with_source.safetensors"), load_file(sd2_file))
    loaded.modules.is_single_file = False
    loaded.save(tmp_path / "alone.safetensors", layout="safetensors", dtype=None, metadata={"a": "b"})
    assert equal(load_file(tmp_path / "alone.safetensors"), load_file(sd2_file))


def test_diffusers_folder_opens_in_the_library_and_in_here(family, tmp_path):
    from diffusers import StableDiffusionPipeline

    family.save(tmp_path / "model", layout="diffusers_safetensors", dtype=None, metadata={})
    keys = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    x, t, context = noise_inputs()
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, t, context).sample, family.denoiser(x, t, context).sample)
        tokens = family.tokenize(["a cat girl"])["input_ids"][0]
        theirs = pipeline.tokenizer(["a cat girl"], padding="max_length", return_tensors="pt").input_ids
        assert torch.equal(theirs, tokens)
        hidden = family.text_encoder(tokens).last_hidden_state
        assert torch.equal(pipeline.text_encoder(tokens).last_hidden_state, hidden)
    assert equal(pipeline.vae.state_dict(), family.vae.state_dict())
    assert pipeline.scheduler.config.prediction_type == "epsilon"

    again = make_family(tmp_path / "model", tokenizer_cache_dir=None)
    for part in ("unet", "vae", "text_encoder"):
        assert equal(getattr(again.modules, part).state_dict(), getattr(family.modules, part).state_dict())
    assert again.text_encoder.config.hidden_act == "quick_gelu"
    again.save(tmp_path / "back.safetensors", layout="safetensors", dtype=torch.float16, metadata={})
    assert equal(load_file(tmp_path / "back.safetensors"), load_file(TINY))


def test_pickled_folders_and_convolutional_sd2_folders_load(sd2_file, tmp_path):
    sd2 = make_family(sd2_file, v2=True, v_parameterization=True)
    sd2.save(tmp_path / "m", layout="diffusers", dtype=None, metadata={})
    assert (tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin").is_file()
    scheduler = json.loads((tmp_path / "m" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    path = tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    for key in [k for k in weights if k.endswith((".proj_in.weight", ".proj_out.weight"))]:
        weights[key] = weights[key][:, :, None, None]
    torch.save(weights, path)
    again = make_family(tmp_path / "m", v2=True, tokenizer_cache_dir=None)
    assert equal(again.denoiser.state_dict(), sd2.denoiser.state_dict())
    with pytest.raises(ValueError, match=r"looks like a Stable Diffusion 2\.x.*Add --v2"):
        make_family(tmp_path / "m")


# --- text ------------------------------------------------------------------------------------------------------
def test_clip_skip_and_long_captions_reach_the_context():
    long = make_family(max_token_length=150, clip_skip=2)
    tokens = long.tokenize(["cat " * 100, "x"])
    assert tokens["input_ids"].shape == (2, 2, 77)
    context = long.encode_text(tokens)["context"]
    assert context.shape == (2, 152, 128)
    states = long.text_encoder(tokens["input_ids"][0], output_hidden_states=True).hidden_states
    wanted = long.text_encoder.text_model.final_layer_norm(states[-2])
    torch.testing.assert_close(context[0, 1:76], wanted[0, 1:76])
    torch.testing.assert_close(context[0, 76:151], wanted[1, 1:76])


def test_weighted_captions_multiply_hidden_states(family):
    plain = family.encode_text(family.tokenize(["a cat girl"]))["context"]
    weighted = family.encode_weighted_captions(["a (cat:2) girl"])["context"]
    torch.testing.assert_close(weighted[0, 2], 2 * plain[0, 2])
    torch.testing.assert_close(weighted[0, 3:], plain[0, 3:])


def test_prompts_of_both_sides_have_equal_length_and_normalised_weights(family):
    positive, negative = family.encode_prompts(["a (cat:1.5)", "cat " * 80], ["bad"])
    assert positive["context"].shape == (2, 154, 128)
    assert negative["context"].shape == (1, 154, 128)
    raw = family.encode_prompts(["a (cat:1.5)"], [""], style=PromptStyle(emphasis="none"))[0]["context"]
    kept = family.encode_prompts(["a (cat:1.5)"], [""])[0]["context"]
    unweighted = family.encode_prompts(["a cat"], [""])[0]["context"]
    torch.testing.assert_close(kept.mean(), unweighted.mean())
    torch.testing.assert_close(kept / kept[0, 0, 0], raw / raw[0, 0, 0], rtol=1e-4, atol=1e-5)


# --- latents and denoising -------------------------------------------------------------------------------------
def test_latents_are_a_posterior_sample_from_the_global_generator(family):
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.manual_seed(4)
    latents = family.encode_images(images)
    torch.manual_seed(4)
    posterior = family.vae.encode(images).latent_dist
    wanted = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    assert latents.shape == (2, 4, 8, 16)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(family.latent.normalize(latents), 0.18215 * wanted)
    decoded = family.decode_latents(family.latent.normalize(latents))
    torch.testing.assert_close(decoded, family.vae.decode(latents).sample)


def test_vae_keeps_its_dtype_under_autocast(family):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = family.encode_images(torch.zeros(1, 3, 64, 64))
        assert latents.dtype == torch.float32
        assert family.decode_latents(latents).dtype == torch.float32


def test_predict_takes_residuals_and_half_weights(family):
    from library.families.base import Conditioning

    x, t, context = noise_inputs()
    conditioning = Conditioning({"context": context})
    with torch.no_grad():
        plain = family.predict(x, t, conditioning)
        down = zero_residuals(family, x, t, context)
        middle = torch.ones(2, 64, 2, 3)
        moved = family.predict(x, t, conditioning, residuals=(down, middle))
        assert plain.shape == x.shape
        assert not torch.allclose(moved, plain)
        half = make_family(dtype=torch.bfloat16)
        low = half.predict(x, t, conditioning)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain, rtol=0.1, atol=0.1)


def zero_residuals(family: StableDiffusion, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
    """Zero residuals in the shapes of the U-Net's skip connections."""
    shapes: list[Tensor] = []
    unet = family.denoiser
    handles = [m.register_forward_hook(lambda _m, _i, out: shapes.extend(out[1])) for m in unet.down_blocks]
    conv = unet.conv_in.register_forward_hook(lambda _m, _i, out: shapes.append(out))
    family.denoiser(x, t, context)
    for handle in (*handles, conv):
        handle.remove()
    return [torch.zeros_like(shape) for shape in shapes]


def test_odd_latent_sizes_work(family):
    with torch.no_grad():
        out = family.denoiser(torch.zeros(1, 4, 9, 13), torch.tensor([5.0]), torch.zeros(1, 77, 128)).sample
    assert out.shape == (1, 4, 9, 13)


def test_memory_efficient_attention_agrees_and_unusable_xformers_is_one_warning(family, monkeypatch, caplog):
    x, t, context = noise_inputs()
    with torch.no_grad():
        plain = family.denoiser(x, t, context).sample
        set_attention(family.denoiser, family.vae, "mem_eff_attn")
        efficient = family.denoiser(x, t, context).sample
        set_attention(family.denoiser, family.vae, None)
    torch.testing.assert_close(efficient, plain, rtol=1e-5, atol=1e-5)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(logs, "_warned", set())
    for _ in range(2):
        set_attention(family.denoiser, family.vae, "xformers")
    assert caplog.text.count("--xformers cannot be used here") == 1
    with torch.no_grad():
        torch.testing.assert_close(family.denoiser(x, t, context).sample, plain)
    with pytest.raises(ValueError, match="flash"):
        set_attention(family.denoiser, None, "flash")


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(*, checkpointing: bool) -> list[Tensor]:
        own = make_family()
        if checkpointing:
            own.enable_gradient_checkpointing()
        own.denoiser.train()
        own.text_encoder.train()
        watched = [
            own.denoiser.down_blocks[0].attentions[0].proj_in.weight, own.denoiser.mid_block.resnets[0].conv1.weight,
            own.text_encoder.text_model.encoder.layers[0].mlp.fc1.weight,
        ]  # fmt: skip
        for parameter in watched:
            parameter.requires_grad_(True)
        x, t, _ = noise_inputs()
        own.predict(x, t, own.encode_text(own.tokenize(["cat", "girl"]))).square().mean().backward()
        return [parameter.grad for parameter in watched]

    for kept, recomputed in zip(gradients(checkpointing=False), gradients(checkpointing=True), strict=True):
        assert kept.abs().max() > 0
        torch.testing.assert_close(recomputed, kept)


def test_blocks_cover_the_unet_in_forward_order(family):
    names = [name for name, _ in family.blocks()]
    assert names == [*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4))]


# --- metadata and options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("v2", "velocity", "version", "architecture", "resolution"),
    [
        (False, False, "sd_v1", "stable-diffusion-v1", 512),
        (False, True, "sd_v1_v", "stable-diffusion-v1", 512),
        (True, False, "sd_v2", "stable-diffusion-v2-512", 512),
        (True, True, "sd_v2_v", "stable-diffusion-v2-768-v", 768),
    ],
)
def test_model_metadata(v2, velocity, version, architecture, resolution):
    metadata = StableDiffusion(make_options(v2=v2, v_parameterization=velocity)).model_metadata()
    assert metadata["ss_base_model_version"] == version
    assert metadata["architecture"] == architecture
    assert metadata["default_resolution"] == resolution
    assert metadata["prediction_type"] == ("v" if velocity else "epsilon")


def test_impossible_options_are_reported_before_loading():
    options = make_options(clip_skip=0, cache_text_encoder_outputs=True)
    problems = StableDiffusion(options).check_options()
    assert [problem.split()[0] for problem in problems] == ["--clip_skip", "--cache_text_encoder_outputs"]


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_recorded_prediction_type_that_contradicts_the_option_is_reported(family, tmp_path, caplog, where):
    if where == "folder":
        model = tmp_path / "m"
        family.save(model, layout="diffusers_safetensors", dtype=None, metadata={})
    else:
        model = tmp_path / "m.safetensors"
        family.save(model, layout="safetensors", dtype=None, metadata={"modelspec.prediction_type": "epsilon"})
    make_family(model)
    assert "predicts" not in caplog.text
    make_family(model, v_parameterization=True)
    assert "says that it predicts epsilon: remove --v_parameterization?" in caplog.text


def test_tokenize_travels_to_data_workers(family):
    copy = pickle.loads(pickle.dumps(family.tokenize))
    assert torch.equal(copy(["a cat"])["input_ids"], family.tokenize(["a cat"])["input_ids"])


# --- names that other programs import --------------------------------------------------------------------------
def test_another_program_loads_changes_and_saves_with_the_names_it_knows(stored, tmp_path):
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, str(TINY))
    unet.conv_out.bias.data += 1
    out = str(tmp_path / "merged.safetensors")
    model_util.save_stable_diffusion_checkpoint(False, out, text_encoder, unet, str(TINY), 0, 0, {}, torch.float16)
    written = load_file(out)
    changed = {key for key in stored if not torch.equal(written[key], stored[key])}
    assert set(written) == set(stored)
    assert changed == {"model.diffusion_model.out.2.bias"}
    assert vae.config.latent_channels == 4
