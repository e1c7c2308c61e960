"""What a file is goes by its content; every defect of one is one line that names it; NaN and extra keys are noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import flux_model_util, sd3_model_util, sdxl_model_util
from library.checkpoints import tensors as tf
from library.checkpoints.embeddings import read_embeddings
from library.checkpoints.finite import non_finite, only_warned
from library.checkpoints.folders import read_config
from library.checkpoints.recognition import UNET_PREFIX
from library.families import drawn
from library.generation.attached_networks import attach_networks
from library.model_util import LoadSpec, load_model
from library.models.vae import load_vae
from library.options.generation import AttachedNetworkOptions
from networks import contract, merge_lora
from networks.weights_file import load_network_file
from tests.damage import join, split
from tests.golden import FOLDER
from tests.lora_files import tiny_family, tiny_model
from tests.training import MODEL

MODELS = FOLDER / "models"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tf.save_tensors(tmp_path / "small.safetensors", {"a": torch.ones(2, 3), "b": torch.ones(4).half()})
    return tmp_path / "small.safetensors"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    header, body = split(path.read_bytes())
    change(header)
    path.write_bytes(join(header, body))
    return path


# --- kinds -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head>", r"a web page \(HTML\), not a model"),
        (b"\n  <html lang='en'>", r"a web page \(HTML\), not a model"),
        (b'{"error": "Repository not found"}', r"a text \(JSON\), not a model"),
        (b"GGUF\x03\0\0\0" + b"\0" * 40, "a GGUF file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a picture"),
        (b"\x1f\x8b\x08\0" + b"\0" * 40, r"a compressed archive \(gzip\); unpack it"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "a tar archive"),
        (b"no model at all", "cannot be read as a checkpoint|not a complete safetensors file"),
        (b"\0" * 64, "cannot be read as a checkpoint|not a safetensors file"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_only_looks_like_a_model_is_named_as_what_it_is(content, what, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    readers = (tf.open_tensors, tf.read_metadata, load_vae, load_network_file, lambda p: read_embeddings(p, ["x"]))
    for reader in readers:
        if reader is tf.read_metadata and suffix == ".ckpt" and "cannot be read" in what:
            continue  # it does not look into pickles
        with pytest.raises(ValueError, match=what) as error:
            reader(path)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        tf.open_tensors(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        tf.read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.ckpt does not exist"):
        tf.open_tensors(tmp_path / "none.ckpt")


def test_names_do_not_decide_how_a_file_is_read(tmp_path):
    stored = load_file(MODEL)
    shutil.copy(MODEL, tmp_path / "model.ckpt")
    torch.save({"state_dict": stored, "global_step": 3}, tmp_path / "pickle.safetensors")
    torch.save(stored, tmp_path / "legacy.safetensors", _use_new_zipfile_serialization=False)
    wanted = load_model(LoadSpec(str(MODEL))).unet.state_dict()
    for name in ("model.ckpt", "pickle.safetensors", "legacy.safetensors"):
        assert drawn.model_kind(str(tmp_path / name)) is drawn.model_kind(str(MODEL))
        found = load_model(LoadSpec(str(tmp_path / name))).unet.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    save_file({"emb_params": torch.ones(1, 4)}, tmp_path / "word.pt")
    assert read_embeddings(tmp_path / "word.pt", ["x"])["x"].tolist() == [[1] * 4]
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}}, tmp_path / "word.safetensors")
    assert read_embeddings(tmp_path / "word.safetensors", ["x"])["x"].tolist() == [[1] * 4]
    shutil.copy(MODELS / "sd1_lora_start.safetensors", tmp_path / "lora.bin")
    assert tf.read_metadata(tmp_path / "lora.bin") == tf.read_metadata(MODELS / "sd1_lora_start.safetensors")


# --- headers ---------------------------------------------------------------------------------------------------
def _set(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        (_set("a", shape=[2, 4]), r"a: \[2, 4\] of F32 needs 32 bytes, its data_offsets give it 24"),
        (_set("a", dtype="F16"), r"a: \[2, 3\] of F16 needs 12 bytes"),
        (_set("a", shape=[-2, -3]), r"a: its shape is \[-2, -3\]; sizes from 0 on are needed"),
        (_set("a", shape=[2.0, 3]), "a: its shape is"),
        (_set("a", shape=[True, 6]), "a: its shape is"),
        (_set("a", shape=None), "a: its shape is None"),
        (_set("a", shape=[2**60, 2**60]), "a: no tensor has the shape"),
        (_set("a", shape=[2**60]), "a: .* needs 4611686018427387904 bytes"),
        (_set("a", data_offsets=[24, 0]), "a: its data_offsets .* run backwards"),
        (_set("a", data_offsets=[-24, 0]), "a: its data_offsets are"),
        (_set("a", data_offsets=[0]), "a: its data_offsets are"),
        (_set("a", data_offsets=[2**60, 2**60 + 24]), "is incomplete"),
        (_set("b", data_offsets=[16, 24]), "b: its bytes overlap another tensor's by 8"),
        (_set("a", dtype=7), "a: its dtype is a int"),
        (lambda h: h["a"].pop("dtype"), "a: its dtype is missing"),
        (lambda h: h["a"].clear(), "a: its dtype and shape and data_offsets is missing"),
        (lambda h: h.update(a=[1]), "a: it is described by a list"),
        (lambda h: h.pop("a"), "b: there is a gap of 24 bytes before it"),
        (lambda h: h.pop("b"), "8 bytes after its last tensor belong to nothing"),
        (lambda h: h.update(__metadata__=[]), "__metadata__: it is a list, not a table of texts"),
        (lambda h: h.update(e={"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}), "e: it has no elements"),
        (lambda h: h.update({"\ud800": {}}), "the name is not valid text"),
    ],
)
def test_every_defect_of_a_header_is_one_line_that_names_file_and_tensor(small, change, defect):
    changed(small, change)
    for reader in (tf.open_tensors, tf.read_metadata, load_network_file):
        with pytest.raises(ValueError, match=defect) as error:
            reader(small)
        assert str(small) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("[1, 2]", "its header is a list, not a table|not a safetensors file|cannot be read"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "its header is nested too deeply"),
        ('{"a": 1, "a": 2}', "a is there twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "its header cannot be read"),
        ('{"a": 1', "its header cannot be read"),
    ],
)
def test_headers_that_are_no_table_are_refused(tmp_path, text, defect):
    path = tmp_path / "x.safetensors"
    path.write_bytes(join(text.encode(), b"\0" * 64))
    with pytest.raises(ValueError, match=defect) as error:
        tf.open_tensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10**8 + 1, 100_000])
def test_a_header_longer_than_the_file_is_refused_unread(small, length):
    data = small.read_bytes()
    small.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=f"{small} is not a complete safetensors file.*{length} bytes"):
        tf.open_tensors(small)


def test_null_metadata_is_none_and_numbers_in_it_are_text(small):
    assert tf.read_metadata(changed(small, lambda header: header.update(__metadata__=None))) == {}
    assert tf.read_metadata(changed(small, lambda header: header.update(__metadata__={"steps": 3}))) == {"steps": "3"}


def test_a_dtype_that_is_not_known_matters_only_for_a_tensor_that_is_used(tmp_path, caplog):
    tensors = {**load_file(MODEL), "zz": torch.zeros(4, dtype=torch.uint16), "zzz": torch.zeros(4, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "m.safetensors")
    changed(tmp_path / "m.safetensors", _set("zzz", dtype="F4", shape=[8]))
    opened = tf.open_tensors(tmp_path / "m.safetensors")
    assert opened["zz"].dtype == torch.uint16
    with pytest.raises(ValueError, match="zzz has dtype F4, which is not supported"):
        _ = opened["zzz"]
    load_model(LoadSpec(str(tmp_path / "m.safetensors")))
    assert set(tf.load_tensors(tmp_path / "m.safetensors")) == set(tensors) - {"zzz"}
    assert "left out, their dtype is not known: zzz" in caplog.text


def test_a_tensor_of_unknown_dtype_is_left_out_when_the_model_is_written(tmp_path, caplog):
    from library.model_util import save_checkpoint

    save_file({**load_file(MODEL), "zz": torch.arange(4).to(torch.uint16), "zzz": torch.zeros(4, dtype=torch.uint8)},
              tmp_path / "m.safetensors")  # fmt: skip
    changed(tmp_path / "m.safetensors", _set("zzz", dtype="F4", shape=[8]))
    modules = load_model(LoadSpec(str(tmp_path / "m.safetensors")))
    save_checkpoint(tmp_path / "out.safetensors", modules, v2=False)
    written = load_file(tmp_path / "out.safetensors")
    assert written["zz"].tolist() == [0, 1, 2, 3]
    assert "zzz" not in written
    assert "zzz" in caplog.text


def test_integers_in_place_of_weights_are_refused(tmp_path):
    stored = load_file(MODEL)
    key = "model.diffusion_model.out.2.bias"
    save_file({**stored, key: stored[key].to(torch.int32)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"m\.safetensors: {key} holds torch.int32; float weights are needed"):
        load_model(LoadSpec(str(tmp_path / "m.safetensors")))


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_damaged_settings_beside_tensors_are_named(tmp_path, text):
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json"):
        tf.open_tensors(tmp_path / "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        tf.open_tensors(tmp_path / "model.safetensors.index.json")


# --- NaN -------------------------------------------------------------------------------------------------------
def spoilt(tensor: Tensor, count: int = 1, value: float = float("nan")) -> Tensor:
    changed = tensor.clone().float()
    changed.view(-1)[:count] = value
    return changed.to(tensor.dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_numbers_that_are_not_finite_are_counted_in_every_float_format(dtype):
    sound = torch.linspace(-400, 400, 7).to(dtype)
    tensors = {"sound": sound, "nan": spoilt(sound, 2), "ids": torch.arange(3), "none": sound[:0]}
    if dtype not in (torch.float8_e4m3fn,):  # which has no infinity
        tensors["infinite"] = spoilt(sound, 3, float("-inf"))
    assert non_finite(tensors) == [("nan", 2), ("infinite", 3)][: len(tensors) - 3]


def test_a_model_with_nan_is_refused_by_name_and_drawn_from_with_one_warning(tmp_path, caplog):
    stored = load_file(MODEL)
    names = ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.bias"]
    save_file({**stored, **{n: spoilt(stored[n], 2) for n in names}}, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError, match=r"bad\.safetensors is spoilt: NaN or infinite numbers in first_stage_model\.dec"
    ):
        load_model(LoadSpec(str(tmp_path / "bad.safetensors")))
    with only_warned():
        load_model(LoadSpec(str(tmp_path / "bad.safetensors")))
    [warning] = [record.getMessage() for record in caplog.records]
    assert all(f"{name} (2)" in warning for name in names)
    save_file({**stored, "model_ema.x": torch.tensor([float("nan")])}, tmp_path / "unused.safetensors")
    load_model(LoadSpec(str(tmp_path / "unused.safetensors")))


def test_an_embedding_with_nan_is_refused_by_name(tmp_path):
    torch.save({"string_to_param": {"*": torch.tensor([[1.0, float("inf")]])}}, tmp_path / "word.pt")
    with pytest.raises(ValueError, match=r"word\.pt is spoilt: NaN or infinite numbers in \* \(1\)"):
        read_embeddings(tmp_path / "word.pt", ["x"])


@pytest.mark.slow
def test_a_network_with_nan_is_refused_by_training_and_merging_and_drawn_with_a_warning(tmp_path, caplog):
    stored, name = load_file(MODELS / "sd1_lora_start.safetensors"), "lora_unet_mid_block_attentions_0_proj_in"
    key = f"{name}.lora_down.weight"
    path = tmp_path / "lora.safetensors"
    save_file({**stored, key: spoilt(stored[key], 3), "other.x": torch.tensor(float("nan"))}, path)
    model, message = tiny_model(), rf"lora\.safetensors is spoilt: NaN or infinite numbers in {key} \(3\)\."
    models = contract.HostModels(model.vae, model.text_encoder, model.unet)
    network, _ = contract.create_for_generation("networks.lora", path, models)
    with pytest.raises(ValueError, match=message):
        contract.load_weights(network, path)
    with pytest.raises(ValueError, match=message):
        contract.merge_base_weights("networks.lora", path, 1.0, models, dtype=None, device="cpu")
    del stored[key]
    save_file({**stored, key: spoilt(load_file(path)[key], 3)}, path)
    options = merge_lora.MergeOptions(models=(str(path),), ratios=(1.0,), save_to=str(tmp_path / "merged.safetensors"))
    for into_model in (None, str(MODEL)):
        with pytest.raises(ValueError, match=message):
            merge_lora.merge(replace(options, sd_model=into_model))
    assert not (tmp_path / "merged.safetensors").exists()
    caplog.clear()
    attached = AttachedNetworkOptions(network_module=("networks.lora",), network_weights=(str(path),))
    for options in (attached, replace(attached, network_merge=True)):
        caplog.clear()
        with only_warned():
            attach_networks(options, tiny_family(), device="cpu", dtype=torch.float32)
        [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "lora.safetensors is spoilt, expect black or broken pictures: NaN or infinite numbers in" in warning


# --- extra keys ------------------------------------------------------------------------------------------------
EXTRAS = {
    "ddim_sigmas": torch.ones(3), "embedding_manager.string_to_param.x": torch.ones(2), "global_step": torch.tensor(5),
    "lora_unet_down.lora_up.weight": torch.ones(2, 2), "model_ema.decay": torch.tensor(1.0),
    "betas": torch.ones(3), "x.position_ids": torch.arange(3)[None],
}  # fmt: skip


def load_flux(path: Path) -> Any:
    files = {name: str(MODELS / f"{name}_tiny.safetensors") for name in ("clip_l", "t5xxl")}
    return flux_model_util.load_model(
        flux_model_util.FluxLoadSpec(str(path), vae=str(MODELS / "flux_ae_tiny.safetensors"), **files)
    ).transformer


def load_sd3(path: Path) -> Any:
    encoders = {name: str(MODELS / f"{name}_tiny.safetensors") for name in ("clip_l", "clip_g", "t5xxl")}
    return sd3_model_util.load_model(sd3_model_util.Sd3LoadSpec(str(path), encoders=encoders)).mmdit


@pytest.mark.parametrize(
    ("name", "load", "is_bare"),
    [
        ("sd1_tiny", lambda path: load_model(LoadSpec(str(path))).unet, False),
        ("sdxl_tiny", lambda path: sdxl_model_util.load_model(sdxl_model_util.LoadSpec(str(path))).unet, False),
        ("sd3_tiny", load_sd3, False),
        ("flux_tiny", load_flux, True),
        ("flux_tiny", load_flux, False),
    ],
)
def test_harmless_extra_keys_are_one_warning_and_the_model_is_used(name, load, is_bare, tmp_path, caplog):
    stored = load_file(MODELS / f"{name}.safetensors")
    if name == "flux_tiny" and not is_bare:
        stored = {UNET_PREFIX + key: value for key, value in stored.items()} | {"other.program": torch.ones(1)}
    save_file({**stored, **EXTRAS}, tmp_path / "extra.safetensors")
    found = load(tmp_path / "extra.safetensors").state_dict()
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "extra.safetensors" in warning
    assert "belong to no part of the model and are not used: ddim_sigmas, embedding_manager" in warning
    wanted = load(MODELS / f"{name}.safetensors").state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_left_overs_inside_a_part_are_one_warning_and_unknown_parts_are_refused(tmp_path, caplog):
    stored, key = load_file(MODEL), f"{UNET_PREFIX}out.2"
    save_file(
        {**stored, f"{key}.lora_up.weight": torch.ones(2, 2), f"{key}.alpha": torch.ones(())},
        tmp_path / "a.safetensors",
    )
    load_model(LoadSpec(str(tmp_path / "a.safetensors")))
    assert "2 tensors belong to no part of the model and are not used" in caplog.text
    save_file({**stored, f"{key}.second": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: .*second"):
        load_model(LoadSpec(str(tmp_path / "b.safetensors")))
