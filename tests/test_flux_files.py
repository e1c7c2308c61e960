"""FLUX files: every layout that is read, and every form that is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.checkpoints.tensors import open_tensors
from library.families.flux import Flux
from tests.flux_tiny import (
    FILES,
    NOTHING_ELSE,
    SHORT,
    TRANSFORMER,
    flux_family,
    flux_options,
    load,
    prediction,
    problems,
)


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


def test_a_saved_transformer_has_the_bits_and_keys_of_its_source(family, tmp_path):
    path = tmp_path / "model.safetensors"
    half = Flux(flux_options(**SHORT))
    half.load(weight_dtype=torch.float16, vae_dtype=torch.float32, device="cpu")
    half.save(path, layout="safetensors", dtype=None, metadata={"modelspec.title": "x"})
    saved, source = load_file(path), load_file(TRANSFORMER)
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], source[key]) for key in source)
    assert open_tensors(path).metadata["modelspec.title"] == "x"
    half.save(path, layout="safetensors", dtype=torch.bfloat16, metadata={})
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


def test_a_pickle_holds_counters_that_add_up_and_loads(family, tmp_path):
    path = tmp_path / "model.ckpt"
    family.save(path, layout="ckpt", dtype=None, metadata={}, counters=(1, 30))
    again = load(path)
    assert_close(prediction(again), prediction(family))
    again.save(tmp_path / "next.ckpt", layout="ckpt", dtype=None, metadata={}, counters=(2, 5))
    content = torch.load(tmp_path / "next.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 35)
    with pytest.raises(ValueError, match="allowed are safetensors, ckpt, diffusers, diffusers_safetensors"):
        family.save(path, layout="gguf", dtype=None, metadata={})


def test_a_folder_is_complete_for_us_and_equal_in_diffusers(family, folder):
    from diffusers import FluxTransformer2DModel

    again = load(folder, **NOTHING_ELSE)
    assert again.check_options() == []
    assert torch.equal(prediction(again), prediction(family))
    assert again.clip_tokenizer.source == str(folder / "tokenizer")
    assert again.t5_tokenizer.source == str(folder / "tokenizer_2")
    theirs = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    x_t = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        text = family.encode_text(family.tokenize(["a cat"]))
        inputs = family.denoiser_inputs(x_t, torch.tensor([250.0]), text)
        ours = family.denoiser(**inputs)
        other = theirs(
            inputs["img"], inputs["txt"], inputs["y"], inputs["timesteps"], inputs["img_ids"][0], torch.zeros(24, 3),
            inputs["guidance"], return_dict=False,
        )[0]  # fmt: skip
    assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_released_encoders_are_written_into_a_folder_too(tmp_path):
    family = flux_family(**SHORT)
    expected = prediction(family)
    family.release_text_encoders([True, True])
    family.save(tmp_path / "model", layout="diffusers", dtype=None, metadata={})
    assert not list(tmp_path.rglob("*.safetensors")) and list(tmp_path.rglob("*.bin"))
    assert_close(prediction(load(tmp_path / "model", **NOTHING_ELSE)), expected)


def test_shards_without_an_index_and_a_single_shard_as_the_path(family, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    whole = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, copy / "transformer" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors")
    expected = prediction(family)
    assert_close(prediction(load(copy, **NOTHING_ELSE)), expected)
    shard = copy / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    assert_close(prediction(load(shard)), expected)
    (copy / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    assert "00001-of-00002.safetensors does not exist" in problems(pretrained_model_name_or_path=str(shard))[0]


def all_in_one(folder: Path) -> Path:
    """One file with everything, as some programs write it."""
    path = folder / "all.safetensors"
    tensors = {f"model.diffusion_model.{key}": value for key, value in load_file(TRANSFORMER).items()}
    tensors |= {f"vae.{key}": value for key, value in load_file(FILES["ae"]).items()}
    for name in ("clip_l", "t5xxl"):
        tensors |= {f"text_encoders.{name}.transformer.{k}": v for k, v in load_file(FILES[name]).items()}
    save_file(tensors, path)
    return path


def test_parts_inside_the_model_file_are_used_unless_named(family, tmp_path):
    path = all_in_one(tmp_path)
    whole = load(path, **NOTHING_ELSE)
    assert whole.check_options() == []
    assert_close(prediction(whole), prediction(family))
    assert whole.vae_identity == family.vae_identity
    whole.save(tmp_path / "out.safetensors", layout="safetensors", dtype=None, metadata={})
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(TRANSFORMER).keys()
    louder = tmp_path / "clip.safetensors"
    save_file({key: value * 1.5 for key, value in load_file(FILES["clip_l"]).items()}, louder)
    assert not torch.allclose(prediction(load(path, ae=None, t5xxl=None, clip_l=str(louder))), prediction(family))


def test_text_encoders_come_from_folders_and_prefixed_files_too(family, folder, tmp_path):
    prefixed = tmp_path / "clip.safetensors"
    tensors = load_file(FILES["clip_l"])
    tensors.pop("text_projection.weight")
    save_file({f"clip_l.transformer.{key}": value for key, value in tensors.items()}, prefixed)
    changed = load(TRANSFORMER, clip_l=str(prefixed), t5xxl=str(folder / "text_encoder_2"), ae=str(folder / "vae"))
    assert torch.equal(prediction(changed), prediction(family))
    assert changed.text_encoders[0].text_projection is None


def test_eight_bit_transformers_are_widened(tmp_path):
    path = tmp_path / "fp8.safetensors"
    small = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(TRANSFORMER).items()}
    save_file(small, path)
    denoiser = load(path).denoiser
    assert torch.equal(denoiser.img_in.weight, small["img_in.weight"].float())
    save_file({**small, "img_in.scale_weight": torch.ones(1)}, path)
    assert "scaled fp8 weights" in problems(pretrained_model_name_or_path=str(path))[0]


def test_a_text_encoder_with_too_few_rows_is_named(tmp_path):
    path = tmp_path / "t5.safetensors"
    tensors = load_file(FILES["t5xxl"])
    save_file({**tensors, "shared.weight": tensors["shared.weight"][:200].clone()}, path)
    with pytest.raises(ValueError, match="has 282 tokens, but --t5xxl .* has 200 rows"):
        load(TRANSFORMER, t5xxl=str(path))
