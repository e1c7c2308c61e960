"""The SDXL family: files and folders, text, conditioning, and the same numbers in diffusers and transformers."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints import layout_sdxl
from library.checkpoints.unpickle import load_pickle
from library.families.base import Conditioning
from library.families.sdxl import StableDiffusionXL
from library.generation.engine import draw_batch
from library.generation.request import ImageRequest
from library.text.clip import PromptStyle
from tests import sdxl_tiny
from tests.sdxl_tiny import MODEL, SIZES, answers, pipeline_answers, sdxl_family, sdxl_options
from tests.training import MODEL as SD1_MODEL
from tests.training import TOKENIZERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CAPTIONS = ["a photo of a cat on a mat, best quality", "dark, sketch"]
LONG = ", ".join(["a red house near the water"] * 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model whose text projection is not symmetric."""
    return sdxl_tiny.write_asymmetric(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def family(checkpoint) -> StableDiffusionXL:
    return sdxl_family(checkpoint)


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    family.save(folder, layout="diffusers_safetensors", dtype=None, metadata={})
    return folder


@pytest.fixture(scope="module")
def plain(family) -> dict[str, Tensor]:
    return answers(family)


def pipeline(folder: Path, **parts: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    found = {name: float((one[name] - two[name]).abs().max()) for name in one}
    assert max(found.values()) < tolerance, found


# --- outside readers -------------------------------------------------------------------------------------------
def test_diffusers_opens_our_folder_and_answers_as_we_do(folder, family, plain):
    pipe = pipeline(folder)
    assert_close(pipeline_answers(pipe), plain)
    with torch.no_grad():
        positive, negative = family.encode_prompts(["a red castle"], [""])
        theirs = pipe.encode_prompt("a red castle", negative_prompt="")
    ours = positive["context"], negative["context"], positive["pooled"], negative["pooled"]
    assert_close(dict(zip("abcd", theirs, strict=True)), dict(zip("abcd", ours, strict=True)))
    assert pipe.vae.config.scaling_factor == 0.13025 and pipe.vae.config.force_upcast
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"


@pytest.mark.parametrize("name", ["saved.safetensors", "saved.ckpt"])
def test_diffusers_opens_our_single_file(name, folder, family, plain, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    layout = Path(name).suffix.removeprefix(".")
    family.save(tmp_path / name, layout=layout, dtype=None, metadata={})
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = StableDiffusionXLPipeline.from_single_file(str(tmp_path / name), config=str(config), dtype=torch.float32)
    assert_close(pipeline_answers(pipe), plain)


def test_pooled_text_is_that_of_transformers(folder, family):
    """The orientation of the projection: transformers reads the folder's own weights."""
    from transformers import CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    tokens = family.tokenize(CAPTIONS)
    with torch.no_grad():
        ours = family.encode_text(tokens)["pooled"]
        assert torch.allclose(theirs(tokens["input_ids2"][:, 0]).text_embeds, ours, atol=1e-5)
        family.encoder(1).text_projection.weight.data = family.encoder(1).text_projection.weight.t().contiguous()
        wrong = family.encode_text(tokens)["pooled"]
        family.encoder(1).text_projection.weight.data = family.encoder(1).text_projection.weight.t().contiguous()
    assert float((wrong - ours).abs().max()) > 0.1


def test_a_picture_is_that_of_diffusers(folder, family):
    from diffusers import EulerDiscreteScheduler

    request = ImageRequest("a red castle", "dark", width=96, height=64, steps=4, scale=5.0, seed=1, sampler="euler")
    ours = draw_batch(family, [request], device="cpu", dtype=torch.float32)
    pipe = pipeline(folder)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    theirs = pipe(
        "a red castle", negative_prompt="dark", width=96, height=64, num_inference_steps=4, guidance_scale=5.0,
        latents=noise, output_type="pt",
    ).images  # fmt: skip
    assert float(theirs.std()) > 0.04
    assert float(((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max()) < 1e-3


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "3", "conv_alpha": "1"}], ids=["linear", "convolutions"])
def test_diffusers_answers_with_our_lora_as_we_do(arguments, folder, checkpoint, plain, tmp_path):
    family = sdxl_family(checkpoint)
    path = sdxl_tiny.write_sdxl_lora(tmp_path / "lora.safetensors", family, **arguments)
    sdxl_tiny.hook_lora(path, family)
    ours = answers(family)
    assert min(float((ours[name] - plain[name]).abs().max()) for name in plain) > 0.05
    pipe = pipeline(folder)
    pipe.load_lora_weights(str(path))
    assert_close(pipeline_answers(pipe), ours, 1e-3)


# --- files -----------------------------------------------------------------------------------------------------
def test_a_file_comes_back_bit_by_bit(checkpoint, family, tmp_path):
    source = load_file(checkpoint)
    source["v_pred"] = torch.zeros(0)
    source["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.5)
    save_file(source, tmp_path / "in.safetensors")
    loaded = sdxl_family(tmp_path / "in.safetensors")
    loaded.save(tmp_path / "out.safetensors", layout="safetensors", dtype=None, metadata={})
    saved = load_file(tmp_path / "out.safetensors")
    assert set(saved) == set(source)
    assert all(torch.equal(saved[key], source[key]) for key in source)


def test_a_folder_comes_back_as_the_file_it_was_made_of(checkpoint, folder, plain, tmp_path):
    loaded = sdxl_family(folder)
    assert loaded.default_layout == "diffusers"
    assert_close(answers(loaded), plain, 1e-6)
    loaded.save(tmp_path / "out.safetensors", layout="safetensors", dtype=None, metadata={})
    source, saved = load_file(checkpoint), load_file(tmp_path / "out.safetensors")
    scale = float(saved.pop(layout_sdxl.LOGIT_SCALE))
    assert scale == pytest.approx(4.6052, abs=1e-4)
    source.pop(layout_sdxl.LOGIT_SCALE, None)
    assert set(saved) == set(source)
    assert all(torch.equal(saved[key], source[key]) for key in source)


def test_text_with_an_exclamation_mark_survives_a_folder(folder, family):
    """The second tokenizer pads with `!`, which must not make the mark in texts a padding token."""
    again = StableDiffusionXL(sdxl_options(folder, tokenizer_cache_dir=None))
    assert again.tokenizers[1].source.startswith(str(folder))
    one, two = again.tokenize(["a cat!"]), family.tokenize(["a cat!"])
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert 0 not in two["input_ids2"][0, 0, :4] and two["input_ids2"][0, 0, -1] == 0
    assert two["input_ids1"][0, 0, -1] == again.tokenizers[0].special.end


def test_pickles_count_on_and_cast(family, tmp_path):
    family.save(tmp_path / "one.ckpt", layout="ckpt", dtype=torch.float16, metadata={}, counters=(3, 30))
    loaded = sdxl_family(tmp_path / "one.ckpt")
    loaded.save(tmp_path / "two.ckpt", layout="ckpt", dtype=None, metadata={}, counters=(2, 20))
    content = load_pickle(tmp_path / "two.ckpt")
    assert (content.epoch, content.global_step) == (5, 50)
    assert load_pickle(tmp_path / "one.ckpt").tensors["model.diffusion_model.out.2.weight"].dtype == torch.float16


def test_a_folder_of_pickles_is_read_and_written(family, plain, tmp_path):
    family.save(tmp_path / "m", layout="diffusers", dtype=None, metadata={})
    assert (tmp_path / "m/unet/diffusion_pytorch_model.bin").is_file()
    assert_close(answers(sdxl_family(tmp_path / "m")), plain, 1e-6)


def test_a_vae_of_its_own_replaces_the_one_in_the_file(checkpoint, folder, tmp_path):
    from library.models.vae import load_vae

    tensors = {
        key.removeprefix("first_stage_model."): value * 0.5
        for key, value in load_file(checkpoint).items()
        if key.startswith("first_stage_model.")
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    replaced = sdxl_family(checkpoint, vae=str(tmp_path / "vae.safetensors"))
    theirs = load_vae(tmp_path / "vae.safetensors", dtype=torch.float32)
    assert torch.equal(replaced.vae.encoder.conv_in.weight, theirs.encoder.conv_in.weight)
    assert replaced.vae.config.scaling_factor == 0.13025
    assert replaced.vae_identity != sdxl_family(checkpoint).vae_identity
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = replaced.latent.normalize(replaced.encode_images(images, torch.Generator().manual_seed(0)))
    assert latents.shape == (1, 4, 8, 8) and replaced.decode_latents(latents).shape == (1, 3, 64, 64)


def test_a_distilled_model_without_middle_attention_loads_and_comes_back(checkpoint, tmp_path):
    source = {
        key: value
        for key, value in load_file(checkpoint).items()
        if not key.startswith(("model.diffusion_model.middle_block.1.", "model.diffusion_model.middle_block.2."))
    }
    save_file(source, tmp_path / "small.safetensors")
    small = sdxl_family(tmp_path / "small.safetensors")
    assert len(small.denoiser.middle_block) == 1
    small.save(tmp_path / "again.safetensors", layout="safetensors", dtype=None, metadata={})
    saved = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(saved[key], source[key]) for key in source)
    small.save(tmp_path / "folder", layout="diffusers_safetensors", dtype=None, metadata={})
    assert_close(pipeline_answers(pipeline(tmp_path / "folder")), answers(small))


def test_eight_bit_weights_are_read(checkpoint, tmp_path):
    source = load_file(checkpoint)
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    source[key] = source[key].to(torch.float8_e4m3fn)
    save_file(source, tmp_path / "m.safetensors")
    loaded = sdxl_family(tmp_path / "m.safetensors")
    assert torch.equal(loaded.denoiser.input_blocks[4][1].transformer_blocks[0].attn1.to_q.weight, source[key].float())


def test_other_models_are_told_apart(folder, checkpoint, tmp_path, caplog):
    with pytest.raises(ValueError, match="looks like a Stable Diffusion 1.x checkpoint, but .* an SDXL checkpoint"):
        sdxl_family(SD1_MODEL)
    incomplete = Path(shutil.copytree(folder, tmp_path / "m"))
    shutil.rmtree(incomplete / "vae")
    with pytest.raises(FileNotFoundError, match="no folder 'vae'"):
        sdxl_family(incomplete)
    tensors = load_file(checkpoint)
    bare = {key: value for key, value in tensors.items() if not key.startswith("conditioner.embedders.1")}
    save_file(bare, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="refiner|text encoder 2"):
        sdxl_family(tmp_path / "half.safetensors")
    save_file({**tensors, "something.else": torch.zeros(1)}, tmp_path / "odd.safetensors")
    sdxl_family(tmp_path / "odd.safetensors")
    assert "1 tensors belong to no part of the model and are not used: something.else" in caplog.text


def test_a_marker_of_velocity_prediction_is_noticed(checkpoint, tmp_path, caplog):
    save_file({**load_file(checkpoint), "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    sdxl_family(tmp_path / "v.safetensors")
    assert "says that it predicts v: add --v_parameterization?" in caplog.text
    caplog.clear()
    told = sdxl_family(tmp_path / "v.safetensors", v_parameterization=True, zero_terminal_snr=True)
    assert "predicts" not in caplog.text
    spec = told.sampling_spec()
    assert spec.prediction_type == "v_prediction" and spec.has_zero_terminal_snr
    assert told.model_metadata()["prediction_type"] == "v"


def test_a_marker_of_pure_noise_is_noticed_in_training(checkpoint, tmp_path, caplog):
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(checkpoint), **markers}, tmp_path / "v.safetensors")
    family = sdxl_family(tmp_path / "v.safetensors", v_parameterization=True)
    assert "zero terminal SNR: add --zero_terminal_snr?" in caplog.text
    assert not family.sampling_spec().has_zero_terminal_snr  # training does as its options say


@pytest.mark.parametrize("told", [{}, {"v_parameterization": True}], ids=str)
def test_drawing_takes_pure_noise_from_the_model_and_asks_for_no_option(checkpoint, tmp_path, caplog, told):
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(checkpoint), **markers}, tmp_path / "v.safetensors")
    family = StableDiffusionXL(sdxl_options(tmp_path / "v.safetensors", **told))
    family.follows_model = True
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    spec = family.sampling_spec()
    assert spec.prediction_type == "v_prediction" and spec.has_zero_terminal_snr
    assert "--zero_terminal_snr" not in caplog.text and "--v_parameterization" not in caplog.text


# --- options ---------------------------------------------------------------------------------------------------
def test_options_that_cannot_work_are_refused_before_loading():
    [problem] = StableDiffusionXL(sdxl_options(v2=True)).check_options()
    assert problem.startswith("--v2")
    family = StableDiffusionXL(sdxl_options())
    assert family.check_options() == []
    assert family.cached_text_encoders([False, False]) == [True, True]
    for trained in ([True, False], [False, True], [True, True]):
        with pytest.raises(ValueError, match="--network_train_unet_only"):
            family.cached_text_encoders(trained)
    assert set(family.without_effect) == {"clip_skip"}
    assert family.sampling_spec().defaults.width == 1024 and family.sampling_spec().uses_sizes


# --- text ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_context_is_the_last_but_one_layer_of_both_encoders(family):
    tokens = family.tokenize(CAPTIONS)
    encoded = family.encode_text(tokens)
    parts = []
    for encoder, name in zip(family.text_encoders, ("input_ids1", "input_ids2"), strict=True):
        parts.append(encoder(tokens[name][:, 0], output_hidden_states=True).hidden_states[-2])
    assert torch.equal(encoded["context"], torch.cat(parts, dim=-1))
    assert encoded["context"].shape == (2, 77, 192) and encoded["pooled"].shape == (2, 128)


@torch.no_grad()
def test_pooled_text_is_read_at_the_first_end_token(checkpoint):
    """Words added later have higher ids than the end token."""
    family = sdxl_family(checkpoint)
    tokenizer, encoder = family.tokenizers[1], family.encoder(1)
    before = family.encode_text(family.tokenize(["a cat"]))["pooled"]
    word = tokenizer.add_token("qwertz")
    encoder.resize_token_embeddings(word + 1)
    ids = family.tokenize(["a cat qwertz"])["input_ids2"][0, 0].tolist()
    assert word > tokenizer.special.end and ids.index(word) < ids.index(tokenizer.special.end)
    last = encoder(torch.tensor([ids])).last_hidden_state[0]
    wanted = encoder.text_projection(last[ids.index(tokenizer.special.end)])
    found = family.encode_text(family.tokenize(["a cat qwertz"]))["pooled"][0]
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, encoder.text_projection(last[ids.index(word)]), atol=1e-2)
    assert torch.equal(family.encode_text(family.tokenize(["a cat"]))["pooled"], before)


@torch.no_grad()
def test_long_captions_are_spliced_and_pooled_from_their_first_window(checkpoint):
    family = sdxl_family(checkpoint, max_token_length=150)
    tokens = family.tokenize([LONG, "a cat"])
    assert tokens["input_ids1"].shape == (2, 2, 77)
    encoded = family.encode_text(tokens)
    assert encoded["context"].shape == (2, 152, 192)
    first = {name: ids[:, :1] for name, ids in tokens.items()}
    single = family.encode_text(first)
    assert torch.allclose(encoded["context"][:, :76], single["context"][:, :76], atol=1e-5)
    assert torch.allclose(encoded["pooled"], single["pooled"], atol=1e-5)
    assert family.text_cache.lengths == {"hidden_state1": 152, "hidden_state2": 152}
    assert StableDiffusionXL(sdxl_options()).text_cache.lengths["hidden_state1"] == 77


@torch.no_grad()
def test_caption_weights_multiply_the_states_and_leave_the_pooled_text(family):
    plain = family.encode_text(family.tokenize(["a red house"]))
    weighted = family.encode_weighted_captions(["a (red:1.5) house"])
    ratio = weighted["context"] / plain["context"]
    position = 2  # after the start token and "a"
    assert torch.allclose(ratio[0, position], torch.tensor(1.5), atol=1e-3)
    assert torch.allclose(ratio[0, [0, 1, 3, 4]], torch.tensor(1.0), atol=1e-3)
    assert torch.equal(weighted["pooled"], plain["pooled"])


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
def test_cached_text_is_the_live_text(checkpoint, weighted):
    family = sdxl_family(checkpoint, weighted_captions=weighted)
    captions = ["a (red:1.5) house", "a cat"]
    tokens = family.tokenize(captions)
    assert sorted(tokens) == sorted(["input_ids1", "input_ids2"] + ["weights1", "weights2"] * weighted)
    live = family.encode_weighted_captions(captions) if weighted else family.encode_text(tokens)
    cached = family.encode_text_for_cache(tokens)
    assert tuple(cached) == family.text_cache.arrays
    plain = StableDiffusionXL(sdxl_options(checkpoint))
    plain.text_encoders = family.text_encoders
    assert (plain.text_identity == family.text_identity) is not weighted
    family.release_text_encoders([True, True])
    assert family.text_encoders == [None, None]
    again = family.encode_text({}, cached)
    assert all(torch.equal(again[name], live[name]) for name in live.tensors)
    with pytest.raises(RuntimeError, match="hidden_state1"):
        family.encode_text(tokens)


@torch.no_grad()
def test_prompts_for_drawing(family):
    style = PromptStyle(max_chunks=3, with_breaks=True)
    positive, negative = family.encode_prompts([LONG], ["a dog"], style=style)
    assert positive["context"].shape == negative["context"].shape == (1, 154, 192)
    plain, _ = family.encode_prompts(["a cat"], [""], style=style)
    assert torch.allclose(plain["context"], family.encode_text(family.tokenize(["a cat"]))["context"], atol=1e-5)
    last_layer, _ = family.encode_prompts(["a cat"], [""], style=style, clip_skip=1)
    assert not torch.allclose(last_layer["context"], plain["context"], atol=1e-2)
    assert torch.equal(last_layer["pooled"], plain["pooled"])
    second, other = family.encode_prompts(["a cat"], ["dark"], style=style, second_prompts=["a dog"])
    dog, _ = family.encode_prompts(["a dog"], [""], style=style)
    assert torch.allclose(second["context"][..., :64], plain["context"][..., :64], atol=1e-5)
    assert torch.allclose(second["context"][..., 64:], dog["context"][..., 64:], atol=1e-5)
    assert torch.allclose(second["pooled"], dog["pooled"], atol=1e-5)
    _, dark = family.encode_prompts(["a cat"], ["dark"], style=style)
    assert torch.allclose(other["context"], dark["context"], atol=1e-5)
    uneven, _ = family.encode_prompts(["a cat"], ["dark"], style=style, second_prompts=[LONG])
    assert uneven["context"].shape == (1, 154, 192)
    assert torch.allclose(uneven["context"][:, :77, :64], plain["context"][..., :64], atol=1e-5)
    assert torch.allclose(uneven["context"][..., 64:], positive["context"][..., 64:], atol=1e-5)


def test_tokenize_travels_to_data_workers(family):
    again = pickle.loads(pickle.dumps(family.tokenize))
    assert all(torch.equal(again(CAPTIONS)[name], ids) for name, ids in family.tokenize(CAPTIONS).items())


def test_embedding_tables_are_known_before_loading(checkpoint):
    family = StableDiffusionXL(sdxl_options(checkpoint))
    assert [(table.name, table.encoder) for table in family.embedding_tables()] == [("clip_l", None), ("clip_g", None)]
    loaded = sdxl_family(checkpoint)
    assert [table.encoder for table in loaded.embedding_tables()] == loaded.text_encoders


# --- denoising -------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_sizes_and_pooled_text_change_the_prediction(family):
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 192, generator=generator)
    pooled = torch.randn(1, 128, generator=generator)
    question = Conditioning({"context": context, "pooled": pooled})
    one = family.predict(x, torch.tensor([300.0]), question, SIZES)
    larger = type(SIZES)(SIZES.original_hw * 4, SIZES.crop_top_left, SIZES.target_hw)
    assert not torch.equal(one, family.predict(x, torch.tensor([300.0]), question, larger))
    other = Conditioning({"context": context, "pooled": -pooled})
    assert not torch.equal(one, family.predict(x, torch.tensor([300.0]), other, SIZES))
    with pytest.raises(ValueError, match="sizes"):
        family.predict(x, torch.tensor([300.0]), question)


def test_block_groups_hold_every_parameter_once(family):
    groups = family.block_learning_rate_groups()
    assert len(groups) == 23
    members = {id(parameter): name for name, parameters in groups for parameter in parameters}
    parameters = dict(family.denoiser.named_parameters())
    assert len(members) == sum(len(found) for _, found in groups) == len(parameters)
    places = {
        "time_embed.0.weight": 0, "label_emb.0.2.bias": 0, "input_blocks.0.0.weight": 1,
        "input_blocks.8.0.in_layers.0.weight": 9, "middle_block.0.in_layers.0.weight": 10,
        "middle_block.2.in_layers.0.weight": 12, "output_blocks.0.0.in_layers.0.weight": 13,
        "output_blocks.8.0.in_layers.0.weight": 21, "out.2.bias": 22,
    }  # fmt: skip
    assert {name: members[id(parameters[name])] for name in places} == {k: f"block{n}" for k, n in places.items()}


def test_unused_parameters_of_text_encoders_get_no_gradient(checkpoint):
    family = sdxl_family(checkpoint)
    for encoder in family.text_encoders:
        encoder.requires_grad_(True)
    encoded = family.encode_text(family.tokenize(CAPTIONS))
    (encoded["context"].square().sum() + encoded["pooled"].square().sum()).backward()
    for index, encoder in enumerate(family.text_encoders):
        without = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
        unused = {id(parameter) for parameter in family.unused_text_encoder_parameters(index)}
        assert without == {name for name, parameter in encoder.named_parameters() if id(parameter) in unused}
    assert len(family.unused_text_encoder_parameters(0)) == 16 + 2 and not family.unused_text_encoder_parameters(1)


def test_attention_of_the_u_net_is_the_chosen_one(checkpoint):
    from library.models.layers import MemoryEfficientProcessor

    chosen = sdxl_family(checkpoint, mem_eff_attn=True)
    layers = [module for name, module in chosen.denoiser.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert layers and all(isinstance(layer.processor, MemoryEfficientProcessor) for layer in layers)


def test_gradient_checkpointing_reaches_u_net_and_encoders(checkpoint):
    family = sdxl_family(checkpoint)
    family.enable_gradient_checkpointing()
    assert family.denoiser.gradient_checkpointing
    calls: list[int] = []
    encoder = family.encoder(0).train().requires_grad_(True)
    layer = encoder.text_model.encoder.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    family.encode_text(family.tokenize(CAPTIONS))["context"].sum().backward()
    assert len(calls) == 2


def test_half_precision_loads_and_predicts(checkpoint):
    family = sdxl_family(checkpoint, dtype=torch.bfloat16)
    assert {family.denoiser.dtype, family.encoder(0).dtype, family.vae.dtype} == {torch.bfloat16}
    found = answers(family)
    assert found["noise"].dtype == torch.bfloat16 and found["noise"].isfinite().all()


def test_tokenizers_come_from_the_cache_folder(caplog):
    caplog.set_level(logging.INFO)
    family = StableDiffusionXL(sdxl_options())
    assert [Path(tokenizer.source).parent for tokenizer in family.tokenizers] == [TOKENIZERS, TOKENIZERS]
    assert MODEL.is_file()
