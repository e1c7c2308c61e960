"""The SD3 family: files of every kind, what its text encoders see, dropouts, caches, freezing, saving."""

from __future__ import annotations

import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.checkpoints import layout_sd3
from library.checkpoints.tensors import shapes_of
from library.data.records import Batch
from library.families.base import Conditioning
from library.families.sd3 import StableDiffusion3
from library.families.sd3_text import DropRates, clip_places, dropped
from library.methods.base import LossRecipe
from library.methods.full import FullTraining
from library.options import make_options
from tests.sd3_tiny import CAPTIONS, FILES, denoiser_inputs, tiny_family, tiny_options, whole_file
from tests.test_mmdit import STYLES, diffusers_model


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion3:
    return tiny_family()


def predict(family: StableDiffusion3, given: dict[str, Tensor]) -> Tensor:
    conditioning = Conditioning({"context": given["context"], "vector": given["vector"]})
    return family.predict(given["x_t"], given["timesteps"], conditioning)


def text_of(family: StableDiffusion3, captions: list[str] = CAPTIONS, cached: Any = None) -> Conditioning:
    with torch.no_grad():
        return family.encode_text(family.tokenize(captions), cached)


def assert_same(found: Conditioning, wanted: Conditioning) -> None:
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert torch.equal(found[name], tensor), name


# --- files -----------------------------------------------------------------------------------------------------
def test_text_encoders_inside_the_file_are_loaded_and_options_win_over_them(tiny, tmp_path):
    whole = whole_file(tmp_path / "whole.safetensors", "clip_l", "clip_g", "t5xxl")
    alone = {"pretrained_model_name_or_path": str(whole), "clip_l": None, "clip_g": None, "t5xxl": None}
    assert StableDiffusion3(tiny_options(**alone)).check_options() == []
    assert_same(text_of(tiny_family(**alone)), text_of(tiny))
    other = whole_file(tmp_path / "other.safetensors", "clip_l", "clip_g", "t5xxl", factor=0.5)
    assert_same(text_of(tiny_family(pretrained_model_name_or_path=str(other))), text_of(tiny))


def test_a_half_precision_file_is_cast_to_what_the_run_computes_in(tiny):
    assert {tensor.dtype for tensor in load_file(FILES["pretrained_model_name_or_path"]).values()} == {torch.float16}
    modules = [tiny.denoiser, tiny.vae, *tiny.text_encoders]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path):
    def problems(**changes: Any) -> str:
        return "\n".join(StableDiffusion3(tiny_options(**changes)).check_options())

    assert problems() == ""
    assert "--clip_g must be given" in problems(clip_g=None)
    assert "--clip_l nowhere.safetensors: no such file or folder" in problems(clip_l="nowhere.safetensors")
    state = load_file(FILES["pretrained_model_name_or_path"])
    bare = tmp_path / "bare.safetensors"
    save_file({key: value for key, value in state.items() if key.startswith("model.")}, bare)
    assert "--vae must be given" in problems(pretrained_model_name_or_path=str(bare))
    assert problems(pretrained_model_name_or_path=str(bare), vae=str(FILES["pretrained_model_name_or_path"])) == ""
    assert "looks like a T5 encoder" in problems(pretrained_model_name_or_path=str(FILES["t5xxl"]))
    assert "--weighted_captions" in problems(weighted_captions=True)
    assert "--huber_schedule exponential" in problems(loss_type="huber")
    assert problems(loss_type="huber", huber_schedule="constant") == ""
    assert "--t5_dropout_rate 1.5" in problems(t5_dropout_rate=1.5)
    assert "--num_last_block_to_freeze -1" in problems(num_last_block_to_freeze=-1)
    assert "--pretrained_model_name_or_path is missing" in problems(pretrained_model_name_or_path=None)


def test_without_a_t5_the_model_sees_zeros(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        family = tiny_family(t5xxl=None)
    assert "no T5 text encoder" in caplog.text
    tokens = family.tokenize(CAPTIONS)
    assert "t5xxl" not in tokens
    found, whole = text_of(family), text_of(tiny)
    assert found["context"].shape == (2, 154, 256)
    assert torch.equal(found["context"][:, :77], whole["context"][:, :77])
    assert not found["context"][:, 77:].any()
    with torch.no_grad():
        cached = family.encode_text_for_cache(tokens)
    assert cached.keys() == set(family.text_cache.arrays)
    assert not cached["t5_out"].any()
    family.release_text_encoders([True, True, True])
    assert_same(text_of(family, cached=cached), found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "model"
    family = tiny_family()
    family.release_text_encoders([False, True, True])  # those are read again from their files
    family.save(path, layout="diffusers_safetensors", dtype=torch.float32, metadata={})
    return path


def test_a_saved_folder_comes_back_bit_for_bit(tiny, folder):
    family = StableDiffusion3(make_options(pretrained_model_name_or_path=str(folder)))
    assert family.check_options() == []
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    for ours, wanted in ((family.denoiser, tiny.denoiser), (family.vae, tiny.vae)):
        state = ours.state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.state_dict().items())
    assert_same(text_of(family), text_of(tiny))


def test_a_saved_folder_is_a_pipeline_of_diffusers(tiny, folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    theirs = pipeline.encode_prompt(
        CAPTIONS, None, None, negative_prompt=["", "blurry"], do_classifier_free_guidance=True
    )
    with torch.no_grad():
        positive, negative = tiny.encode_prompts(CAPTIONS, ["", "blurry"])
    for found, wanted in zip((positive["context"], negative["context"]), theirs[:2], strict=True):
        assert torch.allclose(found, wanted, atol=5e-5)
    for found, wanted in zip((positive["vector"], negative["vector"]), theirs[2:], strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    given = denoiser_inputs(tiny)
    with torch.no_grad():
        wanted = pipeline.transformer(
            given["x_t"], encoder_hidden_states=given["context"], pooled_projections=given["vector"],
            timestep=given["timesteps"],
        ).sample
        assert torch.allclose(predict(tiny, given), wanted, atol=1e-5)
        latents = pipeline.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
        assert torch.allclose(tiny.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean, latents, atol=1e-5)
    config = pipeline.vae.config
    assert (config.scaling_factor, config.shift_factor) == (tiny.latent.scale, tiny.latent.shift) == (1.5305, 0.0609)
    assert pipeline.scheduler.config.shift == 3.0


@pytest.mark.parametrize("style", STYLES)
def test_transformers_of_diffusers_are_written_as_they_were_read(style):
    theirs = diffusers_model(style)
    state = theirs.state_dict()
    original = layout_sd3.from_diffusers(state)
    written = layout_sd3.to_diffusers(original)
    assert set(written) == set(state)
    assert all(torch.equal(written[key], value) for key, value in state.items())
    config = layout_sd3.diffusers_config(shapes_of(original))
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "qk_norm",
                "pooled_projection_dim", "caption_projection_dim", "pos_embed_max_size", "patch_size"):  # fmt: skip
        assert config[key] == theirs.config[key], key
    assert tuple(config["dual_attention_layers"]) == tuple(theirs.config["dual_attention_layers"])


def test_the_main_file_is_written_bit_for_bit_with_trained_encoders_beside_it(tmp_path):
    family = tiny_family(dtype=torch.float16)
    path = tmp_path / "model.safetensors"
    family.save(path, layout="safetensors", dtype=None, metadata={"modelspec.title": "x"})
    source, saved = load_file(FILES["pretrained_model_name_or_path"]), load_file(path)
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], value) and saved[key].dtype == value.dtype for key, value in source.items())
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]

    family.text_encoders[1].requires_grad_(True)
    family.save(path, layout="safetensors", dtype=torch.float32, metadata={})
    beside = {f"model_{name}.safetensors" for name in ("clip_l", "clip_g")}
    assert {item.name for item in tmp_path.iterdir()} == {"model.safetensors", *beside}
    assert beside < {item.name for item in family.companion_files(path)}
    clip_g = load_file(tmp_path / "model_clip_g.safetensors")
    assert {tensor.dtype for tensor in (*load_file(path).values(), *clip_g.values())} == {torch.float32}
    wanted = load_file(FILES["clip_g"])
    assert clip_g.keys() == wanted.keys()
    assert all(torch.equal(clip_g[key], wanted[key].float()) for key in wanted)
    written = tiny_family(
        pretrained_model_name_or_path=str(path), clip_g=str(tmp_path / "model_clip_g.safetensors")
    )
    assert_same(text_of(written), text_of(tiny_family()))


@pytest.mark.parametrize(
    ("name", "files"), [("clip_l", {"clip_l", "clip_g"}), ("clip_g", {"clip_l", "clip_g"}), ("t5xxl", {"t5xxl"})]
)
def test_an_encoder_that_is_trained_in_part_is_written(name, files, tmp_path):
    family = tiny_family()
    next(family.modules.encoders[name].parameters()).requires_grad_(True)
    family.save(tmp_path / "m.safetensors", layout="safetensors", dtype=None, metadata={})
    assert {item.stem for item in tmp_path.iterdir()} == {"m", *(f"m_{file}" for file in files)}


def test_a_pickled_checkpoint_loads_again_and_adds_its_counters(tiny, tmp_path):
    path, again = tmp_path / "model.ckpt", tmp_path / "again.ckpt"
    tiny.save(path, layout="ckpt", dtype=None, metadata={}, counters=(1, 10))
    family = tiny_family(pretrained_model_name_or_path=str(path))
    family.save(again, layout="ckpt", dtype=None, metadata={}, counters=(2, 20))
    content = torch.load(again, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 30)
    wanted = tiny.denoiser.state_dict()
    assert all(torch.equal(content["state_dict"][f"model.diffusion_model.{key}"], wanted[key]) for key in wanted)


# --- text ------------------------------------------------------------------------------------------------------
def test_tokens_travel_to_workers_and_masks_cover_text_with_its_ends(tiny):
    tokenize = pickle.loads(pickle.dumps(tiny.tokenize))
    tokens = tokenize(["", *CAPTIONS])
    assert {name: tuple(value.shape) for name, value in tokens.items()} == {
        "clip_l": (3, 77), "clip_l_mask": (3, 77), "clip_g": (3, 77), "clip_g_mask": (3, 77), "t5xxl": (3, 256),
        "t5xxl_mask": (3, 256),
    }  # fmt: skip
    start, end = tiny.tokenizers["clip_l"].special.start, tiny.tokenizers["clip_l"].special.end
    assert tokens["clip_l"][0].tolist() == [start] + [end] * 76
    assert tokens["clip_g"][0].tolist() == [start, end] + [0] * 75
    for name in ("clip_l", "clip_g", "t5xxl"):
        lengths = tokens[f"{name}_mask"].sum(dim=1)
        assert lengths[0] == (1 if name == "t5xxl" else 2)
        for row in range(3):
            last = int(lengths[row]) - 1
            assert tokens[name][row, last] == (1 if name == "t5xxl" else end)
            assert tokens[f"{name}_mask"][row].tolist() == [1] * (last + 1) + [0] * (tokens[name].shape[1] - last - 1)
    long = tokenize(["boat " * 200])
    assert long["clip_l_mask"].sum() == 77
    assert long["clip_l"][0, -1] == end


def test_the_token_length_of_t5_is_an_option():
    family = tiny_family(t5xxl_max_token_length=40)
    assert text_of(family)["context"].shape == (2, 77 + 40, 256)
    assert family.text_cache.lengths == {"lg_out": 77, "t5_out": 40}


@pytest.mark.parametrize("option", ["apply_lg_attn_mask", "apply_t5_attn_mask"])
def test_masks_hide_padding_live_and_in_caches_alike(tiny, option):
    family = tiny_family(**{option: True})
    masked, plain = text_of(family)["context"], text_of(tiny)["context"]
    of_t5 = option == "apply_t5_attn_mask"
    changed, same = (slice(77, None), slice(0, 77)) if of_t5 else (slice(0, 77), slice(77, None))
    assert torch.equal(masked[:, same], plain[:, same])
    assert not torch.allclose(masked[:, changed], plain[:, changed], atol=1e-3)
    tokens = family.tokenize(CAPTIONS)
    with torch.no_grad():
        cached = family.encode_text_for_cache(tokens)
    width = masked.shape[2] - cached["lg_out"].shape[2]
    assert torch.equal(nn.functional.pad(cached["lg_out"], (0, width)), masked[:, :77])
    assert torch.equal(cached["t5_out"], masked[:, 77:])
    assert family.text_cache.flags == {
        "apply_lg_attn_mask": not of_t5, "apply_t5_attn_mask": of_t5
    }  # fmt: skip


def test_released_encoders_take_their_part_from_the_cache():
    family = tiny_family()
    live = text_of(family)
    with torch.no_grad():
        encoded = family.encode_text_for_cache(family.tokenize(CAPTIONS))
    cached = {name: value.float() for name, value in encoded.items()}
    family.release_text_encoders([False, False, True])
    assert "t5xxl" not in family.modules.encoders
    assert_same(text_of(family, cached=cached), live)
    cached["lg_out"] = cached["lg_out"] + 1  # live encoders do not look at it
    assert_same(text_of(family, cached=cached), live)
    with pytest.raises(RuntimeError, match="t5_out"):
        text_of(family)
    family.release_text_encoders([True, True, True])
    shifted = text_of(family, cached=cached)["context"] - live["context"]
    width = cached["lg_out"].shape[2]
    assert torch.allclose(shifted[:, :77, :width], torch.ones(()), atol=1e-5)
    assert not shifted[:, 77:].any() and not shifted[:, :, width:].any()


def test_which_encoders_are_cached():
    family = StableDiffusion3(tiny_options())
    assert family.cached_text_encoders([False, False, False]) == [True, True, True]
    assert family.cached_text_encoders([True, False, False]) == [False, False, True]
    assert family.cached_text_encoders([False, True, False]) == [False, False, True]
    with pytest.raises(ValueError, match="train_t5xxl"):
        family.cached_text_encoders([True, True, True])
    only_t5 = StableDiffusion3(tiny_options(use_t5xxl_cache_only=True))
    assert only_t5.cached_text_encoders([False, False, False]) == [False, False, True]


def conditioning_of_ones() -> Conditioning:
    return Conditioning({"context": torch.ones(40, 80, 8), "vector": torch.ones(40, 6)})


class _Widths:
    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        self.hidden_size, self.projection_dim = hidden_size, projection_dim


PLACES = clip_places([_Widths(2, 1), _Widths(3, 4)])


def test_dropping_an_encoder_empties_its_places_only():
    found = dropped(conditioning_of_ones(), DropRates(clip_l=1.0), PLACES)
    assert not found["context"][:, :77, :2].any() and not found["vector"][:, :1].any()
    assert found["context"][:, :77, 2:].all() and found["context"][:, 77:].all() and found["vector"][:, 1:].all()
    found = dropped(conditioning_of_ones(), DropRates(clip_g=1.0), PLACES)
    assert not found["context"][:, :77, 2:5].any() and not found["vector"][:, 1:5].any()
    assert found["context"][:, :77, :2].all() and found["context"][:, :, 5:].all() and found["vector"][:, 5:].all()
    found = dropped(conditioning_of_ones(), DropRates(t5xxl=1.0), PLACES)
    assert not found["context"][:, 77:].any() and found["context"][:, :77].all() and found["vector"].all()


def test_dropouts_draw_per_sample_and_only_for_encoders_that_can_drop():
    random.seed(3)
    draws = [(random.random() < 0.5, random.random() < 0.2) for _ in range(40)]
    t5 = [random.random() < 0.7 for _ in range(40)]
    random.seed(3)
    found = dropped(conditioning_of_ones(), DropRates(0.5, 0.2, 0.7), PLACES)
    assert [not keeps for keeps in found["vector"][:, 0].tolist()] == [left for left, _ in draws]
    assert [not keeps for keeps in found["vector"][:, 1].tolist()] == [right for _, right in draws]
    assert [not keeps for keeps in found["context"][:, 79, 0].tolist()] == t5
    before = random.getstate()
    assert_same(dropped(conditioning_of_ones(), DropRates(), PLACES), conditioning_of_ones())
    assert random.getstate() == before


def test_only_training_drops_encoders(tiny):
    family = tiny_family(clip_l_dropout_rate=1.0, t5_dropout_rate=1.0)
    method = FullTraining(family.options, family)
    method.trainable = nn.ModuleDict({"part": nn.Linear(1, 1)})
    method.recipe = LossRecipe.from_options(family.options, family)
    one, zeros = torch.ones(2), torch.zeros(2, 2, dtype=torch.int64)
    batch = Batch(CAPTIONS, one, zeros, zeros, zeros, one, ["a", "b"], tokens=family.tokenize(CAPTIONS))
    with torch.no_grad():
        emptied = method.conditioning(batch)
        method.trainable.eval()
        assert_same(method.conditioning(batch), text_of(tiny))
    assert not emptied["context"][:, :77, :64].any() and not emptied["context"][:, 77:].any()
    assert emptied["context"][:, :77, 64:192].any()


# --- the denoiser ----------------------------------------------------------------------------------------------
def test_nan_is_replaced_and_reported(tiny, caplog):
    given = denoiser_inputs(tiny)
    given["context"][0, 0, 0] = torch.nan
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        found = predict(tiny, given)
    assert "NaN in the text, replaced by zeros" in caplog.text
    assert found.isfinite().all()
    given["context"][0, 0, 0] = 0
    with torch.no_grad():
        assert torch.equal(predict(tiny, given), found)


def test_random_places_of_the_position_table_are_for_training_steps(tiny):
    family = tiny_family(pos_emb_random_crop_rate=1.0)
    given = denoiser_inputs(family)
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(predict(family, given), predict(tiny, given))
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert not torch.allclose(predict(family, given), predict(tiny, given), atol=1e-3)


def test_scaled_positions_follow_the_resolutions_of_the_data(tiny, tmp_path):
    config = tmp_path / "data.toml"
    datasets = "".join(
        f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = {str(tmp_path)!r}\n"
        for size in (128, "[128, 512]")
    )
    config.write_text(datasets)
    family = tiny_family(enable_scaled_pos_embed=True, dataset_config=str(config))
    assert family.scaled_positions is not None
    assert family.scaled_positions.table(4, 4).shape[0] == 12  # 1.5 times 8 patches
    assert family.scaled_positions.table(16, 16).shape[0] == 24  # 256 pixels: the root of 128 * 512
    given = denoiser_inputs(family)
    with torch.no_grad():
        assert not torch.allclose(predict(family, given), predict(tiny, given), atol=1e-3)


def test_the_image_side_of_the_last_blocks_can_be_frozen():
    family = tiny_family(num_last_block_to_freeze=2)
    names = {id(parameter): name for name, parameter in family.denoiser.named_parameters()}
    frozen = {names[id(parameter)] for parameter in family.frozen_parameters()}
    wanted = {
        name for name in names.values() if name.startswith(("joint_blocks.1.x_block.", "joint_blocks.2.x_block."))
    }
    assert frozen == wanted and len(wanted) > 10
    assert tiny_family().frozen_parameters() == []


def test_sampling_runs_down_the_shifted_flow(tiny):
    spec = tiny.sampling_spec()
    assert spec.flow_sigmas is not None
    sigmas = spec.flow_sigmas(10, (64, 64), None)
    assert (len(sigmas), float(sigmas[0]), float(sigmas[-1])) == (11, 1.0, 0.0)
    assert torch.equal(sigmas, spec.flow_sigmas(10, (64, 64), 3.0))
    assert float(spec.flow_sigmas(10, (64, 64), 1.0)[5]) < float(sigmas[5])
    assert (spec.noise_on_cpu, spec.defaults.size_multiple, spec.defaults.scale) == (True, 16, 7.5)


def test_latents_are_cached_unscaled_and_come_back(tiny):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    z = tiny.encode_images(image, torch.Generator().manual_seed(1))
    assert z.shape == (1, 16, 4, 6)
    posterior = tiny.vae.encode(image).latent_dist.sample(torch.Generator().manual_seed(1))
    assert torch.equal(z, posterior)
    decoded = tiny.decode_latents(tiny.latent.normalize(z))
    assert torch.allclose(decoded, tiny.vae.decode(z).sample, atol=1e-4)
