"""tools/convert_diffusers20_original_sd.py: every layout and precision of SD 1 and 2, both ways, bit by bit."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import tool_launch
from library.checkpoints.layout_sd import SD2_TEXT_PREFIX
from library.options.errors import UserError
from tests.sd2_tiny import sd2_tensors
from tools import convert_diffusers20_original_sd as tool

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "tools/convert_diffusers20_original_sd.py"
GOLDEN = ROOT / "tests" / "data" / "golden"
TOKENIZER = GOLDEN / "tokenizers" / "openai_clip-vit-large-patch14"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
PARTS = {
    "unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}  # fmt: skip


def convert(*words: object) -> None:
    """What the tool does with this command line."""
    tool.convert(tool_launch.parse(tool.TOOL, [str(word) for word in words]))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder's components with the component before the key."""
    if path.is_dir():
        parts = {part: read(path / part / name) for part, name in PARTS.items()}
        return {f"{part}/{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


def differences(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """Keys that are on one side only or whose type, shape or any bit differs."""
    return sorted(
        key for key in {*one, *two}
        if key not in one or key not in two or one[key].dtype != two[key].dtype or not torch.equal(one[key], two[key])
    )  # fmt: skip


def text_of(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 file with values that half precision cannot hold, for each version; the tokenizer stands beside it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tokenizer").symlink_to(TOKENIZER)
    generator = torch.Generator().manual_seed(1)
    stored = load_file(GOLDEN / "models" / "sd1_tiny.safetensors")
    stored = {key: value + 1e-5 * torch.randn(value.shape, generator=generator) for key, value in stored.items()}
    files = {"v1": folder / "v1.safetensors", "v2": folder / "v2.safetensors"}
    save_file(stored, files["v1"])
    tensors = sd2_tensors(stored)
    for key in tensors:  # the last block and the projection are used by nobody, and kept
        if key.startswith((f"{SD2_TEXT_PREFIX}transformer.resblocks.2.", f"{SD2_TEXT_PREFIX}text_projection")):
            tensors[key] = torch.randn(tensors[key].shape, generator=generator)
    save_file(tensors, files["v2"])
    return files


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders of the same models, made by the tool."""
    target = tmp_path_factory.mktemp("folders")
    convert(models["v1"], target / "v1", "--v1")
    convert(models["v2"], target / "v2", "--v2", "--unet_use_linear_projection")
    return {"v1": target / "v1", "v2": target / "v2"}


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


# --- the same bits -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_file_to_file_to_file_is_the_same_file(models, tmp_path, version, ending):
    convert(models[version], tmp_path / f"there{ending}", f"--{version}")
    assert differences(read(tmp_path / f"there{ending}"), read(models[version])) == []
    convert(tmp_path / f"there{ending}", tmp_path / "back.safetensors", f"--{version}")
    assert differences(read(tmp_path / "back.safetensors"), read(models[version])) == []


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_sd1_file_to_folder_to_file_is_the_same_file(models, folders, tmp_path, ending):
    convert(folders["v1"], tmp_path / f"back{ending}")
    assert differences(read(tmp_path / f"back{ending}"), read(models["v1"])) == []


@pytest.mark.parametrize("options", [[], ["--unet_use_linear_projection"]])
def test_sd2_file_to_folder_to_file_keeps_all_that_a_folder_can_hold(models, tmp_path, options):
    convert(models["v2"], tmp_path / "folder", "--v2", *options)
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    back, source = read(tmp_path / "back.safetensors"), read(models["v2"])
    unused = {key for key in source if key.startswith((f"{SD2_TEXT_PREFIX}transformer.resblocks.2.",))}
    unused |= {f"{SD2_TEXT_PREFIX}text_projection", f"{SD2_TEXT_PREFIX}logit_scale"}
    assert set(back) == set(source)
    assert set(differences(back, source)) <= unused
    dummy = f"{SD2_TEXT_PREFIX}transformer.resblocks.2.ln_1.weight"
    assert torch.equal(back[dummy], source[dummy.replace("resblocks.2", "resblocks.1")])
    assert torch.equal(back[f"{SD2_TEXT_PREFIX}text_projection"], torch.ones(128, 128))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_folder_to_folder_is_the_same_folder(folders, tmp_path, version):
    convert(folders[version], tmp_path / "copy")
    assert differences(read(tmp_path / "copy"), read(folders[version])) == []
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert text_of(tmp_path / "copy" / name) == text_of(folders[version] / name)
    assert text_of(tmp_path / "copy/tokenizer/vocab.json") == text_of(TOKENIZER / "vocab.json")


@pytest.mark.parametrize(("version", "target"), [("v1", "out.safetensors"), ("v2", "out.ckpt"), ("v2", "folder.out")])
@pytest.mark.parametrize("precision", DTYPES)
def test_every_precision_is_one_rounding_of_the_source(models, tmp_path, version, target, precision):
    option = [f"--{precision}"] if version == "v1" else ["--save_precision_as", precision]
    convert(models[version], tmp_path / target, f"--{version}", *option)
    written = read(tmp_path / target)
    assert {value.dtype for value in written.values()} == {DTYPES[precision]}
    if not (tmp_path / target).is_dir():
        wanted = {key: value.to(DTYPES[precision]) for key, value in read(models[version]).items()}
        assert differences(written, wanted) == []


@pytest.mark.parametrize("precision", DTYPES)
def test_precisions_of_folders(folders, tmp_path, precision):
    convert(folders["v1"], tmp_path / "copy", f"--{precision}")
    wanted = {key: value.to(DTYPES[precision]) for key, value in read(folders["v1"]).items()}
    assert differences(read(tmp_path / "copy"), wanted) == []
    assert text_of(tmp_path / "copy/text_encoder/config.json")["dtype"] == str(DTYPES[precision]).split(".")[1]


# --- other programs ------------------------------------------------------------------------------------------
def test_sd2_folders_have_the_form_of_projections_that_was_asked_for(models, folders, tmp_path):
    convert(models["v2"], tmp_path / "old", "--v2")
    key = "unet/down_blocks.0.attentions.0.proj_in.weight"
    assert text_of(folders["v2"] / "unet/config.json")["use_linear_projection"] is True
    assert text_of(tmp_path / "old/unet/config.json")["use_linear_projection"] is False
    linear, convolution = read(folders["v2"])[key], read(tmp_path / "old")[key]
    assert linear.ndim == 2 and torch.equal(convolution, linear[:, :, None, None])
    convert(tmp_path / "old", tmp_path / "copy")
    assert differences(read(tmp_path / "copy"), read(tmp_path / "old")) == []
    convert(tmp_path / "old", tmp_path / "new", "--unet_use_linear_projection")
    assert differences(read(tmp_path / "new"), read(folders["v2"])) == []


@pytest.mark.parametrize("form", ["v1", "v2", "old v2"])
def test_the_diffusers_library_opens_the_folder_and_computes_the_same(models, folders, tmp_path, form):
    from diffusers import StableDiffusionPipeline

    from library.model_util import load_checkpoint

    version, folder = form[-2:], folders[form[-2:]]
    if form == "old v2":
        folder = tmp_path / "old"
        convert(models["v2"], folder, "--v2")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    ours = load_checkpoint(models[version], v2=version == "v2")
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    ids = pipeline.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        context = ours.text_encoder(ids).last_hidden_state
        assert torch.equal(pipeline.text_encoder(ids).last_hidden_state, context)
        torch.testing.assert_close(pipeline.unet(x, t, context).sample, ours.unet(x, t, context).sample)
        assert torch.equal(pipeline.vae.decode(x).sample, ours.vae.decode(x).sample)


def test_a_folder_written_by_the_diffusers_library_becomes_the_same_file(models, folders, tmp_path):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(folders["v1"]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back.safetensors")
    assert differences(read(tmp_path / "back.safetensors"), read(models["v1"])) == []
    text = tmp_path / "theirs/text_encoder/model.safetensors"
    save_file({key.removeprefix("text_model."): value for key, value in load_file(text).items()}, text)
    convert(tmp_path / "theirs", tmp_path / "again.safetensors")
    assert differences(read(tmp_path / "again.safetensors"), read(models["v1"])) == []


# --- what comes with a model ---------------------------------------------------------------------------------
def test_pickles_add_counters_and_keep_unknown_keys(models, tmp_path):
    stored = read(models["v1"])
    extra = {"alphas_cumprod": torch.rand(5, dtype=torch.float64), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": stored | extra, "epoch": 3, "global_step": 100}, tmp_path / "in.ckpt")
    convert(tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--v1", "--epoch", 2, "--global_step", 50, "--fp16")
    written = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (5, 150)
    wanted = {key: value.half() for key, value in stored.items()} | {"alphas_cumprod": extra["alphas_cumprod"]}
    assert differences(written["state_dict"], wanted) == []


@pytest.mark.parametrize("text", ['{"title": "a", "x": "y"}', "{'title': 'a', 'x': 'y'}"])
def test_metadata_of_the_source_stays_and_is_added_to(models, tmp_path, text):
    before = {"modelspec.prediction_type": "v", "modelspec.hash_sha256": "0x1", "title": "old", "format": "pt"}
    save_file(read(models["v1"]), tmp_path / "in.safetensors", before)
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--v1", "--metadata", text)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.prediction_type": "v", "title": "a", "x": "y"}


def test_the_prediction_type_survives_both_ways(models, tmp_path):
    save_file(read(models["v2"]), tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    convert(tmp_path / "v.safetensors", tmp_path / "folder", "--v2")
    assert text_of(tmp_path / "folder/scheduler/scheduler_config.json")["prediction_type"] == "v_prediction"
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"


def test_scheduler_and_tokenizer_come_from_the_reference_model(models, tmp_path):
    reference = tmp_path / "reference"
    (reference / "scheduler").mkdir(parents=True)
    scheduler = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}
    (reference / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    shutil.copytree(TOKENIZER, reference / "tokenizer")
    settings = text_of(TOKENIZER / "tokenizer_config.json") | {"model_max_length": 99}
    (reference / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    convert(models["v1"], tmp_path / "folder", "--v1", "--reference_model", reference)
    assert text_of(tmp_path / "folder/scheduler/scheduler_config.json") == scheduler
    assert text_of(tmp_path / "folder/model_index.json")["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert text_of(tmp_path / "folder/tokenizer/tokenizer_config.json")["model_max_length"] == 99


def test_a_model_without_tokenizer_becomes_a_folder_that_says_so(models, tmp_path, caplog):
    save_file(read(models["v1"]), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "folder", "--v1")
    assert "put its files into the folder 'tokenizer'" in caplog.text
    assert not (tmp_path / "folder/tokenizer").exists()
    assert text_of(tmp_path / "folder/model_index.json")["tokenizer"] == [None, None]


def test_a_variant_is_read_where_it_exists(folders, tmp_path):
    convert(folders["v1"], tmp_path / "mixed")
    for part, name in PARTS.items():
        if part != "vae":
            tensors = {key: value.half() for key, value in load_file(folders["v1"] / part / name).items()}
            save_file(tensors, tmp_path / "mixed" / part / name.replace(".safetensors", ".fp16.safetensors"))
    convert(tmp_path / "mixed", tmp_path / "out", "--variant", "fp16")
    wanted = {k: v if k.startswith("vae/") else v.half() for k, v in read(folders["v1"]).items()}
    assert differences(read(tmp_path / "out"), wanted) == []
    with pytest.raises(FileNotFoundError, match="no component has weights of the variant ema"):
        convert(tmp_path / "mixed", tmp_path / "out", "--variant", "ema")


def test_weights_are_safetensors_with_and_without_the_option(models, folders, tmp_path):
    convert(models["v1"], tmp_path / "folder", "--v1", "--use_safetensors")
    names = [sorted(p.name for p in f.rglob("*model.*") if p.is_file()) for f in (tmp_path / "folder", folders["v1"])]
    assert names[0] == names[1] == sorted(PARTS.values())


def test_a_dot_in_a_name_does_not_make_a_checkpoint(models, tmp_path):
    convert(models["v1"], tmp_path / "model.v1.5", "--v1")
    assert (tmp_path / "model.v1.5/unet/config.json").is_file()


# --- command line --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v1.safetensors", "out"], "checkpoint file: say with --v1 or --v2"),
        (["v1.safetensors", "out", "--v1", "--v2"], "--v1 and --v2 cannot be combined"),
        (["nothing.safetensors", "out", "--v1"], "model_to_load: there is no file or folder nothing.safetensors"),
        (["v1.safetensors", "out", "--v1", "--fp16", "--save_precision_as", "bf16"], "ask for one precision"),
        (["v1.safetensors", "out", "--v1", "--metadata", "{1: 'a'}"], "--metadata .* texts only"),
        (["v1.safetensors", "out", "--v1", "--metadata", "__import__('os').getcwd()"], "--metadata .* texts only"),
        (["v1.safetensors", "out", "--v1", "--epoch", "-1"], "--epoch -1 is not allowed"),
        (["v1.safetensors", "v1.safetensors/x/../../tokenizer", "--v1", "--reference_model", "no"], "no folder no"),
        (["v1.safetensors", "folder.ckpt", "--v1"], "is a folder, but its name is that of a checkpoint"),
        (["v1.safetensors", "plain", "--v1"], "a Diffusers folder cannot take its place"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(models, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.safetensors").symlink_to(models["v1"])
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "plain").touch()
    with pytest.raises(UserError, match=message):
        convert(*words)


def test_the_wrong_version_is_named(models, folders, tmp_path):
    with pytest.raises(ValueError, match=r"model_to_load .* looks like .* 2\.x .*, but .* 1\.x .* Add --v2"):
        convert(models["v2"], tmp_path / "out.safetensors", "--v1")
    with pytest.raises(ValueError, match=r"model_to_load .* looks like .* 1\.x .*, but .* 2\.x .* Remove --v2"):
        convert(folders["v1"], tmp_path / "out.safetensors", "--v2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_options_without_effect_are_told(models, tmp_path, caplog):
    words = ["--epoch", 1, "--variant", "fp16", "--reference_model", tmp_path, "--unet_use_linear_projection"]
    convert(models["v2"], tmp_path / "out.safetensors", "--v2", *words)
    for name in ("--epoch", "--variant", "--reference_model", "--unet_use_linear_projection"):
        assert f"{name} " in caplog.text and "has no effect" in caplog.text
    caplog.clear()
    convert(models["v2"], tmp_path / "out.safetensors", "--v2")
    assert "effect" not in caplog.text


@pytest.mark.slow
def test_the_script_runs_from_the_root(models, tmp_path):
    words = [sys.executable, SCRIPT, str(models["v1"]), str(tmp_path / "out.safetensors"), "--v1", "--float"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert differences(read(tmp_path / "out.safetensors"), read(models["v1"])) == []


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize("option", ["--fp16", "--v2"])
def test_a_mistake_is_one_line_and_status_2(models, tmp_path, capsys, option):
    version = ["--v1", "--float"] if option == "--fp16" else []
    with pytest.raises(SystemExit) as stop:
        tool_launch.main(tool.TOOL, [str(models["v1"]), str(tmp_path / "out.safetensors"), option, *version])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[-1].startswith(f"{SCRIPT}: error: ")
    assert not any("Traceback" in line for line in lines) and not list(tmp_path.iterdir())
