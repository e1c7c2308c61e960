"""Every script has the recorded options: names, types, defaults, choices, numbers of values."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library import launch
from library.config_schema import SupportedKinds
from library.families.base import ModelFamily
from library.methods.base import TrainingMethod
from library.options import Options, non_default

DATA = Path(__file__).parent / "data"
NETWORK, DREAMBOOTH, METADATA = SupportedKinds(), SupportedKinds(fine_tuning=False), SupportedKinds(dreambooth=False)
NEW_WORD = SupportedKinds(caption_dropout=False)
CONDITIONED = SupportedKinds(dreambooth=False, fine_tuning=False, controlnet=True)
#: script that trains -> the data that it accepts
TRAINING = {
    "train_network": NETWORK,
    "sdxl_train_network": NETWORK,
    "flux_train_network": NETWORK,
    "sd3_train_network": NETWORK,
    "train_db": DREAMBOOTH,
    "fine_tune": METADATA,
    "sdxl_train": NETWORK,
    "flux_train": NETWORK,
    "sd3_train": NETWORK,
    "train_textual_inversion": NEW_WORD,
    "sdxl_train_textual_inversion": NEW_WORD,
    "train_textual_inversion_XTI": NEW_WORD,
    "train_control_net": CONDITIONED,
    "train_controlnet": CONDITIONED,
    "sdxl_train_control_net": CONDITIONED,
    "flux_train_control_net": CONDITIONED,
    "sdxl_train_control_net_lllite": CONDITIONED,
    "sdxl_train_control_net_lllite_old": CONDITIONED,
}
#: script -> module with its `setup_parser`
SCRIPTS = {
    **{f"{name}.py": name for name in TRAINING},
    "gen_img.py": "gen_img",
    "gen_img_diffusers.py": "gen_img_diffusers",
    "sdxl_gen_img.py": "sdxl_gen_img",
    "sdxl_minimal_inference.py": "sdxl_minimal_inference",
    "flux_minimal_inference.py": "flux_minimal_inference",
    "networks/merge_lora.py": "networks.merge_lora",
    "tools/show_metadata.py": "tools.show_metadata",
    "tools/cache_latents.py": "tools.cache_latents",
    "tools/cache_text_encoder_outputs.py": "tools.cache_text_encoder_outputs",
    "finetune/prepare_buckets_latents.py": "finetune.prepare_buckets_latents",
    "tools/convert_diffusers20_original_sd.py": "tools.convert_diffusers20_original_sd",
}
#: options that a script has beyond the recorded ones
ADDED = {
    # what one of the scripts that draw can do, all can
    "gen_img_diffusers.py": {
        "zero_terminal_snr", "from_module", "prompter_module_args", "no_half_vae", "emb_normalize_mode",
        "force_scheduler_zero_steps_offset",
    },
    "sdxl_gen_img.py": {
        "v_parameterization", "zero_terminal_snr", "from_module", "prompter_module_args", "emb_normalize_mode",
        "force_scheduler_zero_steps_offset", "shuffle_prompts",
    },
    # what the reference has fixed, and where tokenizers are without a network
    "sdxl_minimal_inference.py": {"width", "height", "steps", "seed", "cfg_scale", "dtype", "tokenizer_cache_dir"},
    "flux_minimal_inference.py": {"tokenizer_cache_dir"},
    "tools/show_metadata.py": {"decode"},
    # the family that the reference's tools lack
    "tools/cache_latents.py": {"sd3", "clip_g", "apply_lg_attn_mask"},
    "tools/cache_text_encoder_outputs.py": {"sd3", "clip_g", "apply_lg_attn_mask"},
    # scripts that take regularisation images
    "sdxl_train.py": {"prior_loss_weight"},
    "flux_train.py": {"prior_loss_weight"},
    "sd3_train.py": {"prior_loss_weight"},
    # its name in older command lines
    "sdxl_train_control_net.py": {"controlnet_model_path"},
}  # fmt: skip
#: script-independent differences that are wanted: option -> field -> our value
DELIBERATE = {
    # a switch everywhere; one old tool took a text there that it could not use
    "alpha_mask": {"type": None, "default": False, "nargs": 0},
    # an empty list that nobody can change
    "lora_weights": {"default": ()},
    # `box` is valid in dataset files, so it is valid here too
    "resize_interpolation": {"choices": [*"lanczos nearest bilinear linear bicubic cubic area box".split()]},
}


#: argparse action -> converter when the record has none
TEXT = {"store": "str"}


@functools.cache
def record() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress((DATA / "cli.json.gz").read_bytes()))
    return content


def recorded(script: str) -> dict[str, dict[str, Any]]:
    """The reference's options of a script by destination."""
    options = record()["scripts"][script]["options"]
    return {option["dest"]: option | {"type": option["type"] or TEXT.get(option["action"])} for option in options}


def described(action: argparse.Action) -> dict[str, Any]:
    """An option of a parser in the words of the record."""
    return {
        "flags": list(action.option_strings),
        "type": None if action.nargs == 0 else action.type.__name__,
        "default": action.default,
        "choices": None if action.choices is None else list(action.choices),
        "nargs": action.nargs,
        "required": action.required,
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_parser_has_the_recorded_options(name: str) -> None:
    parser = importlib.import_module(SCRIPTS[name]).setup_parser()
    ours = {action.dest: described(action) for action in parser._actions if action.dest != "help"}
    theirs = recorded(name)
    assert set(ours) - ADDED.get(name, set()) == set(theirs)
    for dest, found in ours.items():
        if dest in theirs:
            assert found == {key: theirs[dest][key] for key in found} | DELIBERATE.get(dest, {}), dest


def script_of(name: str) -> launch.Script:
    return importlib.import_module(name).SCRIPT


def test_table_has_every_script_that_trains() -> None:
    root = Path(__file__).resolve().parent.parent
    assert {path.stem for path in root.glob("*train*.py")} | {"fine_tune"} == set(TRAINING)


@pytest.mark.parametrize("name", TRAINING)
def test_script_accepts_its_kinds_of_data(name: str) -> None:
    assert script_of(name).name == f"{name}.py"
    assert script_of(name).data == TRAINING[name]


@pytest.mark.parametrize("name", TRAINING)
def test_family_and_method_exist(name: str) -> None:
    script = script_of(name)
    family, method = launch.resolve(script.family), launch.resolve(str(script.method))
    assert issubclass(family, ModelFamily) and issubclass(method, TrainingMethod)
    made = family(Options())
    assert set(made.without_effect) | set(method.without_effect) <= set(Options().flat())


@pytest.mark.parametrize("name", TRAINING)
def test_nothing_given_is_nothing_changed(name: str) -> None:
    command_line = launch.read_command_line(script_of(name), [])
    assert non_default(command_line.options) == {} and command_line.problems == ()


def test_parsers_print_help_and_import_nothing_heavy() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {list(TRAINING)!r}:\n"
        "    assert name + '.py [options]' in importlib.import_module(name).setup_parser().format_help()\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("train_controlnet", "train_control_net"),
        ("sdxl_train_control_net_lllite_old", "sdxl_train_control_net_lllite"),
    ],
)
def test_old_names_warn_and_are_the_same_script(
    old: str, current: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{old}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(old).main()
    assert stop.value.code == 0
    assert f"old name of {current}.py" in caplog.text
    assert dataclasses.replace(script_of(old), name=f"{current}.py") == script_of(current)
