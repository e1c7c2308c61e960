"""Every option of every script that draws has an effect, is refused, or says that it has none.

One row per option, compared with the picture of the same seed without it. A new option without a row fails the test of
completeness; an option that is read and not used fails its row.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library import logs
from library.checkpoints.embeddings import LAYER_KEYS
from library.options.generation import GenerationOptions
from library.options.not_yet import GENERATION_NOT_YET
from tests.generation import difference, generate, texts_of, write_lora
from tests.sdxl_tiny import MODEL as SDXL
from tests.training import MODEL as SD1

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Words = tuple[str, ...]
LINE = ("--prompt", "a (red:1.4) cat --n dog --d 5 --f x.png")


@dataclass(frozen=True)
class Row:
    """`words` set the option, on top of `base`, which both pictures have. `{name}` stands for a file of `files`."""

    words: Words
    base: Words = LINE
    script: str = "gen_img"
    least: int = 1  # levels of 255 by which the pictures differ
    most: int = 255


def changes(*words: str, base: Words = (), script: str = "gen_img", line: Words = LINE) -> Row:
    return Row(words, (*line, *base), script)


def same(*words: str, base: Words = (), most: int = 1) -> Row:
    """For options of speed, memory and names: the picture stays as it was, up to rounding."""
    return Row(words, (*LINE, *base), least=0, most=most)


@dataclass(frozen=True)
class Refused:
    """The script ends with status 2 and says this."""

    words: Words
    said: str
    base: Words = LINE


@dataclass(frozen=True)
class Looked:
    """A look of its own at what the option does: a test of that name in this file."""

    test: Callable[..., None]


LORA = ("--network_module", "networks.lora", "--network_weights", "{lora}")
LAST = ("--prompt", "a cat --d 5 --f x.png --am 0")  # strength 0, for networks that are not merged
INIT = ("--image_path", "{photo}", "--steps", "4")
SIZED = ("--ckpt", str(SDXL))


# --- tables ---------------------------------------------------------------------------------------------------
PICTURES: Mapping[str, Row] = {
    "ckpt": changes("--ckpt", "{other}"),
    "v_parameterization": changes("--v_parameterization"),
    "zero_terminal_snr": changes("--zero_terminal_snr", base=("--v_parameterization",)),
    "vae": changes("--vae", "{other}"),
    "no_half_vae": changes("--no_half_vae", base=("--bf16",)),
    "vae_batch_size": same("--vae_batch_size", "0.5", base=("--batch_size", "2")),
    "vae_slices": same("--vae_slices", "16", most=2),
    "fp16": changes("--fp16"),
    "bf16": changes("--bf16"),
    "sdpa": same("--sdpa"),
    "opt_channels_last": same("--opt_channels_last"),
    "v1": same("--v1"),
    "prompt": changes("--prompt", "a dog --d 5 --f x.png"),
    "from_file": changes("--from_file", "{prompts}"),
    "from_module": changes("--from_module", "{prompter}"),
    "prompter_module_args": changes(
        "--prompter_module_args", "a dog", base=("--from_module", "{prompter}"), line=()
    ),
    "seed": changes("--seed", "6", base=("--seed", "5"), line=("--prompt", "a cat --f x.png")),
    "batch_size": same("--batch_size", "2"),
    "W": changes("--W", "128"),
    "H": changes("--H", "128"),
    **{
        name: changes(f"--{name}", "700", base=SIZED)
        for name in ("original_width", "original_height", "original_width_negative", "original_height_negative",
                     "crop_top", "crop_left")
    },
    "steps": changes("--steps", "3"),
    "sampler": changes("--sampler", "euler"),
    "scale": changes("--scale", "3"),
    "negative_scale": changes("--negative_scale", "0.5"),
    "clip_skip": changes("--clip_skip", "2"),
    "max_embeddings_multiples": changes(
        "--max_embeddings_multiples", "2", line=("--prompt", " ".join(["red"] * 90) + " --d 5 --f x.png")
    ),
    "emb_normalize_mode": changes("--emb_normalize_mode", "none"),
    "force_scheduler_zero_steps_offset": changes("--force_scheduler_zero_steps_offset"),
    "image_path": changes(*INIT, base=("--steps", "4")),
    "mask_path": changes("--mask_path", "{mask}", base=INIT),
    "strength": changes("--strength", "0.3", base=INIT),
    "network_module": changes(*LORA),
    "network_weights": changes("--network_weights", "{second}", base=LORA),
    "network_mul": changes("--network_mul", "0.3", base=LORA),
    "network_args": changes(
        "--network_args", "factor=0.2", base=("--network_module", "scaled_lora", "--network_weights", "{lora}")
    ),
    "network_merge": changes("--network_merge", base=LORA, line=LAST),
    "network_merge_n_models": changes("--network_merge_n_models", "1", base=LORA, line=LAST),
    "network_pre_calc": same("--network_pre_calc", base=LORA),
    "textual_inversion_embeddings": changes(
        "--textual_inversion_embeddings", "{word}", line=("--prompt", "a word --d 5 --f x.png")
    ),
    "XTI_embeddings": changes(
        "--XTI_embeddings", "{layers}", script="gen_img_diffusers", line=("--prompt", "a layers --d 5 --f x.png")
    ),
}  # fmt: skip

REFUSALS: Mapping[str, Refused] = {
    "v2": Refused(("--v2",), "Remove --v2."),
    "sdxl": Refused(("--sdxl",), "looks like a Stable Diffusion 1.x checkpoint"),
    "tokenizer_cache_dir": Refused(("--tokenizer_cache_dir", "{empty}"), "tokenizer"),
}

#: a value for each option that does not work yet
NOT_YET_VALUES: Mapping[str, Words] = {
    **dict.fromkeys(("control_net_models", "control_net_lllite_models", "guide_image_path"), ("x.safetensors",)),
    "control_net_preps": ("none",),
    **dict.fromkeys(("control_net_multipliers", "control_net_weights", "control_net_ratios"), ("0.5",)),
    **dict.fromkeys(("pyramid_noise_discount_range", "noise_offset_range"), ("0.1", "0.2")),
    "highres_fix_upscaler": ("networks.lora",), "highres_fix_upscaler_args": ("a=1",),
    "gradual_latent_unsharp_params": ("3,0.5,0.5",),
}  # fmt: skip


# --- files ----------------------------------------------------------------------------------------------------
SCALED_LORA = """
from networks import lora
from networks.lora import create_network

def create_network_from_weights(multiplier, *models, factor="1", **settings):
    network, weights = lora.create_network_from_weights(multiplier, *models, **settings)
    set_multiplier = network.set_multiplier
    network.set_multiplier = lambda value: set_multiplier(value * float(factor))
    return network, weights
"""
PROMPTER = """
def get_prompter(args, pipe, networks):
    lines = iter([(args.prompter_module_args or "a fox") + " --d 5 --f x.png", None])
    return lambda *arguments: next(lines)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What rows name in braces."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(1)
    altered = {
        key: value * 1.2 if key.startswith(("first_stage_model.decoder", "model.diffusion_model.out.")) else value
        for key, value in load_file(SD1).items()
    }
    save_file(altered, folder / "other.safetensors")
    embedding = load_file(SD1)["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].float()
    rows = torch.randn(1, embedding.shape[1], generator=generator) * embedding.std()
    save_file({"emb_params": rows}, folder / "word.safetensors")
    save_file({key: rows * (index % 3) for index, key in enumerate(LAYER_KEYS)}, folder / "layers.safetensors")
    pixels = torch.rand(64, 64, 3, generator=generator)
    Image.fromarray((pixels * 255).to(torch.uint8).numpy()).save(folder / "photo.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    write_lora(folder / "lora.safetensors")
    write_lora(folder / "second.safetensors", seed=1)
    (folder / "prompts.txt").write_text("a wolf --d 5 --f x.png\n", encoding="utf-8")
    (folder / "prompter.py").write_text(PROMPTER, encoding="utf-8")
    (folder / "scaled_lora.py").write_text(SCALED_LORA, encoding="utf-8")
    (folder / "empty").mkdir()
    return {path.stem: str(path) for path in folder.iterdir()} | {"folder": str(folder)}


_drawn: dict[tuple[str, Words], Path] = {}


@pytest.fixture
def draw(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """(words, script) -> the picture; the same words are drawn once."""
    monkeypatch.syspath_prepend(files["folder"])

    def once(words: Words, script: str = "gen_img") -> Path:
        key = script, words
        if key not in _drawn:
            filled = [word.format(**files) if word.startswith("{") else word for word in words]
            (_drawn[key],) = generate(*filled, outdir=tmp_path_factory.mktemp("o"), script=script)
        return _drawn[key]

    return once


# --- pictures -------------------------------------------------------------------------------------------------
def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("name", PICTURES)
def test_an_option_changes_the_picture_or_leaves_it(name: str, draw: Callable[..., Path]) -> None:
    row = PICTURES[name]
    plain, other = draw(row.base, row.script), draw(_joined(row.base, row.words), row.script)
    if size_of(plain) != size_of(other):
        assert name in ("W", "H")
        return
    assert row.least <= difference(plain, other) <= row.most


def _joined(base: Words, words: Words) -> Words:
    """`base` with `words`, whose options replace those of the base."""
    given = {word for word in words if word.startswith("--")}
    kept: list[str] = []
    is_replaced = False
    for word in base:
        is_replaced = word in given if word.startswith("--") else is_replaced
        kept += [] if is_replaced else [word]
    return (*kept, *words)


@pytest.mark.parametrize("name", ["original_width", "crop_left"])
def test_sizes_mean_nothing_to_models_without_size_conditioning_and_say_so(
    name: str, draw: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = draw((*LINE, f"--{name}", "700"))
    assert f"--{name}" in caplog.text and "no effect" in caplog.text
    assert difference(draw(LINE), other) == 0


@pytest.mark.parametrize("name", ["xformers", "diffusers_xformers"])
def test_attention_of_a_package_that_is_missing_is_never_silent(
    name: str, draw: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(logs, "_warned", set())
    other = draw((*LINE, f"--{name}"))
    assert "xformers" in caplog.text and difference(draw(LINE), other) == 0


# --- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*REFUSALS, *GENERATION_NOT_YET])
def test_what_cannot_be_used_is_refused(
    name: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = GenerationOptions.specs()[name]
    row = REFUSALS.get(name)
    if row is None:
        value = () if spec.is_flag else NOT_YET_VALUES.get(name, ("0.25",) if spec.type_name == "float" else ("7",))
        switch = next(iter(GENERATION_NOT_YET[name].part_of), name)  # which alone is named
        words = () if switch == name else (f"--{switch}", *NOT_YET_VALUES.get(switch, ("7",)))
        row = Refused((f"--{name}", *value, *words), f"--{switch}: {GENERATION_NOT_YET[name].reason}")
    with pytest.raises(SystemExit) as stop:
        scripts = ("gen_img", "gen_img_diffusers", "sdxl_gen_img")
        wanted = [name, *(word[2:] for word in row.words if word.startswith("--") and word[2:] in GENERATION_NOT_YET)]
        script = next(script for script in scripts if all(has(script, option) for option in wanted))
        words = [word.format(**files) if word.startswith("{") else word for word in (*row.base, *row.words)]
        generate(*words, outdir=tmp_path / "o", script=script)
    assert stop.value.code == 2
    assert row.said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def has(script: str, name: str) -> bool:
    import importlib

    return name in importlib.import_module(script).SCRIPT.options.specs()


# --- files, prompts, console ----------------------------------------------------------------------------------
def test_numbers_of_images(tmp_path: Path) -> None:
    lines = ("--prompt", "a cat", "--steps", "1")
    assert len(generate(*lines, "--images_per_prompt", "2", outdir=tmp_path / "a")) == 2
    assert len(generate(*lines, "--n_iter", "2", outdir=tmp_path / "b")) == 2


@pytest.mark.slow
def test_order_and_seeds_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    common = ("--from_file", tmp_path / "p.txt", "--seed", "3", "--steps", "1")
    plain = [texts_of(path) for path in generate(*common, outdir=tmp_path / "a")]
    mixed = [texts_of(path) for path in generate(*common, "--shuffle_prompts", outdir=tmp_path / "b")]
    equal = [texts_of(path) for path in generate(*common, "--iter_same_seed", outdir=tmp_path / "c")]
    assert [one["prompt"] for one in plain] == ["one", "two", "three", "four"]
    assert sorted(one["prompt"] for one in mixed) == ["four", "one", "three", "two"]
    assert [one["prompt"] for one in mixed] != [one["prompt"] for one in plain]
    assert len({one["seed"] for one in plain}) == 4 and len({one["seed"] for one in equal}) == 1


def test_names_of_files(tmp_path: Path, files: dict[str, str]) -> None:
    (numbered,) = generate("--prompt", "a", "--sequential_file_name", outdir=tmp_path / "a")
    image = ("--prompt", "a", "--image_path", files["photo"])
    (named,) = generate(*image, "--use_original_file_name", outdir=tmp_path / "b")
    (stamped,) = generate(*image, outdir=tmp_path / "b")
    assert (numbered.name, named.name) == ("im_000001.png", "photo.png") and stamped.name.startswith("im_2")
    assert numbered.parent == tmp_path / "a"


def test_prompts_from_the_keyboard_and_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    shown: list[str] = []
    monkeypatch.setattr(cv2, "imshow", lambda title, pixels: shown.append(title))
    monkeypatch.setattr(cv2, "waitKey", lambda: 0)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    for folder, words in (("a", ("--no_preview",)), ("b", ())):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a fox --d 5\n"))
        (path,) = generate("--interactive", *words, "--steps", "1", outdir=tmp_path / folder)
        assert texts_of(path)["prompt"] == "a fox"
        assert shown == ([] if words else ["a fox"])


@pytest.mark.slow
def test_messages(tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--prompt", "a cat --d 5", "--steps", "1")
    generate(*common, outdir=tmp_path / "a")
    streams = capsys.readouterr()
    assert "seed 5" in streams.err and "seed 5" not in streams.out
    generate(*common, "--console_log_level", "ERROR", outdir=tmp_path / "b")
    assert "seed 5" not in capsys.readouterr().err
    generate(*common, "--console_log_simple", outdir=tmp_path / "c")
    assert "seed 5" in capsys.readouterr().out
    generate(*common, "--console_log_file", tmp_path / "log.txt", outdir=tmp_path / "d")
    assert "seed 5" in (tmp_path / "log.txt").read_text() and "seed 5" not in capsys.readouterr().err
    lora = [word.format(**files) for word in LORA]
    generate(*common, *lora, "--network_show_meta", outdir=tmp_path / "e")
    assert '"ss_network_module": "networks.lora"' in capsys.readouterr().out


LOOKED: Mapping[str, Looked] = {
    **dict.fromkeys(("images_per_prompt", "n_iter"), Looked(test_numbers_of_images)),
    **dict.fromkeys(("shuffle_prompts", "iter_same_seed"), Looked(test_order_and_seeds_of_a_list)),
    **dict.fromkeys(("outdir", "sequential_file_name", "use_original_file_name"), Looked(test_names_of_files)),
    **dict.fromkeys(("interactive", "no_preview"), Looked(test_prompts_from_the_keyboard_and_the_window)),
    **dict.fromkeys(
        ("console_log_level", "console_log_file", "console_log_simple", "network_show_meta"), Looked(test_messages)
    ),
    **dict.fromkeys(
        ("xformers", "diffusers_xformers"), Looked(test_attention_of_a_package_that_is_missing_is_never_silent)
    ),
}


def test_every_option_has_a_row() -> None:
    tables = [PICTURES, REFUSALS, GENERATION_NOT_YET, LOOKED]
    named = [name for table in tables for name in table]
    assert sorted(named) == sorted(GenerationOptions.specs())
