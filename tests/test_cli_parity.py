"""Every script has the recorded options: names, types, defaults, choices, numbers of values."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"
#: script -> module with its `setup_parser`
SCRIPTS = {
    "train_network.py": "train_network",
    "gen_img.py": "gen_img",
    "gen_img_diffusers.py": "gen_img_diffusers",
    "networks/merge_lora.py": "networks.merge_lora",
    "tools/show_metadata.py": "tools.show_metadata",
    "tools/convert_diffusers20_original_sd.py": "tools.convert_diffusers20_original_sd",
}
#: options that a script has beyond the recorded ones
ADDED = {
    # what one of the scripts that draw can do, all can
    "gen_img_diffusers.py": {
        "zero_terminal_snr", "from_module", "prompter_module_args", "no_half_vae", "emb_normalize_mode",
        "force_scheduler_zero_steps_offset",
    },
    "tools/show_metadata.py": {"decode"},
}  # fmt: skip
#: script-independent differences that are wanted: option -> field -> our value
DELIBERATE = {
    # `box` is valid in dataset files, so it is valid here too
    "resize_interpolation": {"choices": [*"lanczos nearest bilinear linear bicubic cubic area box".split()]},
}


def recorded(script: str) -> dict[str, dict[str, Any]]:
    """The reference's options of a script by destination."""
    content = json.loads(gzip.decompress((DATA / "cli.json.gz").read_bytes()))
    return {option["dest"]: option for option in content["scripts"][script]["options"]}


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
