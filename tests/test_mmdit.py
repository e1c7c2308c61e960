"""The SD3 transformer and its files: against diffusers, against full-size key lists, against a recorded run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library import sd3_model_util
from library.checkpoints import layout_clip, layout_sd3, layout_vae
from library.checkpoints.recognition import ModelKind, recognise
from library.checkpoints.tensors import TensorDict, open_tensors, save_tensors, shapes_of
from library.encoder_files import find_encoder
from library.models import mmdit
from library.models.mmdit import MMDiT, MMDiTParams, ScaledPositions, build_mmdit, crop_positions, position_table
from library.models.text_encoders import build_clip
from networks.targets import find_targets
from tests.golden import FOLDER, golden_run

DATA = Path(__file__).parent / "data"
FULL_SIZE = {"sd3_medium": ("medium", 237), "sd35_large": ("5-large", 377), "sd35_medium": ("5-medium", 263)}
#: what diffusers calls the three published structures, at a size for tests; heads of 64, as files without norms have
STYLES: dict[str, dict[str, Any]] = {
    "medium": {},
    "5-large": {"qk_norm": "rms_norm"},
    "5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def read_gzip(name: str) -> Any:
    with gzip.open(DATA / name, "rt") as file:
        return json.load(file)


def full_size(name: str) -> TensorDict:
    shapes = {key: shape for key, shape in read_gzip(f"keys_{name}.json.gz").items() if key != "_about"}
    return TensorDict({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, source=name)


def meta_model(tensors: Any) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(MMDiTParams(**layout_sd3.transformer_config(shapes_of(tensors))))


def diffusers_model(style: str) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(3)
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=128, pooled_projection_dim=24, pos_embed_max_size=12,
        **STYLES[style],
    )  # fmt: skip
    for parameter in model.parameters():  # the library starts norms at 1 and biases near 0: make every tensor count
        parameter.data.normal_(std=0.2).add_(1.0 if parameter.dim() == 1 and parameter.numel() == 64 else 0.0)
    return model.eval()


def inputs(channels: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, channels, 16, 10, generator=generator),
        "t": torch.tensor([3.25, 871.5]),
        "context": torch.randn(2, 7, 48, generator=generator),
        "y": torch.randn(2, 24, generator=generator),
    }


def converted(style: str) -> tuple[nn.Module, MMDiT]:
    theirs = diffusers_model(style)
    file = TensorDict(theirs.state_dict(), source="tiny")
    assert layout_sd3.model_type(file.shapes, source="tiny", option="--model") == style
    return theirs, build_mmdit(layout_sd3.transformer_tensors(file), dtype=None)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("style", STYLES)
def test_the_output_is_that_of_diffusers(style):
    theirs, ours = converted(style)
    assert ours.params.heads == 2
    assert ours.params.dual_blocks == frozenset(STYLES[style].get("dual_attention_layers", ()))
    given = inputs()
    with torch.no_grad():
        wanted = theirs(given["x"], given["context"], given["y"], given["t"]).sample
        found = ours(**given)
        assert relative(found, wanted) < 1e-5
        assert relative(ours(**{**given, "t": given["t"] + 1}), wanted) > 1e-4
        assert relative(ours(**{**given, "y": given["y"].flip(0)}), wanted) > 1e-4
        assert relative(ours(**{**given, "context": given["context"].flip(0)}), wanted) > 1e-4


@pytest.mark.parametrize("style", ["medium", "5-medium"])
def test_gradients_are_those_of_diffusers_with_and_without_checkpointing(style):
    theirs, ours = converted(style)
    given = inputs()
    results = []
    for checkpointed in (False, True):
        ours.requires_grad_(True)
        ours.zero_grad()
        if checkpointed:
            ours.enable_gradient_checkpointing()
        output = ours(**given)
        output.square().mean().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in ours.named_parameters()}))
    (plain, plain_gradients), (recomputed, gradients) = results
    assert torch.equal(plain, recomputed)
    assert all(torch.equal(plain_gradients[name], gradients[name]) for name in plain_gradients)
    theirs(given["x"], given["context"], given["y"], given["t"]).sample.square().mean().backward()
    named = dict(theirs.named_parameters())
    wanted = named["transformer_blocks.0.attn.add_q_proj.weight"].grad
    found = plain_gradients["joint_blocks.0.context_block.attn.qkv.weight"][: len(wanted)]
    assert relative(found, wanted) < 1e-4


def test_checkpointing_recomputes_blocks_only_while_it_is_switched_on():
    _, ours = converted("medium")
    calls: list[nn.Module] = []
    ours.joint_blocks[0].register_forward_pre_hook(lambda module, _: calls.append(module))
    ours.requires_grad_(True)
    for switch, count in ((ours.enable_gradient_checkpointing, 2), (ours.disable_gradient_checkpointing, 1)):
        switch()
        calls.clear()
        ours(**inputs()).sum().backward()
        assert len(calls) == count


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_are_built_from_shapes_alone_and_written_back(name, caplog):
    from diffusers import AutoencoderKL

    file = full_size(name)
    layout_sd3.warn_of_foreign_keys(file)
    assert "belong to no part" not in caplog.text
    assert layout_sd3.model_type(file.shapes, source=name, option="--model") == FULL_SIZE[name][0]
    model = meta_model(layout_sd3.transformer_tensors(file))
    vae_part = layout_sd3.vae_tensors(file)
    with torch.device("meta"):
        vae = AutoencoderKL(**layout_vae.vae_config(vae_part.shapes))
    assert shapes_of(vae.state_dict()) == vae_part.shapes
    assert shapes_of(layout_sd3.to_single_file(model.state_dict(), vae.state_dict())) == file.shapes
    record = model.params
    assert record.head_size == 64
    assert record.depth == record.heads == (38 if name == "sd35_large" else 24)
    assert record.dual_blocks == (frozenset(range(13)) if name == "sd35_medium" else frozenset())
    assert record.position_side == (384 if name == "sd35_medium" else 192)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_lora_targets_have_the_listed_names_order_and_shapes(name):
    wanted = read_gzip("lora_modules_sd3.json.gz")
    model = meta_model(layout_sd3.transformer_tensors(full_size(name)))
    found = find_targets(model, "lora_unet", {"SingleDiTBlock"})
    listed = [(entry["name"], entry["path"], entry["in"], entry["out"]) for entry in wanted[f"mmdit_{name}"]]
    assert len(listed) == FULL_SIZE[name][1]
    assert [(t.name, t.path, t.layer.in_features, t.layer.out_features) for t in found] == listed
    for entry in wanted[f"emb_dims_extra_{name}"]:
        layer = model.get_submodule(entry["path"])
        assert type(layer).__name__ == entry["type"]
        assert list(layer.weight.shape[:2]) == [entry["out"], entry["in"]]


# --- positions -------------------------------------------------------------------------------------------------
def test_a_position_table_follows_its_formula():
    table = position_table(16, 6, 4)
    row, column, k = 1, 5, 2  # sines of the column stand first, then its cosines, then the row's
    frequency = 10000.0 ** (-k / 4)
    places = [(16 / 4) * (index - (6 - 4) / 2) for index in (column, row)]
    expected = [torch.tensor(places[0] * frequency).sin(), torch.tensor(places[0] * frequency).cos(),
                torch.tensor(places[1] * frequency).sin(), torch.tensor(places[1] * frequency).cos()]  # fmt: skip
    found = [table[row, column, k + offset] for offset in (0, 4, 8, 12)]
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), abs=1e-6)
    assert table.dtype is torch.float32
    with pytest.raises(ValueError, match="multiple of 4"):
        position_table(18, 6, 4)


def test_positions_are_cut_from_the_centre_or_by_chance_from_anywhere():
    table = torch.arange(49.0).reshape(7, 7, 1)
    centre = crop_positions(table, 4, 3)
    assert centre.flatten()[:4].tolist() == [9, 10, 11, 16]  # row 1, column 2
    torch.manual_seed(0)
    corners = {int(crop_positions(table, 4, 3, random_rate=1.0).flatten()[0]) for _ in range(400)}
    assert corners == {7 * top + left for top in range(4) for left in range(5)}
    moved = [not torch.equal(crop_positions(table, 4, 3, random_rate=0.25), centre) for _ in range(400)]
    assert 60 < sum(moved) < 140
    with pytest.raises(ValueError, match="8x3 patches is larger than the model's position table"):
        crop_positions(table, 8, 3)


def test_a_centre_crop_draws_nothing_from_the_training_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    crop_positions(torch.zeros(4, 4, 1), 2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_scaled_tables_go_by_area_and_grow_for_long_pictures():
    positions = ScaledPositions([44, 40, 41], hidden_size=8)  # 20 and 22 patches: squares of 400 and 484
    assert positions.table(16, 16).shape == (30, 30, 8)
    assert positions.table(17, 26).shape == (30, 30, 8)  # 442, half way between the squares
    assert positions.table(18, 25).shape == (33, 33, 8)  # 450
    assert positions.table(30, 33).shape == (33, 33, 8)
    assert torch.equal(positions.table(30, 1), position_table(8, 30, 20))
    assert positions.table(10, 31).shape == (46, 46, 8)
    assert positions.table(10, 31) is positions.table(31, 10)
    with pytest.raises(ValueError, match="latent sizes"):
        ScaledPositions([], hidden_size=8)


def test_scaled_tables_and_random_places_reach_the_output():
    _, ours = converted("medium")
    given = inputs()
    with torch.no_grad():
        plain = ours(**given)
        scaled = ours(**given, scaled_positions=ScaledPositions([16], hidden_size=128))
        torch.manual_seed(2)
        moved = ours(**given, random_crop_rate=1.0)
    assert relative(scaled, plain) > 1e-3
    assert relative(moved, plain) > 1e-3
    assert ours.state_dict()["pos_embed"].shape == (1, 144, 128)


def test_sizes_that_do_not_fit_are_refused():
    _, ours = converted("medium")
    with pytest.raises(ValueError, match="not a multiple of the patch size 2"):
        ours(**{**inputs(), "x": torch.zeros(2, 4, 15, 10)})
    with pytest.raises(ValueError, match="13x5 patches is larger"):
        ours(**{**inputs(), "x": torch.zeros(2, 4, 26, 10)})


# --- files -----------------------------------------------------------------------------------------------------
def tiny_state(**changes: Any) -> dict[str, Tensor]:
    sizes: dict[str, Any] = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "depth": 2, "hidden_size": 32, "heads": 2, "mlp_size": 48,
        "time_size": 16, "vector_size": 24, "context_size": 48, "position_side": 6, "qk_norm": "rms",
    }  # fmt: skip
    torch.manual_seed(0)
    model = MMDiT(MMDiTParams(**{**sizes, **changes}))
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_file_with_or_without_prefix_loads_and_is_written_bit_for_bit(prefix, tmp_path):
    state = tiny_state(dual_blocks=frozenset({0}), qk_norm="layer")
    path = tmp_path / "model.safetensors"
    save_tensors(path, {prefix + key: value for key, value in state.items()})
    file = open_tensors(path)
    assert recognise(file.shapes) is ModelKind.SD35_MEDIUM
    model = build_mmdit(layout_sd3.transformer_tensors(file), dtype=None)
    assert isinstance(model.joint_blocks[0].x_block.attn.ln_q, nn.LayerNorm)
    written = layout_sd3.to_single_file(model.state_dict())
    assert written.keys() == {"model.diffusion_model." + key for key in state}
    assert all(torch.equal(written["model.diffusion_model." + key], value) for key, value in state.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_whole_file_with_vae_and_text_encoder_comes_back_bit_for_bit():
    tiny = open_tensors(FOLDER / "models" / "sd3_tiny.safetensors")
    own, _ = embedded("clip_l")
    text = {f"text_encoders.clip_l.transformer.{key}": own[key] for key in own}
    file = TensorDict({**{key: tiny[key] for key in tiny}, **text}, source="whole")
    written = layout_sd3.to_single_file(
        build_mmdit(layout_sd3.transformer_tensors(file), dtype=None).state_dict(), layout_sd3.vae_tensors(file),
        {"clip_l": stored(file, "clip_l")},
    )  # fmt: skip
    assert shapes_of(written) == file.shapes
    assert all(written[key].dtype == file[key].dtype and torch.equal(written[key], file[key]) for key in file)


def test_other_components_of_a_file_without_prefix_are_left_aside():
    state = tiny_state()
    others = {"first_stage_model.a": torch.zeros(1), "text_encoders.clip_l.a": torch.zeros(1), "logvar": torch.zeros(1)}
    assert set(layout_sd3.transformer_tensors({**state, **others})) == set(state)


def test_registers_stand_in_front_of_the_text():
    state = tiny_state(register_length=3)
    plain = build_mmdit({key: value for key, value in state.items() if key != "register"}, dtype=None)
    model = build_mmdit(state, dtype=None)
    given = inputs()
    given = {**given, "x": given["x"][:, :, :10]}
    seen: dict[str, Tensor] = {}
    for name, host in (("plain", plain), ("model", model)):
        host.joint_blocks[0].register_forward_pre_hook(
            lambda _, arguments, name=name: seen.__setitem__(name, arguments[0])
        )
        with torch.no_grad():
            host(**given)
    assert torch.equal(seen["model"][:, 3:], seen["plain"])
    assert torch.equal(seen["model"][:, :3], state["register"].expand(2, -1, -1))


def test_a_missing_position_table_is_computed():
    state = tiny_state()
    model = build_mmdit({key: value for key, value in state.items() if key != "pos_embed"}, dtype=None)
    table = model.pos_embed.reshape(192, 192, 32)
    assert torch.equal(table, position_table(32, 192, 64))
    assert torch.equal(table[64:128, 64:128], mmdit.position_table(32, 64, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("joint_blocks.1.x_block.attn.proj.bias"), "missing: joint_blocks.1.x_block.attn.proj.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected: surprise"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 35, 32)}), "35 places, which is not a square"),
        (lambda s: s.pop("context_embedder.weight"), "context_embedder.weight missing"),
        (lambda s: s.update({"joint_blocks.3.x_block.mlp.fc1.bias": torch.zeros(1)}), "gaps"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_key(change, message):
    state = tiny_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        build_mmdit(state, dtype=None)


def test_recognition_names_what_it_found_and_foreign_keys(caplog):
    with pytest.raises(ValueError, match="--model a.safetensors looks like a FLUX"):
        layout_sd3.model_type(
            {"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, source="a.safetensors", option="--model"
        )
    state = layout_sd3.to_single_file(tiny_state())
    layout_sd3.warn_of_foreign_keys(TensorDict(state, source="a"))
    assert not caplog.records
    layout_sd3.warn_of_foreign_keys(TensorDict({**state, "conditioner.x": torch.zeros(1)}, source="a"))
    assert "a: 1 tensors belong to no part of the model and are not used: conditioner.x" in caplog.text
    with pytest.raises(ValueError, match="transformer_blocks.0.extra.weight is not part"):
        layout_sd3.from_diffusers({"transformer_blocks.0.extra.weight": torch.zeros(1)})


def embedded(name: str) -> tuple[TensorDict, TensorDict]:
    """A tiny text-encoder file, and the same inside a model file."""
    own = open_tensors(FOLDER / "models" / f"{name}_tiny.safetensors")
    own = TensorDict({key: own[key] for key in own}, source=name)
    state = {f"text_encoders.{name}.transformer.{key}": own[key] for key in own}
    return own, TensorDict({**layout_sd3.to_single_file(tiny_state()), **state}, source="whole")


def stored(file: TensorDict, name: str) -> Any:
    """A text encoder inside a model file, under transformers' names; None if the file has none."""
    [kind] = [kind for kind in sd3_model_util.ENCODERS if kind.name == name]
    found = find_encoder(kind, None, Path("whole"), file)
    return None if found is None else found.tensors


@pytest.mark.parametrize("name", layout_sd3.TEXT_ENCODERS)
def test_embedded_text_encoders_are_found_below_transformer(name, caplog):
    own, whole = embedded(name)
    part = stored(whole, name)
    wanted = own if name == "t5xxl" else layout_sd3.clip_tensors(own, name)
    assert part.shapes == wanted.shapes
    assert len(part) == len([key for key in own if not key.endswith("position_ids")])
    assert all(torch.equal(part[key], wanted[key]) for key in part)
    other = next(encoder for encoder in layout_sd3.TEXT_ENCODERS if encoder != name)
    assert stored(whole, other) is None
    assert not [key for key in layout_sd3.transformer_tensors(whole) if "text_encoders" in key]
    layout_sd3.warn_of_foreign_keys(whole)
    assert "belong to no part" not in caplog.text


def test_openclip_names_are_read_for_clip_g():
    own, _ = embedded("clip_g")
    state = layout_clip.hf_to_openclip({key: own[key] for key in own})
    whole = {f"text_encoders.clip_g.{key}": value for key, value in state.items()}
    part = stored(whole, "clip_g")
    assert set(part) == set(own)
    assert all(torch.equal(part[key], own[key]) for key in own)


def test_a_missing_projection_is_the_identity_for_clip_l_only():
    for name, width in (("clip_l", 64), ("clip_g", 128)):
        own, _ = embedded(name)
        bare = {key: own[key] for key in own if key != "text_projection.weight"}
        if name == "clip_g":
            with pytest.raises(ValueError, match="clip_g has no text_projection.weight"):
                layout_sd3.clip_tensors(bare, name)
        else:
            assert torch.equal(layout_sd3.clip_tensors(bare, name)["text_projection.weight"].float(), torch.eye(width))


# --- the recorded run ------------------------------------------------------------------------------------------
def clip_states(name: str, folder: str, captions: list[str], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Second to last hidden states [B,77,w] and projected end-of-text states [B,w]."""
    from transformers import CLIPTokenizer

    file = open_tensors(FOLDER / "models" / f"{name}_tiny.safetensors")
    encoder = build_clip(
        layout_sd3.clip_tensors(file, name), activation="quick_gelu" if name == "clip_l" else "gelu", component=name,
        dtype=torch.float32,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizers" / folder)
    end = tokenizer.eos_token_id
    ids = torch.full((len(captions), 77), end if pad_id is None else pad_id)
    for row, caption in zip(ids, captions, strict=True):
        tokens = tokenizer(caption, truncation=True, max_length=77)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    output = encoder(ids, output_hidden_states=True)
    first_end = (ids == end).int().argmax(dim=1)
    pooled = encoder.text_projection(output.last_hidden_state[torch.arange(len(ids)), first_end])
    return output.hidden_states[-2], pooled


def t5_states(captions: list[str]) -> Tensor:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tensors = open_tensors(FOLDER / "models" / "t5xxl_tiny.safetensors")
    rows, width = tensors.shapes["shared.weight"]
    config = T5Config(
        vocab_size=rows, d_model=width, d_kv=32, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )  # fmt: skip
    encoder = T5EncoderModel(config).eval()
    result = encoder.load_state_dict({key: tensors[key].float() for key in tensors}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"encoder.embed_tokens.weight"}
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizers" / "google_t5-v1_1-xxl")
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=256, return_tensors="pt")["input_ids"]
    return encoder(ids).last_hidden_state


@torch.no_grad()
def text_conditioning(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Context [B,333,256] and vector [B,192] of the tiny encoders."""
    left, left_pooled = clip_states("clip_l", "openai_clip-vit-large-patch14", captions, None)
    right, right_pooled = clip_states("clip_g", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", captions, 0)
    clip = torch.cat([left, right], dim=2)
    t5 = t5_states(captions)
    clip = nn.functional.pad(clip, (0, t5.shape[2] - clip.shape[2]))
    return torch.cat([clip, t5], dim=1), torch.cat([left_pooled, right_pooled], dim=1)


def assert_recorded(tensor: Tensor, wanted: dict[str, Any]) -> None:
    assert list(tensor.shape) == wanted["shape"]
    count = len(wanted["first"])
    assert tensor.flatten()[:count].tolist() == pytest.approx(wanted["first"], rel=1e-5, abs=1e-6)
    assert float(tensor.mean()) == pytest.approx(wanted["mean"], rel=1e-5, abs=1e-6)
    assert float(tensor.std()) == pytest.approx(wanted["std"], rel=1e-5)


def test_the_recorded_first_step_is_reproduced():
    golden = golden_run("sd3_lora")
    step = golden.steps[0]
    model = build_mmdit(
        layout_sd3.transformer_tensors(open_tensors(FOLDER / "models" / "sd3_tiny.safetensors")), dtype=torch.float32
    )
    assert (model.params.depth, model.params.heads) == (3, 3)
    latents = torch.stack([golden.tensors[f"latents.{key}"] for key in step["image_keys"]])
    timesteps = golden.tensors["timesteps.0"]
    sigmas = (timesteps / 1000)[:, None, None, None]
    given = {"x": (1 - sigmas) * latents + sigmas * golden.tensors["noise.0"], "t": timesteps}
    given["context"], given["y"] = text_conditioning(step["captions"])
    for name, tensor in given.items():
        assert_recorded(tensor, step["model_call"][name])
    with torch.no_grad():
        output = model(**given)
    assert_recorded(output, step["model_output"])
    loss = nn.functional.mse_loss(given["x"] - sigmas * output, latents)  # this family compares clean latents
    assert float(loss) == pytest.approx(step["loss"], rel=1e-5)
