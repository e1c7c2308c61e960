"""Every option of every small script that draws has an effect, is refused, or says that it has none."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library import tool_launch
from library.families.minimal import dtype_of, wide_dtype
from library.options.declare import specs_of
from networks import lora_flux, lora_sd3
from tests import flux_tiny, sd3_tiny, sdxl_tiny
from tests.generation import difference, pixels_of, texts_of
from tests.lora_files import randomize
from tests.training import TOKENIZERS, clean_process

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Words = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """`words` set the option on top of `base`: the pictures differ by `least` to `most` levels of 255."""

    words: Words
    base: Words = ()
    least: int = 1
    most: int = 255
    said: str = ""  # in the log


@dataclass(frozen=True)
class Refused:
    """Status 2 and these words."""

    words: Words
    said: str


def changes(*words: str, base: Words = ()) -> Row:
    return Row(words, base)


def same(*words: str, base: Words = (), most: int = 1, said: str = "") -> Row:
    return Row(words, base, least=0, most=most, said=said)


LORA = ("--lora_weights", "{lora}")
NEGATIVE = ("--negative_prompt", "blurry", "--cfg_scale", "3")
NO_GPU = "there is no GPU: computing in float32"
SHARED: Mapping[str, Row | Refused | None] = {
    "ckpt_path": changes("--ckpt_path", "{ckpt_path}"),
    "prompt": changes("--prompt", "a dog"),
    "output_dir": None,  # where all of these pictures are looked for
    "lora_weights": changes(*LORA),
    "interactive": None,  # a test of its own
    "tokenizer_cache_dir": Refused(("--tokenizer_cache_dir", "{empty}"), "tokenizer"),
    "negative_prompt": changes("--negative_prompt", "dark", base=NEGATIVE),
    "width": changes("--width", "80"),
    "height": changes("--height", "80"),
    "steps": changes("--steps", "3"),
    "seed": changes("--seed", "6"),
    "cfg_scale": changes("--cfg_scale", "2", base=NEGATIVE),
}
TRANSFORMERS: Mapping[str, Row] = {
    "clip_l": changes("--clip_l", "{clip_l}"),
    "t5xxl": changes("--t5xxl", "{t5xxl}"),
    "apply_t5_attn_mask": changes("--apply_t5_attn_mask"),
    "offload": same("--offload", most=0),
    "merge_lora_weights": same("--merge_lora_weights", base=LORA),
}
TABLES: Mapping[str, Mapping[str, Row | Refused | None]] = {
    "sdxl_minimal_inference": {
        **SHARED, "prompt2": changes("--prompt2", "a dog"), "dtype": same("--dtype", "bfloat16", most=0, said=NO_GPU),
    },
    "flux_minimal_inference": {
        **SHARED, **TRANSFORMERS,
        "model_type": Refused(("--model_type", "chroma"), "only flux"),
        "ae": changes("--ae", "{ae}"),
        "guidance": changes("--guidance", "1.5"),
        **{
            name: same(f"--{name}", "fp16", most=0, said=NO_GPU) for name in ("dtype", "flux_dtype", "ae_dtype")
        },
        **{name: Row((f"--{name}", "bf16"), least=0, most=40) for name in ("clip_l_dtype", "t5xxl_dtype")},
    },
    "sd3_minimal_inference": {
        **SHARED, **TRANSFORMERS,
        "clip_g": changes("--clip_g", "{clip_g}"),
        "t5xxl_token_length": changes("--t5xxl_token_length", "64"),
        "apply_lg_attn_mask": changes("--apply_lg_attn_mask"),
        **{name: same(f"--{name}", most=0, said=NO_GPU) for name in ("fp16", "bf16")},
    },
}  # fmt: skip
CASES = [(script, name) for script, table in TABLES.items() for name, row in table.items() if row is not None]

#: what every run of a script has
COMMON: Mapping[str, Mapping[str, object]] = {
    "sdxl_minimal_inference": {"ckpt_path": sdxl_tiny.MODEL, "dtype": "float32", "cfg_scale": 7},
    "flux_minimal_inference": {"ckpt_path": flux_tiny.TRANSFORMER, **flux_tiny.FILES},
    "sd3_minimal_inference": {
        ("ckpt_path" if name == "pretrained_model_name_or_path" else name): path
        for name, path in sd3_tiny.FILES.items()
    },
}
SMALL = {
    "prompt": "a cat girl", "width": 64, "height": 64, "steps": 2, "seed": 5, "tokenizer_cache_dir": TOKENIZERS,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Script -> what its rows name in braces: altered model files and a network."""
    found: dict[str, dict[str, str]] = {}
    for script, common in COMMON.items():
        folder = tmp_path_factory.mktemp(script)
        (folder / "empty").mkdir()
        for name in ("ckpt_path", "clip_l", "clip_g", "t5xxl", "ae"):
            if name in common:
                tensors = load_file(str(common[name]))
                save_file({key: value * 1.2 for key, value in tensors.items()}, folder / f"{name}.safetensors")
        write_network(script, folder / "lora.safetensors")
        found[script] = {path.stem: str(path) for path in folder.iterdir()}
    return found


def write_network(script: str, path: Path) -> None:
    if script == "sdxl_minimal_inference":
        sdxl_tiny.write_sdxl_lora(path, sdxl_tiny.sdxl_family())
        return
    is_flux = script == "flux_minimal_inference"
    family, module = (flux_tiny.flux_family(), lora_flux) if is_flux else (sd3_tiny.tiny_family(), lora_sd3)
    network = module.create_network(1.0, 2, 2.0, None, family.text_encoders, family.denoiser)
    randomize(network, 1)
    network.save_weights(path, torch.float32, {})


_drawn: dict[tuple[str, Words], tuple[Path, ...]] = {}


@pytest.fixture
def draw(files: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ...]]:
    """(script, words) -> the pictures, oldest first; the same words are drawn once."""

    def once(script: str, words: Words = ()) -> tuple[Path, ...]:
        if (script, words) not in _drawn:
            filled = [word.format(**files[script]) for word in words]
            for name, value in {**SMALL, **COMMON[script]}.items():
                if f"--{name}" not in filled and name not in ("fp16", "bf16"):
                    filled += [f"--{name}", str(value)]
            folder = tmp_path_factory.mktemp("o")
            with clean_process():
                tool_launch.main(importlib.import_module(script).TOOL, [*filled, "--output_dir", str(folder)])
            _drawn[script, words] = tuple(sorted(folder.glob("*.png")))
        return _drawn[script, words]

    return once


@pytest.mark.parametrize(("script", "name"), CASES)
def test_an_option_has_its_effect(
    script: str, name: str, draw: Callable[..., tuple[Path, ...]], caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = TABLES[script][name]
    if isinstance(row, Refused):
        with pytest.raises(SystemExit) as stop:
            draw(script, row.words)
        assert stop.value.code == 2 and row.said in capsys.readouterr().err
        return
    assert row is not None
    kept = row.base if not {*row.base} & {row.words[0]} else _without(row.base, row.words[0])
    (plain,) = draw(script, row.base)
    with caplog.at_level("INFO"):
        (other,) = draw(script, (*kept, *row.words))
    if name in ("width", "height"):
        assert pixels_of(plain).shape != pixels_of(other).shape
        return
    assert row.least <= difference(plain, other) <= row.most
    assert row.said in caplog.text


def _without(words: Words, option: str) -> Words:
    place = words.index(option)
    return words[:place] + words[place + 2 :]


@pytest.mark.parametrize("script", TABLES)
def test_prompts_from_the_keyboard(
    script: str, draw: Callable[..., tuple[Path, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = "a dog\n\n\n5\n\n" if script.startswith("sdxl") else "a dog --d 5\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    (drawn,) = draw(script, ("--interactive",))
    assert texts_of(drawn)["prompt"] == "a dog"


@pytest.mark.parametrize("script", TABLES)
def test_every_option_has_a_row(script: str) -> None:
    options = importlib.import_module(script).TOOL.options
    assert sorted(TABLES[script]) == sorted(spec.name for spec in specs_of(options))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float32, ("fp32", "float32", "float")),
        (torch.float16, ("fp16", "float16", "FP16")),
        (torch.bfloat16, ("bf16", "bfloat16", "BF16")),
        (torch.float8_e4m3fn, ("fp8", "fp8_e4m3fn", "float8_e4m3fn")),
    ],
    ids=str,
)
def test_number_formats_have_all_their_usual_names(dtype: torch.dtype, words: tuple[str, ...]) -> None:
    for word in words:
        assert dtype_of(word, "--dtype") == dtype
        if dtype is torch.float8_e4m3fn:
            with pytest.raises(ValueError, match=f"--ae_dtype {word}: 8-bit weights are not supported here; use bf16"):
                wide_dtype(word, "--ae_dtype")
        else:
            assert wide_dtype(word, "--ae_dtype") == dtype
    with pytest.raises(ValueError, match="--dtype fp64: allowed are fp32, "):
        dtype_of("fp64", "--dtype")


# --- what files record, and what has no effect ----------------------------------------------------------------
def test_files_record_what_really_drew_them(draw: Callable[..., tuple[Path, ...]]) -> None:
    flux = texts_of(draw("flux_minimal_inference", ("--guidance", "1.5"))[0])
    assert flux == {
        "prompt": "a cat girl", "negative-prompt": "", "seed": "5", "sampler": "euler", "steps": "2", "scale": "1.0",
        "guidance": "1.5", "size": "64x64", "model": "flux_tiny.safetensors",
    }  # fmt: skip
    sd3 = texts_of(draw("sd3_minimal_inference", ("--negative_prompt", "blurry"))[0])
    assert sd3 == {
        "prompt": "a cat girl", "negative-prompt": "blurry", "seed": "5", "sampler": "euler", "steps": "2",
        "scale": "5.0", "size": "64x64", "model": "sd3_tiny.safetensors",
    }  # fmt: skip
    sdxl = texts_of(draw("sdxl_minimal_inference", ("--prompt2", "a dog"))[0])
    assert (sdxl["sampler"], sdxl["second-prompt"], sdxl["original-width"]) == ("euler", "a dog", "64")
    assert "guidance" not in sdxl


def test_a_negative_prompt_without_guidance_says_that_it_has_no_effect(
    draw: Callable[..., tuple[Path, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    (drawn,) = draw("flux_minimal_inference", ("--negative_prompt", "dark"))
    assert "--negative_prompt has no effect with a --cfg_scale of 1 or less" in caplog.text
    assert texts_of(drawn)["negative-prompt"] == ""


def test_a_guidance_value_for_schnell_says_that_it_has_no_effect(
    draw: Callable[..., tuple[Path, ...]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    schnell = str(flux_tiny.without_guidance(tmp_path))
    (drawn,) = draw("flux_minimal_inference", ("--ckpt_path", schnell, "--guidance", "2"))
    assert "--guidance 2.0 has no effect" in caplog.text and "guidance" not in texts_of(drawn)
