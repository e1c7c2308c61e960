"""Keys of network files, taken apart in every spelling, and the strengths that their settings give."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from networks.naming import Part, take_apart
from networks.translation import PeftSettings, settings_in, to_own_names, without_cores

TEXT = "text_model.encoder.layers.0.mlp.fc1"
FLAT_TEXT = TEXT.replace(".", "_")
T5 = "encoder.block.0.layer.0.SelfAttention.q"
FLAT_T5 = T5.replace(".", "_")


@pytest.mark.parametrize(("path", "part", "number", "layer", "naming"), [
    # ours
    ("lora_unet_mid_block_q", Part.DENOISER, 0, "mid_block_q", "kohya"),
    ("oft_unet_mid_block_q", Part.DENOISER, 0, "mid_block_q", "kohya"),
    (f"lora_te_{FLAT_TEXT}", Part.CLIP, 1, FLAT_TEXT, "kohya"),
    (f"lora_te1_{FLAT_TEXT}", Part.CLIP, 1, FLAT_TEXT, "kohya"),
    (f"lora_te2_{FLAT_TEXT}", Part.CLIP, 2, FLAT_TEXT, "kohya"),
    (f"lora_te3_{FLAT_TEXT}", Part.CLIP, 3, FLAT_TEXT, "kohya"),
    (f"lora_te2_{FLAT_T5}", Part.T5, 2, FLAT_T5, "kohya"),
    (f"lora_te3_{FLAT_T5}", Part.T5, 3, FLAT_T5, "kohya"),
    # ours with dots
    ("lora_unet.mid_block.q", Part.DENOISER, 0, "mid_block_q", "dotted"),
    ("lora_unet_mid_block.q", Part.DENOISER, 0, "mid_block_q", "dotted"),
    (f"lora_te.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "dotted"),
    (f"lora_te1.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "dotted"),
    (f"lora_te2.{TEXT}", Part.CLIP, 2, FLAT_TEXT, "dotted"),
    (f"lora_te3.{T5}", Part.T5, 3, FLAT_T5, "dotted"),
    # other programs
    ("lora_transformer_blocks_0_q", Part.DENOISER, 0, "blocks_0_q", "OneTrainer"),
    ("diffusion_model.blocks.0.q", Part.DENOISER, 0, "blocks_0_q", "ComfyUI"),
    ("model.diffusion_model.blocks.0.q", Part.DENOISER, 0, "blocks_0_q", "ComfyUI"),
    (f"text_encoders.clip_l.transformer.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "ComfyUI"),
    (f"clip_h.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "ComfyUI"),
    (f"clip_g.transformer.{TEXT}", Part.CLIP, 2, FLAT_TEXT, "ComfyUI"),
    (f"text_encoders.t5xxl.transformer.{T5}", Part.T5, 3, FLAT_T5, "ComfyUI"),
    (f"t5.{T5}", Part.T5, 3, FLAT_T5, "ComfyUI"),
    ("unet.mid_block.q", Part.DENOISER, 0, "mid_block_q", "diffusers"),
    ("transformer.blocks.0.q", Part.DENOISER, 0, "blocks_0_q", "diffusers"),
    (f"text_encoder.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "diffusers"),
    (f"text_encoder_2.{TEXT}", Part.CLIP, 2, FLAT_TEXT, "diffusers"),
    (f"text_encoder_2.{T5}", Part.T5, 2, FLAT_T5, "diffusers"),
    (f"text_encoder_3.{T5}", Part.T5, 3, FLAT_T5, "diffusers"),
    (f"cond_stage_model.transformer.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "checkpoint"),
    (f"conditioner.embedders.0.transformer.{TEXT}", Part.CLIP, 1, FLAT_TEXT, "checkpoint"),
    (f"lycoris_{FLAT_TEXT}", Part.CLIP, 1, FLAT_TEXT, "LyCORIS wrapper"),
    ("lycoris_encoder_layers_0_fc1", Part.CLIP, 1, "text_model_encoder_layers_0_fc1", "LyCORIS wrapper"),
    (f"lycoris_{FLAT_T5}", Part.T5, 1, FLAT_T5, "LyCORIS wrapper"),
    ("lycoris_mid_block_q", Part.DENOISER, 0, "mid_block_q", "LyCORIS wrapper"),
    # no prefix at all
    (TEXT, Part.CLIP, 1, FLAT_TEXT, "bare paths"),
    ("encoder.layers.0.fc1", Part.CLIP, 1, "text_model_encoder_layers_0_fc1", "bare paths"),
    (T5, Part.T5, 1, FLAT_T5, "bare paths"),
    ("mid_block.q", Part.DENOISER, 0, "mid_block_q", "bare paths"),
])  # fmt: skip
def test_every_spelling_of_a_path(path: str, part: Part, number: int, layer: str, naming: str) -> None:
    for parameter in ("lora_down.weight", "alpha", "hada_w1_a"):
        key = take_apart(f"{path}.{parameter}")
        assert key is not None
        assert (key.part, key.number, key.layer, key.parameter) == (part, number, layer, parameter)
        assert key.naming == naming


@pytest.mark.parametrize(("ending", "parameter", "naming"), [
    (".lora_A.weight", "lora_down.weight", "PEFT"), (".lora_B.default.weight", "lora_up.weight", "PEFT"),
    (".lora_B.bias", "lora_up.bias", "PEFT"), (".lora_magnitude_vector", "dora_scale", "PEFT"),
    (".lora_magnitude_vector.default.weight", "dora_scale", "PEFT"),
    (".lora.down.weight", "lora_down.weight", "diffusers"),
    (".lora_linear_layer.up.weight", "lora_up.weight", "diffusers"),
    (".lora_mid.weight", "lora_mid.weight", "bare paths"), (".b1.weight", "b1.weight", "bare paths"),
    (".dora_scale", "dora_scale", "bare paths"), (".oft_blocks", "oft_blocks", "bare paths"),
    (".lora_up.bias", "lora_up.bias", "bare paths"),
])  # fmt: skip
def test_every_spelling_of_a_parameter(ending: str, parameter: str, naming: str) -> None:
    for wrapper in ("", "base_model.model."):
        key = take_apart(f"{wrapper}mid_block.q{ending}")
        assert key is not None and (key.part, key.layer) == (Part.DENOISER, "mid_block_q")
        assert (key.parameter, key.naming) == (parameter, naming)


@pytest.mark.parametrize(("key", "part", "layer"), [
    ("unet.mid_block.attn1.processor.to_out_lora.down.weight", Part.DENOISER, "mid_block_attn1_to_out_0"),
    ("unet.mid_block.attn1.processor.to_q_lora.up.weight", Part.DENOISER, "mid_block_attn1_to_q"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight", Part.CLIP,
     "text_model_encoder_layers_0_self_attn_q_proj"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight", Part.CLIP,
     "text_model_encoder_layers_0_self_attn_out_proj"),
])  # fmt: skip
def test_attention_processors_are_layers(key: str, part: Part, layer: str) -> None:
    taken = take_apart(key)
    assert taken is not None and (taken.part, taken.layer, taken.naming) == (part, layer, "diffusers")


@pytest.mark.parametrize("key", ["", "weight", ".weight"])
def test_what_has_no_path_is_no_key_of_a_network(key: str) -> None:
    assert take_apart(key) is None


# --- strengths -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("config", "path", "alpha"), [
    ({}, "a.q", None), ({"lora_alpha": 8}, "a.q", 8), ({"lora_alpha": 8, "use_rslora": True}, "a.q", 16),
    ({"use_rslora": True}, "a.q", None), ({"lora_alpha": 8, "alpha_pattern": None}, "a.q", 8),
    ({"lora_alpha": 8, "alpha_pattern": {"q": 2}}, "a.q", 2), ({"lora_alpha": 8, "alpha_pattern": {"q": 2}}, "q", 2),
    ({"lora_alpha": 8, "alpha_pattern": {"q": 2}}, "a.to_q", 8),
    ({"lora_alpha": 8, "alpha_pattern": {"a": 2}}, "a.q", 8),
    ({"alpha_pattern": {"a.q": 2, "q": 3}}, "a.q", 2), ({"alpha_pattern": {"q": 2}, "use_rslora": True}, "a.q", 4),
])  # fmt: skip
def test_alphas_of_peft_are_those_of_the_same_scale(config: dict, path: str, alpha: float | None) -> None:
    assert PeftSettings.read(config).alpha_of(path, rank=4) == alpha


def test_settings_belong_to_components() -> None:
    entries = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True,
               "text_encoder_2.alpha_pattern": {"fc1": 2}}  # fmt: skip
    settings = settings_in({"lora_adapter_metadata": json.dumps(entries)})
    paths = ["unet.mid_block.q", f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}", f"text_encoder_2.{TEXT}0"]
    weights = {f"{path}.lora_{side}.weight": torch.ones(4, 4) for path in paths for side in "AB"}
    own = to_own_names(weights, "sdxl", settings)
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in own.items() if key.endswith(".alpha")}
    assert alphas == {"lora_unet_mid_block_q": 8, f"lora_te1_{FLAT_TEXT}": 12, f"lora_te2_{FLAT_TEXT}": 2}
    assert settings_in({}) == {}


def test_an_alpha_in_the_file_counts_more_than_settings() -> None:
    weights = {"unet.q.lora_A.weight": torch.ones(4, 4), "unet.q.lora_B.weight": torch.ones(4, 4),
               "unet.q.alpha": torch.tensor(3.0), "unet.k.lora_A.weight": torch.ones(4, 4)}  # fmt: skip
    own = to_own_names(weights, "sd", {"": PeftSettings(alpha=5.0)})
    assert (float(own["lora_unet_q.alpha"]), float(own["lora_unet_k.alpha"])) == (3.0, 5.0)


# --- layers that are put together or turned --------------------------------------------------------------------
def peft(layer: str, rank: int = 2, out: int = 4, into: int = 3) -> dict[str, Tensor]:
    """Random factors of a layer."""
    return {f"{layer}.lora_A.weight": torch.randn(rank, into), f"{layer}.lora_B.weight": torch.randn(out, rank)}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_only_a_modulation_of_scale_and_shift_is_turned(family: str) -> None:
    name = "lora_unet_final_layer_adaLN_modulation_1"
    for out, is_turned in ((6, True), (18, False)):
        given = peft("transformer.norm_out.linear", out=out)
        own = to_own_names(given, family)
        down, up = given.values()
        assert torch.equal(own[f"{name}.lora_down.weight"], down)
        assert torch.equal(own[f"{name}.lora_up.weight"], torch.cat([up[3:], up[:3]]) if is_turned else up)
    for key, value in given.items():
        assert [*to_own_names({key: value}, family).values()] == [value], "what is incomplete is left as it is"


Q, K = "transformer.single_transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(("weights", "said"), [
    ({**peft(Q), **peft(f"lora_unet.{Q.removeprefix('transformer.')}")}, "two keys of the file mean lora_unet_single"),
    ({**peft("transformer.single_transformer_blocks.0.proj_out"), **peft("lora_unet.single_blocks.0.linear2")},
     "the file has lora_unet_single_blocks_0_linear2 twice, under different names"),
    ({**peft(Q), **peft("lora_unet.single_blocks.0.linear1")}, "linear1 twice, under different names"),
    ({**peft(Q), f"{K}.lora_A.weight": torch.ones(2, 3)}, "to_k is a part of .*linear1, but no complete LoRA"),
    ({**peft(Q), f"{Q}.lora_magnitude_vector": torch.ones(4)}, "to_q is a part of .*linear1, but no complete LoRA"),
    ({f"{Q}.lora_A.weight": torch.ones(2, 3), f"{Q}.lora_B.weight": torch.ones(4, 5)},
     r"\[4, 5\] and \[2, 3\] do not fit"),
    ({**peft(Q), **peft(K, out=8)}, "the parts of .*linear1 have different sizes"),
    ({**peft(Q), **peft(K, into=5)}, "the parts of .*linear1 have different sizes"),
])  # fmt: skip
def test_parts_that_make_no_layer_are_named(weights: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        to_own_names(weights, "flux")


def test_parts_with_one_factor_and_one_strength_keep_their_rank() -> None:
    shared = torch.randn(2, 3)
    for alpha, rank in ((4.0, 2), (1.0, 4)):
        parts = {**peft(Q), **peft(K), f"{Q}.alpha": torch.tensor(4.0), f"{K}.alpha": torch.tensor(alpha)}
        parts[f"{Q}.lora_A.weight"] = parts[f"{K}.lora_A.weight"] = shared
        alpha_key, down, up = to_own_names(parts, "flux").values()
        assert down.shape[0] == up.shape[1] == rank
        change = float(alpha_key) / rank * up @ down
        assert torch.allclose(change[:4], 4.0 / 2 * parts[f"{Q}.lora_B.weight"] @ shared, atol=1e-5)
        assert torch.allclose(change[4:8], alpha / 2 * parts[f"{K}.lora_B.weight"] @ shared, atol=1e-5)
        assert not change[8:].any()


@pytest.mark.parametrize(("down", "middle"), [
    (None, torch.ones(3, 3, 3, 3)), (torch.ones(2, 8, 1, 1), torch.ones(3, 3, 3, 3)),
    (torch.ones(3, 8, 1, 1), torch.ones(3, 3)),
])  # fmt: skip
def test_a_core_needs_a_factor_that_fits(down: Tensor | None, middle: Tensor) -> None:
    weights = {"a.lora_mid.weight": middle, "a.lora_up.weight": torch.ones(6, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"^a: a Tucker core \(lora_mid\) without a lora_down that fits it"):
        without_cores(weights if down is None else {**weights, "a.lora_down.weight": down})
