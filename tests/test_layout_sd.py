"""Key names and dimensions of SD 1/2 files, both ways, without reading real weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints import layout_clip, layout_sd, layout_unet, layout_vae
from library.checkpoints.folders import hub_patterns, part_file
from library.checkpoints.recognition import ModelKind, check_kind, is_ignorable, recognise
from library.checkpoints.tensors import RenamedTensors, TensorDict, check_keys, shapes_of
from library.models.text_encoders import ClipTextEncoder

DATA = Path(__file__).parent / "data"
Shapes = dict[str, tuple[int, ...]]


def full_size(name: str) -> Shapes:
    with gzip.open(DATA / f"keys_{name}.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items() if key != "_about"}


def meta_tensors(shapes: Shapes) -> TensorDict:
    return TensorDict({k: torch.empty(s, device="meta") for k, s in shapes.items()}, source="full-size model")


def module_shapes(module: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size_models_are_built_from_shapes_alone_and_written_back(name, caplog):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    v2 = name == "sd21"
    shapes = full_size(name)
    file = layout_sd.normalize(meta_tensors(shapes))
    layout_sd.warn_of_foreign_keys(file, v2=v2)
    assert "belong to no part" not in caplog.text
    unet_part = layout_sd.unet_tensors(file)
    text_part = layout_sd.text_tensors(file, v2=v2)
    vae_part = layout_sd.vae_tensors(file)
    config = layout_unet.unet_config(unet_part.shapes)
    text_config = layout_clip.clip_config(text_part.shapes, activation="gelu" if v2 else "quick_gelu")
    assert config["attention_head_dim"] == ((5, 10, 20, 20) if v2 else 8)
    assert config["use_linear_projection"] is v2
    assert text_config["num_hidden_layers"] == (23 if v2 else 12)
    assert text_config["num_attention_heads"] == (16 if v2 else 12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        vae = AutoencoderKL(**layout_vae.vae_config(vae_part.shapes))
        text = ClipTextEncoder(CLIPTextConfig(**text_config))
    assert module_shapes(unet) == layout_unet.to_diffusers(unet_part).shapes
    assert module_shapes(vae) == vae_part.shapes
    assert module_shapes(text) == text_part.shapes

    written = layout_sd.to_single_file(unet.state_dict(), text.state_dict(), vae.state_dict(), v2=v2)
    if v2:
        written.update(layout_sd.sd2_tail(written))
    wanted = {key: shape for key, shape in shapes.items() if not is_ignorable(key) or key.endswith("logit_scale")}
    assert shapes_of(written) == wanted


def test_sd2_tail_copies_the_last_block_and_fills_the_unused_keys():
    config = {"ln_final.bias": torch.zeros(4), "transformer.resblocks.0.ln_1.bias": torch.arange(4.0)}
    tensors = {layout_sd.SD2_TEXT_PREFIX + key: value for key, value in config.items()}
    prefix = layout_sd.SD2_TEXT_PREFIX
    tensors = layout_sd.sd2_tail(tensors)
    assert tensors[prefix + "transformer.resblocks.1.ln_1.bias"].tolist() == [0, 1, 2, 3]
    assert torch.equal(tensors[prefix + "text_projection"], torch.ones(4, 4))
    assert tensors[prefix + "logit_scale"].item() == pytest.approx(4.6052)


@pytest.mark.parametrize(
    ("blocks", "has_projection", "used"), [(24, True, 23), (23, False, 23), (23, True, 23), (3, True, 2), (3, False, 3)]
)
def test_which_sd2_text_blocks_are_used(blocks, has_projection, used):
    shapes = {f"transformer.resblocks.{i}.ln_1.bias": (4,) for i in range(blocks)}
    if has_projection:
        shapes["text_projection"] = (4, 4)
    assert layout_sd.sd2_layers(shapes) == used


# --- values ----------------------------------------------------------------------------------------------------
def random_openclip(layers: int = 2, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "positional_embedding": draw(77, width), "token_embedding.weight": draw(20, width),
        "ln_final.weight": draw(width), "ln_final.bias": draw(width), "text_projection": draw(width, 6),
    }  # fmt: skip
    for index in range(layers):
        prefix = f"transformer.resblocks.{index}."
        for part, shape in {
            "ln_1": (width,), "ln_2": (width,), "mlp.c_fc": (16, width), "mlp.c_proj": (width, 16),
            "attn.out_proj": (width, width),
        }.items():  # fmt: skip
            tensors[f"{prefix}{part}.weight"] = draw(*shape)
            tensors[f"{prefix}{part}.bias"] = draw(shape[0])
        tensors[f"{prefix}attn.in_proj_weight"] = draw(3 * width, width)
        tensors[f"{prefix}attn.in_proj_bias"] = draw(3 * width)
    return tensors


def test_openclip_there_and_back_is_identity_and_transposes_the_projection():
    source = random_openclip()
    converted = dict(layout_clip.openclip_to_hf(source, projection=True))
    assert converted["text_projection.weight"].shape == (6, 8)
    assert torch.equal(converted["text_projection.weight"], source["text_projection"].t())
    q = converted["text_model.encoder.layers.1.self_attn.q_proj.weight"]
    v = converted["text_model.encoder.layers.1.self_attn.v_proj.bias"]
    assert torch.equal(q, source["transformer.resblocks.1.attn.in_proj_weight"][:8])
    assert torch.equal(v, source["transformer.resblocks.1.attn.in_proj_bias"][16:])
    back = layout_clip.hf_to_openclip(converted)
    assert set(back) == set(source)
    assert all(torch.equal(back[key], source[key]) for key in source)


def test_unknown_openclip_parts_are_an_error():
    with pytest.raises(ValueError, match=r"resblocks\.0\.attn\.strange"):
        layout_clip.openclip_to_hf({"transformer.resblocks.0.attn.strange.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "key",
    [
        "text_model.final_layer_norm.bias", "final_layer_norm.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "clip_l.transformer.text_model.final_layer_norm.bias",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias", "transformer.final_layer_norm.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
    ],
)  # fmt: skip
def test_every_clip_prefix_leads_to_the_same_name(key):
    assert layout_clip.normalize_hf_name(layout_clip.strip_wrapper(key)) == "text_model.final_layer_norm.bias"


def test_position_ids_and_vision_parts_are_dropped():
    for key in (
        "text_model.embeddings.position_ids", "text_model.encoder.text_model.embeddings.position_ids",
        "vision_model.pre_layrnorm.bias", "visual_projection.weight", "logit_scale",
    ):  # fmt: skip
        assert layout_clip.normalize_hf_name(key) is None


def test_openclip_prefix_survives_stripping():
    key = "conditioner.embedders.1.model.transformer.resblocks.3.ln_1.bias"
    assert layout_clip.strip_wrapper(key) == "transformer.resblocks.3.ln_1.bias"


@pytest.mark.parametrize("form", ["convolution", "linear", "old diffusers names"])
def test_vae_attention_is_accepted_in_every_historic_form(form):
    weight = torch.arange(16.0).reshape(4, 4)
    stored = weight if form == "linear" else weight[:, :, None, None]
    if form == "old diffusers names":
        keys = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        source = {f"encoder.mid_block.attentions.0.{old}.weight": stored for old in keys}
    else:
        source = {f"encoder.mid.attn_1.{old}.weight": stored for old in ("q", "k", "v", "proj_out")}
    source["encoder.down.0.block.0.norm1.weight"] = torch.zeros(4)
    converted = dict(layout_vae.to_diffusers(source))
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        assert torch.equal(converted[f"encoder.mid_block.attentions.0.{name}.weight"], weight)
    written = layout_vae.to_compvis({k: v for k, v in converted.items() if "attentions" in k})
    assert written.shapes["encoder.mid.attn_1.proj_out.weight"] == (4, 4, 1, 1)


def distilled_unet(*, middle: str, up_depths: tuple[int, ...] = (1, 1)) -> Shapes:
    """A small U-Net with one resnet per level: level 0 without attention, level 1 with, odd middles."""
    shapes: Shapes = {"input_blocks.0.0.weight": (32, 4, 3, 3), "out.2.weight": (4, 32, 3, 3)}
    shapes["time_embed.0.weight"] = (128, 32)

    def resnet(prefix: str, channels: int) -> None:
        shapes[f"{prefix}.out_layers.3.weight"] = (channels, channels, 3, 3)

    def attention(prefix: str, channels: int, depth: int) -> None:
        shapes[f"{prefix}.proj_in.weight"] = (channels, channels)
        for index in range(depth):
            shapes[f"{prefix}.transformer_blocks.{index}.attn2.to_k.weight"] = (channels, 48)

    resnet("input_blocks.1.0", 32)
    shapes["input_blocks.2.0.op.weight"] = (32, 32, 3, 3)
    resnet("input_blocks.3.0", 64)
    attention("input_blocks.3.1", 64, 2)
    if middle != "none":
        resnet("middle_block.0", 64)
    if middle == "full":
        attention("middle_block.1", 64, 2)
    for index, depth in enumerate(up_depths):
        resnet(f"output_blocks.{index}.0", 64)
        attention(f"output_blocks.{index}.1", 64, depth)
    shapes["output_blocks.1.2.conv.weight"] = (64, 64, 3, 3)
    resnet("output_blocks.2.0", 32)
    resnet("output_blocks.3.0", 32)
    return shapes


@pytest.mark.parametrize(
    ("middle", "kind"), [("full", "UNetMidBlock2DCrossAttn"), ("plain", "UNetMidBlock2D"), ("none", None)]
)
def test_distilled_unets_are_described_as_they_are(middle, kind):
    from diffusers import UNet2DConditionModel

    config = layout_unet.unet_config(distilled_unet(middle=middle, up_depths=(1, 3)))
    assert config["mid_block_type"] == kind
    assert config["layers_per_block"] == 1
    assert config["down_block_types"] == ("DownBlock2D", "CrossAttnDownBlock2D")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert len(unet.down_blocks[1].attentions[0].transformer_blocks) == 2
    assert [len(a.transformer_blocks) for a in unet.up_blocks[0].attentions] == [1, 3]
    names = layout_unet.names_to_original(unet.state_dict())
    structure = layout_unet.structure_of_original(names.values())
    assert structure == layout_unet.structure_of_original(distilled_unet(middle=middle, up_depths=(1, 3)))
    forth = layout_unet.names_to_diffusers(names.values())
    assert {forth[new]: new for new in names.values()} == names


def test_attention_behind_some_resnets_only_is_refused():
    with pytest.raises(ValueError, match="only some resnets"):
        layout_unet.unet_config(distilled_unet(middle="full", up_depths=(1, 0)))


def test_sd1_projections_are_written_as_convolutions_and_sd2_as_linear():
    name = "down_blocks.0.attentions.0.proj_in.weight"
    keys = ("down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight")
    for stored in ((4, 4), (4, 4, 1, 1)):
        tensors = {name: torch.zeros(stored), **{key: torch.zeros(4) for key in keys}}
        for linear in (True, False):
            shapes = layout_unet.to_original(tensors, linear_projection=linear).shapes
            assert shapes["input_blocks.1.1.proj_in.weight"] == ((4, 4) if linear else (4, 4, 1, 1))


# --- recognition -----------------------------------------------------------------------------------------------
def test_full_size_files_are_recognised_with_and_without_prefix():
    for name, kind in (("sd15", ModelKind.SD1), ("sd21", ModelKind.SD2)):
        shapes = full_size(name)
        assert recognise(shapes) is kind
        bare = {k.removeprefix("model.diffusion_model."): v for k, v in shapes.items() if k.startswith("model.diff")}
        assert recognise(bare) is kind


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "guidance_in.in_layer.weight": (8, 8)}, ModelKind.FLUX),
        ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, ModelKind.FLUX_SCHNELL),
        ({"joint_blocks.0.context_block.adaLN_modulation.1.bias": (8,)}, ModelKind.SD3),
        ({"first_stage_model.encoder.down.0.block.0.norm1.weight": (8,)}, ModelKind.VAE),
        ({"encoder.down_blocks.0.resnets.0.norm1.weight": (8,)}, ModelKind.VAE_DIFFUSERS),
        ({"encoder.layers.0.self_attn.q_proj.weight": (8, 8)}, ModelKind.CLIP),
        ({"encoder.block.0.layer.0.SelfAttention.k.weight": (8, 8)}, ModelKind.T5),
        ({"lora_unet_x.lora_down.weight": (4, 8)}, ModelKind.LORA),
        ({"something": (1,)}, ModelKind.UNKNOWN),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
                "model.diffusion_model.label_emb.0.0.weight": (128, 2816), "conditioner.embedders.1.model.x": (1,),
                "conditioner.embedders.0.transformer.x": (1,),
            },
            ModelKind.SDXL,
        ),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
                "model.diffusion_model.label_emb.0.0.weight": (128, 2560), "conditioner.embedders.0.model.x": (1,),
            },
            ModelKind.SDXL_REFINER,
        ),
    ],
)  # fmt: skip
def test_recognition_by_keys(keys, kind):
    assert recognise(keys) is kind


def test_the_wrong_model_is_named_and_the_expected_one_too():
    message = r"m\.safetensors looks like a Stable Diffusion 2\.x checkpoint, but the command expects .* 1\.x"
    with pytest.raises(ValueError, match=message):
        check_kind(full_size("sd21"), ModelKind.SD1, source="m.safetensors", option="--x")


@pytest.mark.parametrize("key", ["double_blocks.0.scale_weight", "a.absmax"])
def test_quantised_files_are_refused(key):
    with pytest.raises(ValueError, match="float weights"):
        check_kind({key: (1,)}, ModelKind.SD1, source="m", option="--x")


def test_harmless_extra_keys_are_left_out_and_strange_ones_reported(caplog):
    shapes = {
        "model.diffusion_model.out.2.bias": (4,), "model_ema.decay": (), "alphas_cumprod": (1000,), "v_pred": (),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        "cond_stage_model.transformer.final_layer_norm.bias": (8,), "first_stage_model.loss.logvar": (),
    }  # fmt: skip
    normal = layout_sd.normalize(meta_tensors(shapes))
    assert set(normal) == {
        "model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    }  # fmt: skip
    layout_sd.warn_of_foreign_keys(normal, v2=False)
    assert not caplog.records
    layout_sd.warn_of_foreign_keys(layout_sd.normalize(meta_tensors({**shapes, "strange": (1,)})), v2=False)
    assert "1 tensors belong to no part of the model and are not used: strange" in caplog.text


def test_hub_downloads_leave_out_what_nobody_reads():
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin",
        "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    wanted, unwanted = hub_patterns(".safetensors")
    assert list(filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=unwanted)) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    wanted, unwanted = hub_patterns(".safetensors", "fp16")
    variants = [n for n in filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=unwanted) if "fp16" in n]
    assert variants == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    wanted, unwanted = hub_patterns(".bin")
    pickles = [n for n in filter_repo_objects(files, allow_patterns=wanted, ignore_patterns=unwanted) if ".bin" in n]
    assert pickles == ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]


def test_component_weights_are_found_in_every_form_a_folder_may_have(tmp_path):
    for name in (
        "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors", "model.safetensors.index.fp16.json",
    ):  # fmt: skip
        (tmp_path / name).touch()
        variant = "fp16" if "fp16" in name else None
        assert part_file(tmp_path, "text_encoder", variant).name == name
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        part_file(tmp_path, "unet")


def test_mismatched_keys_are_listed():
    renamed = RenamedTensors({"a": torch.zeros(1)}, {"b": ("a", None)})
    with pytest.raises(ValueError, match="U-Net.*1 missing: c.*1 unexpected: b"):
        check_keys({"c": (1,)}, renamed.shapes, component="U-Net", source="file")
