"""Checkpoints and folders, to and from diffusers: the same answers and the same picture on both sides."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library import model_util
from tests.lora_files import (
    answers,
    assert_equal_answers,
    assert_equal_pictures,
    picture,
    pipeline_picture,
    tiny_family,
    tiny_model,
    tokenizer,
)
from tests.sd2_tiny import sd2_tensors
from tests.training import MODEL

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SCHEDULER = model_util.scheduler_config(v_parameterization=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Diffusers folder that we saved."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model_util.save_diffusers_folder(folder, tiny_model(), scheduler=SCHEDULER, tokenizer=tokenizer())
    return folder


@pytest.fixture(scope="module")
def our_picture():
    return picture(tiny_family())


def config_only(folder: Path, target: Path) -> Path:
    """What `from_single_file` needs besides the file: settings and tokenizer, no weights."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved.safetensors", "saved.ckpt"])
def test_diffusers_opens_our_single_file(name, folder, our_picture, tmp_path):
    from diffusers import StableDiffusionPipeline

    model_util.save_checkpoint(tmp_path / name, tiny_model(), v2=False)
    config = config_only(folder, tmp_path / "config")
    pipeline = StableDiffusionPipeline.from_single_file(str(tmp_path / name), config=str(config), dtype=torch.float32)
    assert_equal_answers(answers(pipeline), answers(tiny_model()))
    assert_equal_pictures(pipeline_picture(pipeline), our_picture)


@pytest.mark.slow
def test_diffusers_opens_our_single_file_of_sd2(tmp_path):
    from diffusers import StableDiffusionPipeline

    save_file(sd2_tensors(load_file(MODEL)), tmp_path / "sd2.safetensors")
    ours = tiny_model(tmp_path / "sd2.safetensors", v2=True)
    model_util.save_diffusers_folder(tmp_path / "full", ours, scheduler=SCHEDULER, tokenizer=tokenizer())
    model_util.save_checkpoint(tmp_path / "again.safetensors", ours, v2=True)
    config = config_only(tmp_path / "full", tmp_path / "config")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "again.safetensors"), config=str(config), dtype=torch.float32
    )
    assert_equal_answers(answers(pipeline), answers(ours))
    assert_equal_answers(answers(StableDiffusionPipeline.from_pretrained(tmp_path / "full")), answers(ours))


@pytest.mark.slow
def test_diffusers_opens_our_folder(folder, our_picture):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert all(key.startswith("text_model.") for key in load_file(folder / "text_encoder" / "model.safetensors"))
    assert_equal_answers(answers(pipeline), answers(tiny_model()))
    assert_equal_pictures(pipeline_picture(pipeline), our_picture)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"variant": "fp16"}, pytest.param({"safe_serialization": False}, marks=pytest.mark.slow),
        pytest.param({"max_shard_size": "600KB"}, marks=pytest.mark.slow),
    ],
)
def test_we_open_folders_that_diffusers_writes(settings, folder, our_picture, tmp_path):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs", **settings)
    if settings.get("max_shard_size"):
        assert list((tmp_path / "theirs" / "unet").glob("*-of-*.safetensors"))
    if settings.get("variant"):
        spec = model_util.LoadSpec(str(tmp_path / "theirs"), dtype=torch.float32, variant="fp16")
        loaded = model_util.load_model(spec)
        assert_equal_answers(answers(loaded), answers(tiny_model()))
        return
    assert_equal_pictures(picture(tiny_family(tmp_path / "theirs")), our_picture)


def test_a_model_survives_the_round_through_diffusers(folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    modules = model_util.load_diffusers_folder(tmp_path / "theirs", v2=False)
    model_util.save_checkpoint(tmp_path / "back.safetensors", modules, v2=False, dtype=torch.float16)
    before, after = load_file(MODEL), load_file(tmp_path / "back.safetensors")
    assert set(after) <= set(before)
    assert {key for key in before if key not in after} <= {key for key in before if "position_ids" in key}
    assert all(torch.equal(before[key].half(), value) for key, value in after.items())
