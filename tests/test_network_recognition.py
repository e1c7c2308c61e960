"""What the keys and shapes of a network file say about the model family that it is for."""

from __future__ import annotations

import pytest

from networks.recognition import check_kind, describe, family_in

CLIP_G = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"


def family_of(*layers: str, width: int = 0) -> str | None:
    """The family of a plain LoRA for these layers in the naming of PEFT; `width`: of all inputs, 0 if not known."""
    keys = [f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"]
    shapes = {key: (4, width) if key.endswith("lora_A.weight") else (width, 4) for key in keys} if width else {}
    return describe(keys, shapes).family


@pytest.mark.parametrize(("family", "layers", "width"), [
    # blocks that only one family has
    ("flux", ["single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"], 0),
    ("flux", ["double_blocks.0.img_attn.proj"], 0),
    ("sd3", ["joint_blocks.0.x_block.attn.proj"], 0),
    # blocks that both name alike: one layer or number of the other is enough, among any others
    (None, ["transformer_blocks.0.attn.to_q"], 0),
    ("sd3", ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn2.to_q"], 0),
    (None, ["transformer_blocks.0.attn.to_q", "transformer_blocks.18.attn.to_q"], 0),
    ("sd3", ["transformer_blocks.0.attn.to_q", "transformer_blocks.19.attn.to_q"], 0),
    # widths of the models there are
    ("flux", ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"], 3072),
    ("sd3", ["transformer_blocks.0.attn.to_q"], 1536),
    ("sd3", ["transformer_blocks.0.attn.to_q"], 2432),
    (None, ["transformer_blocks.0.attn.to_q"], 1152),
    # blocks of that name in models of nobody here
    (None, ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_q"], 1536),
    (None, ["layers.0.attention.to_q"], 3072),
])  # fmt: skip
def test_transformers_are_told_apart(family: str | None, layers: list[str], width: int) -> None:
    assert family_of(*(f"transformer.{layer}" for layer in layers), width=width) == family


def test_a_second_clip_encoder_beside_shared_block_names_is_of_sd3() -> None:
    block = "transformer.transformer_blocks.0.attn.to_q"
    assert family_of(block, CLIP_G) == "sd3"
    assert family_of(block, CLIP_G.replace("encoder_2", "encoder")) is None


@pytest.mark.parametrize(("family", "layers", "width"), [
    ("sd", ["down_blocks.0.attentions.0.proj_in"], 0),
    ("sd", ["up_blocks.3.attentions.0.proj_in", "mid_block.attentions.0.proj_in"], 0),
    ("sdxl", ["up_blocks.0.attentions.0.proj_in"], 0),
    ("sdxl", ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.9.attn1.to_q"], 0),
    # what both have: the width of the text decides, where there is one
    (None, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 0),
    ("sd", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 768),
    ("sd", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"], 1024),
    ("sdxl", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 2048),
    (None, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 4096),
    (None, ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"], 768),
    # layers that contradict each other
    ("sdxl", ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.0.attentions.0.proj_in"], 2048),
    (None, ["down_blocks.0.attentions.0.proj_in", "up_blocks.0.attentions.0.proj_in"], 0),
])  # fmt: skip
def test_unets_are_told_apart(family: str | None, layers: list[str], width: int) -> None:
    assert family_of(*(f"unet.{layer}" for layer in layers), width=width) == family


def test_a_second_clip_encoder_beside_a_unet_is_of_sdxl() -> None:
    middle = "unet.mid_block.attentions.0.proj_in"
    assert family_of(middle, CLIP_G) == "sdxl"
    assert family_of(middle, CLIP_G.replace("encoder_2", "encoder")) is None


def test_two_widths_of_text_say_nothing() -> None:
    blocks = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{letter}.lora_A.weight" for letter in "kv"]
    kind = describe(blocks, {blocks[0]: (4, 768), blocks[1]: (4, 2048)})
    assert (kind.family, kind.context_width) == (None, None)
    assert describe(blocks, dict.fromkeys(blocks, (4, 1024))).context_width == 1024


def test_text_encoders_alone_are_known_by_our_name_for_the_only_one() -> None:
    layer = "text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    one, first = describe([f"lora_te_{layer}"]), describe([f"lora_te1_{layer}"])
    assert (one.family, one.has_denoiser) == ("sd", False)
    assert first.family is None
    assert describe([f"lora_te_{layer}", f"lora_te2_{layer}"]).family is None


@pytest.mark.parametrize(("said", "family"), [
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "sd3"),
    ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"), ({"ss_base_model_version": "flux1"}, "flux"),
    ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd"), ({"ss_base_model_version": "sd_v2_768_v"}, "sd"),
    ({"modelspec.architecture": "other", "ss_base_model_version": "sd_v1"}, "sd"), ({}, None),
    ({"modelspec.title": "flux"}, None),
])  # fmt: skip
def test_metadata_names_the_family(said: dict[str, str], family: str | None) -> None:
    assert family_in(said) == family


@pytest.mark.parametrize(("keys", "family", "said"), [
    (["q.weight"], "sd", "is no network file"),
    (["lora_unet_mid_block_q.hada_w1_a"], None, "is a LoHa, which cannot be.* lycoris.kohya"),
    (["lora_unet_mid_block_q.oft_blocks"], "sd", "is an OFT, which cannot be.* lycoris.kohya"),
    (["unet.mid_block.q.dora_scale"], "sd", "is a DoRA, which cannot be.* merge it into the model with the program"),
    (["lllite_unet_q.down.0.weight"], "sdxl", "is a ControlNet-LLLite for SDXL, .* a control network, not a LoRA"),
    (["lora_unet_joint_blocks_0_q.hada_w1_a"], "flux",
     r"is a LoHa for Stable Diffusion 3 or 3\.5; the model here is FLUX\.1\. Use it with sd3_train_network\.py or "
     r"sd3_minimal_inference\.py \(--network_module networks\.lora_sd3\)"),
])  # fmt: skip
def test_what_cannot_be_used_here_is_said_with_what_can_use_it(keys: list[str], family: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^the file {said}"):
        check_kind(describe(keys), family, source="the file")


@pytest.mark.parametrize("family", ["sd", None])
def test_a_plain_lora_is_used_where_its_family_or_the_models_is_not_known(family: str | None) -> None:
    check_kind(describe(["lora_unet_mid_block_q.lora_down.weight"]), family, source="the file")
    check_kind(describe(["lora_unet_down_blocks_0_attentions_0_q.lora_down.weight"]), family, source="the file")
