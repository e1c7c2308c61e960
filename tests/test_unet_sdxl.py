"""SDXL's U-Net and its file layout: against diffusers, against full-size key lists, against a recorded run."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints import layout_clip, layout_sdxl, layout_unet, layout_vae
from library.checkpoints.layout_unet import Level, UnetStructure
from library.checkpoints.tensors import TensorDict, open_tensors, save_tensors, shapes_of
from library.models.text_encoders import ClipTextEncoder, build_clip, first_end_positions
from library.models.unet_sdxl import (
    SdxlUNet2DConditionModel,
    build_sdxl_unet,
    sinusoids,
    vector_conditioning,
)
from library.objectives import DdpmConfig, DdpmObjective
from library.text.clip import CLIP_G, CLIP_L, load_tokenizer
from networks import lora
from tests import golden
from tests import network_hosts as hosts

DATA = Path(__file__).parent / "data"
TINY_FILE = golden.FOLDER / "models" / "sdxl_tiny.safetensors"
#: what distilled models look like
DISTILLED = {
    "shallow_decoder": UnetStructure(
        down=(Level((0, 0), True), Level((2, 2), True), Level((3, 3), False)), middle=3,
        up=(Level((3, 3, 2), True), Level((2, 1, 1), True), Level((0, 0, 0), False)),
    ),
    "middle_without_attention": UnetStructure(
        down=(Level((0, 0), True), Level((2, 2), True), Level((3, 3), False)), middle=0,
        up=(Level((3, 3, 3), True), Level((2, 2, 2), True), Level((0, 0, 0), False)),
    ),
    "one_resnet_no_middle": UnetStructure(
        down=(Level((0,), True), Level((2,), True), Level((3,), False)), middle=None,
        up=(Level((3, 3), True), Level((2, 2), True), Level((0, 0), False)),
    ),
}  # fmt: skip


# --- helpers ---------------------------------------------------------------------------------------------------
def random_unet(config=None, seed: int = 0) -> SdxlUNet2DConditionModel:
    torch.manual_seed(seed)
    unet = SdxlUNet2DConditionModel(config or hosts.sdxl_config()).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return unet


def library_unet(unet: SdxlUNet2DConditionModel, size_width: int = 8):
    """diffusers' U-Net with the same weights; `attention_head_dim` is the number of heads there."""
    from diffusers import UNet2DConditionModel

    config = layout_unet.unet_config(shapes_of(unet.state_dict()), heads=unet.config.heads)
    model = UNet2DConditionModel(**{**config, "addition_time_embed_dim": size_width})
    model.load_state_dict(dict(layout_unet.to_diffusers(unet.state_dict())))
    return model.eval()


def inputs(unet: SdxlUNet2DConditionModel, size_hw=(16, 8), pooled_width: int = 64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size_hw, generator=generator)
    context = torch.randn(2, 7, unet.config.context_width, generator=generator)
    pooled = torch.randn(2, pooled_width, generator=generator)
    sizes = torch.tensor([[150, 160, 4, 0, 128, 128], [64, 256, 0, 3, 64, 256]])
    return x, torch.tensor([3.0, 871.0]), context, pooled, sizes


def call(unet: SdxlUNet2DConditionModel, x, timesteps, context, pooled, sizes, **options) -> Tensor:
    return unet(x, timesteps, context, vector_conditioning(pooled, sizes, unet.config.vector_width), **options)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.05
    return float((ours - theirs).norm() / theirs.norm())


def full_size() -> dict[str, tuple[int, ...]]:
    with gzip.open(DATA / "keys_sdxl.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items() if key != "_about"}


def on_meta(shapes) -> TensorDict:
    return TensorDict({k: torch.empty(s, device="meta") for k, s in shapes.items()}, source="full-size model")


# --- against diffusers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size_hw", [(16, 8), (15, 10)], ids=["even", "odd"])
@torch.no_grad()
def test_output_equals_diffusers(size_hw):
    unet = random_unet()
    x, timesteps, context, pooled, sizes = inputs(unet, size_hw)
    added = {"text_embeds": pooled, "time_ids": sizes}
    theirs = library_unet(unet)(x, timesteps, context, added_cond_kwargs=added).sample
    assert relative_error(call(unet, x, timesteps, context, pooled, sizes), theirs) < 1e-5


@pytest.mark.parametrize("name", DISTILLED)
@torch.no_grad()
def test_distilled_structures_equal_diffusers_and_are_found_from_shapes(name):
    config = replace(hosts.sdxl_config(), structure=DISTILLED[name], heads=(1, 1, 1))
    unet = random_unet(config)
    assert layout_sdxl.unet_config(shapes_of(unet.state_dict())) == config
    x, timesteps, context, pooled, sizes = inputs(unet)
    added = {"text_embeds": pooled, "time_ids": sizes}
    theirs = library_unet(unet)(x, timesteps, context, added_cond_kwargs=added).sample
    assert relative_error(call(unet, x, timesteps, context, pooled, sizes), theirs) < 1e-5


@torch.no_grad()
def test_attention_may_stand_behind_some_resnets_of_a_level():
    """An attention whose last layer is zero does nothing, so leaving it out must not change the output."""
    whole = random_unet()
    for parameter in whole.input_blocks[4][1].proj_out.parameters():
        parameter.zero_()
    structure = whole.config.structure
    down = (structure.down[0], Level((0, 2), True), structure.down[2])
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("input_blocks.4.1.")}
    partial = build_sdxl_unet(TensorDict(state, source="partial"), dtype=None, heads=whole.config.heads)
    assert partial.config == replace(whole.config, structure=replace(structure, down=down))
    assert torch.equal(call(partial, *inputs(partial)), call(whole, *inputs(whole)))


@torch.no_grad()
def test_control_residuals_equal_diffusers():
    unet = random_unet()
    x, timesteps, context, pooled, sizes = inputs(unet)
    widths_and_scales = [(32, 1), (32, 1), (32, 1), (32, 2), (32, 2), (32, 2), (32, 4), (64, 4), (64, 4)]
    down = [torch.randn(2, width, 16 // scale, 8 // scale) for width, scale in widths_and_scales]
    middle = torch.randn(2, 64, 4, 2)
    theirs = library_unet(unet)(
        x, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    ours = call(unet, x, timesteps, context, pooled, sizes, residuals=(down, middle))
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(call(unet, x, timesteps, context, pooled, sizes), theirs) > 0.05
    with pytest.raises(ValueError):
        call(unet, x, timesteps, context, pooled, sizes, residuals=(down[:-1], middle))


def test_sinusoids_equal_diffusers_and_do_not_round():
    from diffusers.models.embeddings import get_timestep_embedding

    values = torch.tensor([0.0, 1.0, 3.3, 999.0])
    assert torch.equal(sinusoids(values, 320), get_timestep_embedding(values, 320, True, 0))
    assert sinusoids(values.bfloat16(), 320).dtype == torch.float32


def test_y_needs_widths_that_fit():
    unet = random_unet()
    x, timesteps, context, pooled, sizes = inputs(unet)
    with pytest.raises(ValueError, match="width 65"):
        vector_conditioning(torch.zeros(2, 65), sizes, unet.config.vector_width)
    with pytest.raises(ValueError, match=r"width 7, .* takes 112"):
        unet(x, timesteps, context, torch.zeros(2, 7))


# --- training --------------------------------------------------------------------------------------------------
def gradients(unet: SdxlUNet2DConditionModel) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and how often a resnet ran."""
    runs = []
    resnet = unet.input_blocks[1][0]
    handle = resnet.register_forward_pre_hook(lambda *_: runs.append(1))
    unet.zero_grad()
    output = call(unet, *inputs(unet))
    output.square().mean().backward()
    handle.remove()
    return output.detach(), {n: p.grad.clone() for n, p in unet.named_parameters()}, len(runs)


def test_gradient_checkpointing_changes_no_gradient_and_recomputes_only_in_train_mode():
    unet = random_unet().train()
    output, expected, runs = gradients(unet)
    assert runs == 1
    unet.enable_gradient_checkpointing()
    checkpointed, found, runs = gradients(unet)
    assert runs == 2
    assert torch.equal(checkpointed, output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(gradient.any() for name, gradient in expected.items() if "transformer_blocks" in name)
    assert gradients(unet.eval())[2] == 1
    unet.train().disable_gradient_checkpointing()
    assert gradients(unet)[2] == 1


@torch.no_grad()
def test_half_precision_runs_in_its_own_dtype():
    unet = random_unet().to(torch.bfloat16)
    x, timesteps, context, pooled, sizes = inputs(unet)
    half = call(unet, x.bfloat16(), timesteps, context.bfloat16(), pooled.bfloat16(), sizes)
    assert (half.dtype, unet.dtype, unet.device.type) == (torch.bfloat16, torch.bfloat16, "cpu")
    assert relative_error(half.float(), call(unet.float(), x, timesteps, context, pooled, sizes)) < 0.05


@torch.no_grad()
def test_every_attention_uses_the_given_processor():
    from library.models.layers import MemoryEfficientProcessor, set_attention

    unet = random_unet()
    set_attention(unet, None, "mem_eff_attn")
    layers = [module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert len(layers) == 2 * (2 * 2 + 2 + 1 + 3 + 3 * 2)
    assert all(isinstance(layer.processor, MemoryEfficientProcessor) for layer in layers)


# --- full size -------------------------------------------------------------------------------------------------
def full_size_modules(file):
    """All four modules on the meta device, built from shapes alone."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig

    text1, text2 = layout_sdxl.text1_tensors(file), layout_sdxl.text2_tensors(file)
    vae_part = layout_sdxl.vae_tensors(file)
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel(layout_sdxl.unet_config(layout_sdxl.unet_tensors(file).shapes))
        encoder1 = ClipTextEncoder(CLIPTextConfig(**layout_clip.clip_config(text1.shapes, activation="quick_gelu")))
        config = CLIPTextConfig(**layout_clip.clip_config(text2.shapes, activation="gelu"))
        encoder2 = ClipTextEncoder(config, with_projection=True)
        vae = AutoencoderKL(**layout_vae.vae_config(vae_part.shapes))
    return unet, encoder1, encoder2, vae


def test_full_size_model_is_built_from_shapes_alone_and_written_back(caplog):
    shapes = full_size()
    raw = on_meta(shapes | {layout_sdxl.TEXT1_PREFIX + "text_model.embeddings.position_ids": (1, 77)})
    layout_sdxl.check_file(raw, option="--pretrained_model_name_or_path")
    file = layout_sdxl.normalize(raw)
    layout_sdxl.warn_of_foreign_keys(file)
    assert "belong to no part" not in caplog.text
    unet, encoder1, encoder2, vae = full_size_modules(file)
    config = unet.config
    assert (config.channels, config.heads) == ((320, 640, 1280), (5, 10, 20))
    assert (config.context_width, config.vector_width, config.time_width) == (2048, 2816, 1280)
    assert config == hosts.sdxl_config(**hosts.FULL_SDXL)
    assert shapes_of(unet.state_dict()) == layout_sdxl.unet_tensors(file).shapes
    assert shapes_of(encoder1.state_dict()) == layout_sdxl.text1_tensors(file).shapes
    assert shapes_of(encoder2.state_dict()) == layout_sdxl.text2_tensors(file).shapes
    assert shapes_of(vae.state_dict()) == layout_sdxl.vae_tensors(file).shapes
    assert len(shapes_of(unet.state_dict())) == 1680

    states = [module.state_dict() for module in (unet, encoder1, encoder2, vae)]
    assert shapes_of(layout_sdxl.to_single_file(*states)) == shapes


def test_lora_on_the_full_size_modules_finds_the_listed_layers():
    unet, encoder1, encoder2, _ = full_size_modules(layout_sdxl.normalize(on_meta(full_size())))
    lists = json.loads((DATA / "lora_modules_sdxl.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = lora.create_network(1.0, 4, 1.0, None, [encoder1, encoder2], unet)
        with_convolutions = lora.create_network(1.0, 4, 1.0, None, [encoder1, encoder2], unet, conv_dim="2")
    entries = lists["text_encoder_1"] + lists["text_encoder_2"] + lists["unet"]
    assert [adapter.lora_name for adapter in network.adapters] == [entry["name"] for entry in entries]
    for adapter, entry in zip(network.adapters, entries, strict=True):
        assert adapter.lora_down.weight.shape[:2] == (4, entry["in"]), entry["name"]
        assert adapter.lora_up.weight.shape[:2] == (entry["out"], 4), entry["name"]
    extra = {entry["name"] for entry in lists["unet"] + lists["unet_conv_dim_extra"]}
    assert {adapter.lora_name for adapter in with_convolutions.unet_loras} == extra


# --- files -----------------------------------------------------------------------------------------------------
def tiny_file() -> dict[str, Tensor]:
    file = open_tensors(TINY_FILE)
    return {key: file[key] for key in file}


def parts(file):
    return [dict(part(file)) for part in (layout_sdxl.unet_tensors, layout_sdxl.text1_tensors,
                                          layout_sdxl.text2_tensors, layout_sdxl.vae_tensors)]  # fmt: skip


def test_a_file_goes_through_modules_and_comes_back_bit_by_bit(tmp_path):
    source = open_tensors(TINY_FILE)
    file = layout_sdxl.normalize(source)
    unet = build_sdxl_unet(layout_sdxl.unet_tensors(file), dtype=torch.float32)
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    assert unet.config == replace(hosts.sdxl_config(), heads=(1, 1, 1), vector_width=128 + 6 * 256)
    encoders = [
        build_clip(part, activation=activation, component="text encoder", dtype=torch.float32)
        for part, activation in (
            (layout_sdxl.text1_tensors(file), "quick_gelu"), (layout_sdxl.text2_tensors(file), "gelu"),
        )
    ]  # fmt: skip
    written = layout_sdxl.to_single_file(
        unet.state_dict(), *(encoder.state_dict() for encoder in encoders), layout_sdxl.vae_tensors(file),
        logit_scale=source[layout_sdxl.LOGIT_SCALE],
    )  # fmt: skip
    save_tensors(tmp_path / "again.safetensors", written, dtype=torch.float16)
    again = open_tensors(tmp_path / "again.safetensors")
    assert again.shapes == source.shapes
    assert all(torch.equal(again[key], source[key].half()) for key in source)


def test_the_projection_is_transposed_both_ways():
    tensors = tiny_file()
    key = layout_sdxl.TEXT2_PREFIX + "text_projection"
    tensors[key] = torch.randn(128, 96)
    unet, text1, text2, vae = parts(layout_sdxl.normalize(tensors))
    assert torch.equal(text2["text_projection.weight"], tensors[key].t())
    assert torch.equal(layout_sdxl.to_single_file(unet, text1, text2, vae)[key], tensors[key])

    linear = tensors | {f"{key}.weight": tensors.pop(key).t()}
    assert torch.equal(layout_sdxl.text2_tensors(linear)["text_projection.weight"], linear[f"{key}.weight"])
    del linear[f"{key}.weight"]
    with pytest.raises(ValueError, match=r"embedders\.1\.model\.text_projection is missing"):
        layout_sdxl.text2_tensors(linear)


def test_convolutional_projections_and_bare_text_names_load_as_usual():
    tensors = tiny_file()
    odd = {}
    for key, value in tensors.items():
        if key.startswith("model.") and key.endswith((".proj_in.weight", ".proj_out.weight")):
            value = value[:, :, None, None]
        odd[key.replace("transformer.text_model.", "transformer.")] = value
    assert sum(odd[key].shape != value.shape for key, value in tensors.items() if key in odd) == 2 * (2 + 2 + 1 + 3 + 3)
    for usual, found in zip(parts(tensors), parts(layout_sdxl.normalize(odd)), strict=True):
        assert found.keys() == usual.keys()
        assert all(torch.equal(found[key], usual[key]) for key in usual)


def test_a_file_without_prefixes_is_a_unet():
    unet = dict(layout_sdxl.unet_tensors(tiny_file()))
    assert layout_sdxl.unet_tensors(unet).shapes == shapes_of(unet)
    assert not layout_sdxl.unet_tensors({"first_stage_model.conv_in.weight": torch.zeros(1)})


def test_a_missing_logit_scale_is_supplied_and_a_missing_vae_left_out():
    written = layout_sdxl.to_single_file(*parts(tiny_file())[:3], None)
    assert written[layout_sdxl.LOGIT_SCALE].item() == pytest.approx(4.6052, rel=1e-3)
    assert not any(key.startswith("first_stage_model.") for key in written)


def test_markers_survive_a_rewrite_and_stale_keys_do_not(caplog):
    extra = {
        "v_pred": torch.tensor([]), "denoiser.sigmas": torch.arange(3.0), "model_ema.decay": torch.tensor(1.0),
        layout_sdxl.TEXT1_PREFIX + "text_model.embeddings.position_ids": torch.arange(77)[None],
    }  # fmt: skip
    source = TensorDict(tiny_file() | extra, source="old.safetensors")
    layout_sdxl.warn_of_foreign_keys(layout_sdxl.normalize(source))
    assert not caplog.records
    written = layout_sdxl.to_single_file(*parts(layout_sdxl.normalize(source)))
    caplog.set_level("INFO")
    assert set(layout_sdxl.preserved_tensors(source, written)) == {"v_pred", "denoiser.sigmas"}
    assert "1 EMA weights" in caplog.text
    without_vae = {key: value for key, value in written.items() if not key.startswith("first_stage_model.")}
    assert "first_stage_model.quant_conv.weight" in layout_sdxl.preserved_tensors(source, without_vae)
    strange = TensorDict(tiny_file() | {"something.else": torch.zeros(1)}, source="old.safetensors")
    layout_sdxl.warn_of_foreign_keys(layout_sdxl.normalize(strange))
    assert "old.safetensors: 1 tensors belong to no part of the model and are not used: something.else" in caplog.text


def test_other_models_are_refused_by_name():
    shapes = full_size()
    refiner = {k: v for k, v in shapes.items() if "embedders.1" not in k}
    with pytest.raises(ValueError, match=r"--model full-size model looks like an SDXL refiner .* expects an SDXL"):
        layout_sdxl.check_file(on_meta(refiner), option="--model")
    unet = layout_sdxl.unet_tensors(on_meta(shapes)).shapes
    with pytest.raises(ValueError, match="no label_emb"):
        layout_sdxl.unet_config({k: v for k, v in unet.items() if not k.startswith("label_emb.")})
    with pytest.raises(ValueError, match=r"\[48\] channels; widths must be multiples of 32"):
        layout_sdxl.unet_config({**unet, "input_blocks.1.0.out_layers.3.weight": (48, 48, 3, 3)})
    with pytest.raises(ValueError, match=r"gives \[5, 10\] attention heads"):
        layout_sdxl.unet_config(unet, heads=(5, 10))
    assert layout_sdxl.unet_config(unet, heads=[10, 20, 40]).heads == (10, 20, 40)


# --- a recorded run --------------------------------------------------------------------------------------------
def assert_summary(tensor: Tensor, recorded: dict) -> None:
    assert list(tensor.shape) == recorded["shape"]
    assert tensor.mean().item() == pytest.approx(recorded["mean"], abs=1e-6)
    assert tensor.std().item() == pytest.approx(recorded["std"], rel=1e-5)
    first = tensor.flatten()[: len(recorded["first"])].tolist()
    assert first == pytest.approx(recorded["first"], rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_first_step_of_a_recorded_run_is_reproduced():
    """The network's up factors are zero at this step, so the base model alone gives the recorded output."""
    run = golden.golden_run("sdxl_lora")
    step = run.steps[0]
    file = layout_sdxl.normalize(open_tensors(TINY_FILE))
    unet = build_sdxl_unet(layout_sdxl.unet_tensors(file), dtype=torch.float32)
    states, pooled = [], torch.empty(0)
    for part, activation, source in (
        (layout_sdxl.text1_tensors(file), "quick_gelu", CLIP_L), (layout_sdxl.text2_tensors(file), "gelu", CLIP_G),
    ):  # fmt: skip
        encoder = build_clip(part, activation=activation, component="text encoder", dtype=torch.float32)
        tokenizer = load_tokenizer(source, cache_dir=golden.FOLDER / "tokenizers", with_download=False)
        ids = tokenizer.windows(step["captions"])[:, 0]
        assert ids[0, :16].tolist() == step["input_ids"][len(states)]
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        if encoder.text_projection is not None:
            ends = first_end_positions(ids, tokenizer.special.end)
            pooled = encoder.text_projection(output.last_hidden_state[torch.arange(len(ids)), ends])
    context = torch.cat(states, dim=-1)
    size_names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    sizes = torch.tensor([[*a, *b, *c] for a, b, c in zip(*(step[name] for name in size_names), strict=True)])
    y = vector_conditioning(pooled, sizes, unet.config.vector_width)

    objective = DdpmObjective(DdpmConfig())
    latents = torch.stack([run.tensors[f"latents.{key}"] for key in step["image_keys"]])
    noise, timesteps = run.tensors["noise.0"], run.tensors["timesteps.0"].float()
    x = objective.corrupt(latents, noise, objective.at(timesteps))
    for name, tensor in {"x": x, "context": context, "y": y}.items():
        assert_summary(tensor, step["model_call"][name])
    assert timesteps.tolist() == step["model_call"]["timesteps"]["first"]
    prediction = unet(x, timesteps, context, y)
    assert_summary(prediction, step["model_output"])
    loss = (prediction - noise).square().mean().item() * step["loss_weights"][0]
    assert loss == pytest.approx(step["loss"], rel=1e-6)
