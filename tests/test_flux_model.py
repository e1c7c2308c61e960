"""The FLUX transformer against diffusers' and against a recorded step; its file layouts both ways."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from library.checkpoints import layout_flux, layout_vae
from library.checkpoints.recognition import UNET_PREFIX, ModelKind, recognise
from library.checkpoints.tensors import TensorDict, load_tensors, open_tensors, save_tensors, shapes_of
from library.models.flux import (
    Flux,
    FluxParams,
    FluxResiduals,
    build_flux,
    image_ids,
    pack_latents,
    rotation,
    unpack_latents,
)
from networks.targets import find_targets
from tests.golden import FOLDER, golden_run

DATA = Path(__file__).parent / "data"
TINY = FluxParams(
    in_channels=16, out_channels=16, hidden_size=64, num_heads=2, context_width=24, vector_width=12, time_width=32,
    mlp_width=256, single_mlp_width=256, double_depth=2, single_depth=3, axes_dims=(4, 14, 14), qkv_bias=True,
    guidance=True,
)  # fmt: skip
LATENT_HW = (6, 8)
TEXT_TOKENS = 5


def tiny_flux(params: FluxParams = TINY) -> Flux:
    torch.manual_seed(0)
    model = Flux(params)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn_like(value) * 0.1 + name.endswith("scale"))
    return model.eval()


def inputs(params: FluxParams = TINY, *, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "img": draw(batch, LATENT_HW[0] * LATENT_HW[1] // 4, params.in_channels),
        "img_ids": image_ids(batch, LATENT_HW),
        "txt": draw(batch, TEXT_TOKENS, params.context_width),
        "timesteps": torch.linspace(0.3, 0.9, batch),
        "y": draw(batch, params.vector_width),
        "guidance": torch.linspace(1.0, 3.5, batch),
    }


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(DATA / f"keys_{name}.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items() if key != "_about"}


def meta_tensors(shapes: Mapping[str, tuple[int, ...]]) -> TensorDict:
    tensors = {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}
    return TensorDict(tensors, source="full-size model")


# --- packing ---------------------------------------------------------------------------------------------------
def test_packing_and_positions_are_as_recorded():
    section = json.loads((DATA / "golden_math.json").read_text("utf-8"))["flux_pack"]

    def recorded(name: str) -> Tensor:
        return torch.tensor(section[name]["values"]).reshape(section[name]["shape"])

    latents = torch.arange(144.0).reshape(2, 3, 4, 6)
    packed = pack_latents(latents)
    assert torch.equal(packed, recorded("packed"))
    assert torch.equal(unpack_latents(packed, (4, 6)), latents)
    assert torch.equal(image_ids(1, (4, 6)), recorded("img_ids_for_packed_2x3"))
    assert torch.equal(image_ids(2, (4, 6))[1], image_ids(1, (4, 6))[0])


def test_odd_latents_are_refused():
    with pytest.raises(ValueError, match="even height and width, given 4x5"):
        pack_latents(torch.zeros(1, 16, 4, 5))


def test_rotation_depends_only_on_distances():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)

    def score(query_at: list[float], key_at: list[float]) -> Tensor:
        turns = [rotation(torch.tensor([[at]]), TINY.axes_dims) for at in (query_at, key_at)]
        return (turns[0](q) * turns[1](k)).sum()

    assert_close(score([0, 3, 5], [0, 1, 9]), score([0, 13, 25], [0, 11, 29]), rtol=1e-5, atol=1e-5)
    assert abs(score([0, 3, 5], [0, 1, 9]) - score([0, 3, 5], [0, 1, 8])) > 1e-2


# --- diffusers -------------------------------------------------------------------------------------------------
def diffusers_twin(model: Flux) -> Any:
    """diffusers' transformer of the same sizes and weights; loading is strict in names and shapes."""
    from diffusers import FluxTransformer2DModel

    params = model.params
    twin = FluxTransformer2DModel(
        in_channels=params.in_channels, out_channels=params.out_channels, num_layers=params.double_depth,
        num_single_layers=params.single_depth, attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads, joint_attention_dim=params.context_width,
        pooled_projection_dim=params.vector_width, guidance_embeds=params.guidance, axes_dims_rope=params.axes_dims,
    )  # fmt: skip
    converted = layout_flux.to_diffusers(model.state_dict())
    twin.load_state_dict({key: converted[key] for key in converted})
    return twin.eval()


def run_twin(twin: Any, given: dict[str, Tensor], **residuals: Any) -> Tensor:
    return twin(
        hidden_states=given["img"], encoder_hidden_states=given["txt"], pooled_projections=given["y"],
        timestep=given["timesteps"], guidance=given.get("guidance"), img_ids=given["img_ids"][0],
        txt_ids=torch.zeros(given["txt"].shape[1], 3), return_dict=False, **residuals,
    )[0]  # fmt: skip


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_forward_equals_diffusers(guidance):
    params = replace(TINY, guidance=guidance, time_width=256, out_channels=8)  # diffusers' sinusoid is 256 wide
    model, given = tiny_flux(params), inputs(params)
    twin = diffusers_twin(model)
    if not guidance:
        del given["guidance"]
    with torch.no_grad():
        expected = run_twin(twin, given)
        result = model(**given)
        assert relative_error(result, expected) < 1e-5
        back = layout_flux.to_original(twin.state_dict())
        assert relative_error(build_flux(back, dtype=torch.float32)(**given), expected) < 1e-5
        other_guidance = model(**{**given, "guidance": torch.full((2,), 7.0)})
    assert torch.equal(other_guidance, result) is not guidance  # without the input it makes no difference


def test_residuals_of_double_blocks_equal_diffusers():
    params = replace(TINY, time_width=256)
    model, given = tiny_flux(params), inputs(params)
    residuals = tuple(torch.randn(2, 2, 12, 64, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        expected = run_twin(diffusers_twin(model), given, controlnet_block_samples=residuals)
        assert relative_error(model(**given, residuals=FluxResiduals(double=residuals)), expected) < 1e-5
        assert relative_error(model(**given), expected) > 1e-2


# --- behaviour -------------------------------------------------------------------------------------------------
def test_residuals_repeat_and_reach_all_tokens_of_single_blocks():
    model, given = tiny_flux(), inputs()
    a, b = torch.randn(2, 2, TEXT_TOKENS + 12, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result = model(**given, residuals=FluxResiduals(single=(a, b)))
        hooks = [
            block.register_forward_hook(lambda module, args, output, added=added: output + added)
            for block, added in zip(model.single_blocks, (a, b, a), strict=True)
        ]
        expected = model(**given)
        for hook in hooks:
            hook.remove()
    assert torch.equal(result, expected)
    assert not torch.equal(model(**given), expected)


def test_masked_text_tokens_do_not_count():
    model, given = tiny_flux(), inputs(batch=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        short = model(**{**given, "txt": given["txt"][:, :3]})
        assert relative_error(model(**given, text_mask=mask), short) < 1e-5
        assert relative_error(model(**given, text_mask=torch.ones(1, 5)), model(**given)) < 1e-5
        assert relative_error(model(**given), short) > 1e-3


def test_gradient_checkpointing_changes_nothing_but_what_is_kept():
    model, given = tiny_flux().train(), inputs()
    calls = {False: 0, True: 0}
    gradients: dict[bool, dict[str, Tensor]] = {}
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()

        def count(*_: Any, key: bool = checkpointing) -> None:
            calls[key] += 1

        hooks = [block.register_forward_pre_hook(count) for block in (*model.double_blocks, *model.single_blocks)]
        model.zero_grad()
        model(**given).square().mean().backward()
        gradients[checkpointing] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for hook in hooks:
            hook.remove()
    assert calls == {False: 5, True: 10}
    assert set(gradients[False]) == {name for name, _ in model.named_parameters()}
    assert_close(gradients[True], gradients[False], rtol=0, atol=0)


def test_time_is_not_rounded_to_the_precision_of_the_computation():
    model = tiny_flux().bfloat16()
    given = {key: value.bfloat16() for key, value in inputs().items() if key not in ("img_ids", "timesteps")}
    given["img_ids"] = inputs()["img_ids"]
    near = torch.tensor([0.5, 0.5]), torch.tensor([0.501, 0.501])
    assert torch.equal(near[0].bfloat16(), near[1].bfloat16())
    with torch.no_grad():
        first, second = (model(**given, timesteps=timesteps) for timesteps in near)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)


def test_unfit_inputs_are_refused():
    model, given = tiny_flux(), inputs()
    with pytest.raises(ValueError, match="needs a guidance value"):
        model(**{**given, "guidance": None})
    with pytest.raises(ValueError, match="16 channels per packed token, given 8"):
        model(**{**given, "img": given["img"][..., :8]})
    with pytest.raises(ValueError, match=r"add up to 32; given: \[8, 28, 28\]"):
        replace(TINY, axes_dims=(8, 28, 28))


# --- files -----------------------------------------------------------------------------------------------------
def test_full_size_model_is_built_from_shapes_alone():
    shapes = full_size("flux_dev")
    params = FluxParams(**layout_flux.transformer_config(shapes))
    assert params == FluxParams(
        in_channels=64, out_channels=64, hidden_size=3072, num_heads=24, context_width=4096, vector_width=768,
        time_width=256, mlp_width=12288, single_mlp_width=12288, double_depth=19, single_depth=38,
        axes_dims=(16, 56, 56), qkv_bias=True, guidance=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Flux(params)
    assert shapes_of(model.state_dict()) == shapes
    schnell = {key: shape for key, shape in shapes.items() if not key.startswith("guidance_in.")}
    with torch.device("meta"):
        model = Flux(FluxParams(**layout_flux.transformer_config(schnell)))
    assert shapes_of(model.state_dict()) == schnell
    assert [recognise(keys) for keys in (shapes, schnell)] == [ModelKind.FLUX, ModelKind.FLUX_SCHNELL]


def test_full_size_names_go_to_diffusers_and_back():
    shapes = full_size("flux_dev")
    diffusers = layout_flux.to_diffusers(meta_tensors(shapes))
    assert recognise(diffusers.shapes) is ModelKind.FLUX_DIFFUSERS
    assert len(diffusers) == 780 + 19 * 2 * 2 * 2 + 38 * 3 * 2
    back = layout_flux.transformer_tensors(diffusers)
    assert back.shapes == shapes
    assert set(back.dtypes.values()) == {torch.bfloat16}


def test_lora_targets_of_the_full_size_model():
    record = json.loads((DATA / "lora_modules_flux.json").read_text("utf-8"))
    with torch.device("meta"):
        model = Flux(FluxParams(**layout_flux.transformer_config(full_size("flux_dev"))))
    found = find_targets(model, "lora_unet", ("DoubleStreamBlock", "SingleStreamBlock"))
    found_rows = [(t.name, t.path, t.layer.in_features, t.layer.out_features) for t in found]
    assert found_rows == [(row["name"], row["path"], row["in"], row["out"]) for row in record["unet"]]
    for row in record["in_dims_extra"]:
        layer = model.get_submodule(row["path"])
        assert row["name"] == "lora_unet_" + row["path"].replace(".", "_")
        assert (type(layer).__name__, layer.in_features, layer.out_features) == (row["type"], row["in"], row["out"])


def test_values_survive_the_way_to_diffusers_and_back():
    weights = tiny_flux().state_dict()
    back = layout_flux.to_original(layout_flux.to_diffusers(weights))
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("order", [1, -1], ids=["transformer first", "companions first"])
def test_a_file_with_prefixes_and_companions_loads(tmp_path, order):
    weights = tiny_flux().state_dict()
    prefixed = {UNET_PREFIX + key: value for key, value in weights.items() if not key.startswith("img_in")}
    rest = {key: value for key, value in weights.items() if key.startswith("img_in")}
    rest["vae.encoder.conv_in.weight"] = torch.zeros(1)
    rest["text_encoders.t5xxl.transformer.shared.weight"] = torch.ones(1)
    everything = dict(list((prefixed | rest).items())[::order])
    save_tensors(tmp_path / "all.safetensors", everything)
    for tensors in (open_tensors(tmp_path / "all.safetensors"), TensorDict(everything, source="memory")):
        model = build_flux(layout_flux.transformer_tensors(tensors), dtype=torch.bfloat16)
        assert_close(dict(model.state_dict()), {key: value.bfloat16() for key, value in weights.items()})
        assert not any(value.requires_grad for value in model.parameters())


def test_other_widths_and_depths_come_from_shapes():
    params = replace(
        TINY, in_channels=96, double_depth=1, single_depth=1, mlp_width=96, single_mlp_width=160, qkv_bias=False,
        guidance=False,
    )  # fmt: skip
    weights = tiny_flux(params).state_dict()
    assert build_flux(weights, dtype=None).params == params
    other_axes = build_flux(weights, dtype=None, axes_dims=(8, 12, 12))
    assert other_axes.params == replace(params, axes_dims=(8, 12, 12))
    without_bias = layout_flux.to_original(layout_flux.to_diffusers(weights))
    assert set(without_bias) == set(weights)


@pytest.mark.parametrize(("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14))])
def test_rotary_widths_follow_the_width_of_a_head(head_dim, axes):
    assert layout_flux.default_axes(head_dim) == axes


def test_unfit_files_are_refused_with_the_key():
    weights = dict(tiny_flux().state_dict())
    with pytest.raises(ValueError, match="1 unexpected: distilled.weight"):
        build_flux(layout_flux.transformer_tensors({**weights, "distilled.weight": torch.zeros(1)}), dtype=None)
    with pytest.raises(ValueError, match="1 missing: txt_in.bias"):
        build_flux({key: value for key, value in weights.items() if key != "txt_in.bias"}, dtype=None)
    with pytest.raises(ValueError, match=r"img_in\.weight is missing"):
        build_flux({"shared.weight": torch.zeros(1)}, dtype=None)
    gap = {key: value for key, value in weights.items() if not key.startswith("single_blocks.1.")}
    with pytest.raises(ValueError, match=r"single_blocks has numbers up to 2, but none of \[1\]"):
        build_flux(gap, dtype=None)
    with pytest.raises(ValueError, match=r"img_in\.bias is there twice"):
        layout_flux.transformer_tensors({**weights, UNET_PREFIX + "img_in.bias": weights["img_in.bias"]})
    with pytest.raises(ValueError, match="scaled fp8"):
        layout_flux.transformer_tensors({**weights, "img_in.scale_weight": torch.ones(1)})


def test_incomplete_and_unknown_diffusers_names_are_refused():
    converted = layout_flux.to_diffusers(tiny_flux().state_dict())
    tensors = {key: converted[key] for key in converted}
    name = "single_transformer_blocks.2.attn.to_k.weight"
    with pytest.raises(ValueError, match=rf"{name} missing, which single_blocks\.2\.linear1\.weight is made of"):
        layout_flux.to_original({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match="1 keys do not belong .*: x_embedder.extra"):
        layout_flux.to_original({**tensors, "x_embedder.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 keys do not belong .*: img_out.weight"):
        layout_flux.to_diffusers({**tiny_flux().state_dict(), "img_out.weight": torch.zeros(1)})


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder_names_go_to_diffusers_and_back(prefix):
    from diffusers import AutoencoderKL

    shapes = full_size("flux_ae")
    file = {prefix + key: shape for key, shape in shapes.items()}
    if prefix:
        file |= {UNET_PREFIX + "img_in.weight": (64, 64)}
    part = layout_flux.autoencoder_tensors(meta_tensors(file))
    config = layout_vae.vae_config(part.shapes)
    assert (config["latent_channels"], config["use_quant_conv"]) == (16, False)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    assert shapes_of(vae.state_dict()) == part.shapes
    assert layout_vae.to_compvis(part).shapes == shapes
    assert len(layout_flux.autoencoder_tensors(meta_tensors(full_size("flux_dev")))) == 0


# --- a recorded step -------------------------------------------------------------------------------------------
def encode_recorded(caption: str) -> tuple[Tensor, Tensor]:
    """T5 states [1,512,256] (padding attended) and pooled CLIP [1,64], with transformers' own classes."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    tokenizers, models = FOLDER / "tokenizers", FOLDER / "models"
    clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "openai_clip-vit-large-patch14")
    t5_tokenizer = T5TokenizerFast.from_pretrained(tokenizers / "google_t5-v1_1-xxl")
    special = {"bos_token_id": clip_tokenizer.bos_token_id, "eos_token_id": clip_tokenizer.eos_token_id}
    clip_config = CLIPTextConfig(
        vocab_size=768, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1,
        hidden_act="quick_gelu", projection_dim=64, **special,
    )  # fmt: skip
    clip = CLIPTextModelWithProjection(clip_config).eval()
    clip.load_state_dict(load_tensors(models / "clip_l_tiny.safetensors", dtype=torch.float32))
    t5_config = T5Config(
        vocab_size=288, d_model=256, d_kv=32, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        attn_implementation="eager",  # the recording's; torch's fused attention rounds differently by 2e-5
    )  # fmt: skip
    t5 = T5EncoderModel(t5_config).eval()
    t5_weights = load_tensors(models / "t5xxl_tiny.safetensors", dtype=torch.float32)
    t5.load_state_dict({**t5_weights, "encoder.embed_tokens.weight": t5_weights["shared.weight"]})

    def ids(tokenizer: Any, length: int) -> Tensor:
        encoded = tokenizer(caption, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return encoded.input_ids

    with torch.no_grad():
        txt = t5(input_ids=ids(t5_tokenizer, 512)).last_hidden_state
        pooled = clip.text_model(input_ids=ids(clip_tokenizer, 77)).pooler_output
    return txt, pooled


def assert_as_recorded(tensor: Tensor, record: Mapping[str, Any]) -> None:
    assert list(tensor.shape) == record["shape"]
    first = torch.tensor(record["first"])
    assert_close(tensor.flatten()[: len(first)], first, rtol=1e-5, atol=1e-6)
    assert tensor.mean().item() == pytest.approx(record["mean"], rel=1e-5, abs=1e-6)
    if tensor.numel() > 1:
        assert tensor.std().item() == pytest.approx(record["std"], rel=1e-5, abs=1e-6)


def test_first_recorded_step_is_reproduced():
    run = golden_run("flux_lora_shift")
    step = run.steps[0]
    model = build_flux(
        layout_flux.transformer_tensors(open_tensors(FOLDER / "models" / "flux_tiny.safetensors")), dtype=torch.float32
    )
    assert (model.params.num_heads, model.params.axes_dims) == (2, (4, 14, 14))
    latents, noise = run.tensors[f"latents.{step['image_keys'][0]}"][None], run.tensors["noise.0"]
    timesteps = run.tensors["timesteps.0"] / 1000
    sigma = timesteps[:, None, None, None]
    img = pack_latents((1 - sigma) * latents + sigma * noise)
    txt, y = encode_recorded(step["captions"][0])
    given = {
        "img": img, "img_ids": image_ids(1, latents.shape[-2:]), "txt": txt, "y": y, "timesteps": timesteps,
        "guidance": torch.ones(1),
    }  # fmt: skip
    for name, value in given.items():
        assert_as_recorded(value, step["model_call"][name])
    with torch.no_grad():
        output = model(**given)
    assert_as_recorded(output, step["model_output"])
    first = torch.tensor(step["model_output"]["first"])
    assert relative_error(output.flatten()[:8], first) < 1e-5
    loss = (unpack_latents(output, tuple(latents.shape[-2:])) - (noise - latents)).square().mean()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
