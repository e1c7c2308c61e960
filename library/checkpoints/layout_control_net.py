"""Key names of U-Net ControlNets: original files with or without a prefix, and diffusers' names, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoints import layout_unet
from library.checkpoints.folders import hub_folder, part_file, read_config
from library.checkpoints.recognition import check_not_quantised
from library.checkpoints.tensors import LazyTensors, RenamedTensors, Shapes, open_tensors, shapes_of

OPTION = "--controlnet_model_name_or_path"
ORIGINAL_PREFIX = "control_model."
HINT_PREFIX = "controlnet_cond_embedding."
_HINT_LAYERS = 8  # convolutions of the hint network: one in, six between, one out
_OWN = (HINT_PREFIX, "controlnet_down_blocks.", "controlnet_mid_block.")  # keys that the U-Net does not have
_HINT = re.compile(r"^input_hint_block\.(\d+)\.(.+)$")
_ZERO = re.compile(r"^zero_convs\.(\d+)\.0\.(.+)$")
_MIDDLE = "middle_block_out.0."


def open_control_net(path: str) -> tuple[LazyTensors, dict[str, Any]]:
    """(tensors under their own names, config.json) of a file, a diffusers folder or a hub name; files have no config.

    Raises FileNotFoundError or ValueError that names the option.
    """
    if Path(path).is_file():
        tensors, config = open_tensors(path), {}
    else:
        folder = Path(path) if Path(path).is_dir() else hub_folder(path, option=OPTION)
        tensors, config = open_tensors(part_file(folder, "controlnet")), read_config(folder)
    check_not_quantised(tensors.shapes, source=f"{OPTION} {path}")
    return tensors, config


# --- names -----------------------------------------------------------------------------------------------------
def hint_layer(position: int) -> str:
    """The diffusers name of the hint network's convolution number 0 to 7 (`input_hint_block.<2 * number>`)."""
    if position == 0:
        return "conv_in"
    return "conv_out" if position == _HINT_LAYERS - 1 else f"blocks.{position - 1}"


_HINT_POSITIONS = {hint_layer(position): position for position in range(_HINT_LAYERS)}


def to_diffusers(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """A ControlNet of any naming under the names of diffusers' `ControlNetModel`.

    Known are original names, with or without `control_model.`, and diffusers' names.
    Raises ValueError if the file is none.
    """
    shapes = shapes_of(tensors)
    source = getattr(tensors, "source", "the given tensors")
    if f"{HINT_PREFIX}conv_in.weight" in shapes:
        return RenamedTensors(tensors, {key: (key, None) for key in shapes})
    prefix = ORIGINAL_PREFIX if f"{ORIGINAL_PREFIX}input_hint_block.0.weight" in shapes else ""
    inner = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    if "input_hint_block.0.weight" not in inner:
        found = ", ".join(list(shapes)[:5]) or "nothing"
        raise ValueError(
            f"{OPTION} {source} is no ControlNet of this kind: it has neither input_hint_block nor {HINT_PREFIX[:-1]} "
            f"(keys: {found})."
        )
    names = {key: _own_to_diffusers(key) or name for key, name in layout_unet.names_to_diffusers(inner).items()}
    return RenamedTensors(tensors, {new: (inner[old], None) for old, new in names.items()})


def _own_to_diffusers(key: str) -> str | None:
    """The new name of a key that the U-Net does not have; None for all others."""
    if (match := _HINT.match(key)) and int(match[1]) % 2 == 0 and int(match[1]) < 2 * _HINT_LAYERS:
        return f"{HINT_PREFIX}{hint_layer(int(match[1]) // 2)}.{match[2]}"
    if match := _ZERO.match(key):
        return f"controlnet_down_blocks.{match[1]}.{match[2]}"
    if key.startswith(_MIDDLE):
        return f"controlnet_mid_block.{key.removeprefix(_MIDDLE)}"
    return None


def to_original(tensors: Mapping[str, Tensor], *, linear_projection: bool) -> RenamedTensors:
    """A ControlNet in diffusers' naming under original names without a prefix.

    `linear_projection`: whether `proj_in`/`proj_out` are written as [c,c] (SD2, SDXL) or [c,c,1,1] (SD1).
    """
    encoder = layout_unet.to_original(tensors, linear_projection=linear_projection)
    return RenamedTensors(encoder, {_own_to_original(key) or key: (key, None) for key in encoder})


def _own_to_original(key: str) -> str | None:
    if not key.startswith(_OWN):
        return None
    path, _, leaf = key.rpartition(".")
    if key.startswith(HINT_PREFIX):
        position = _HINT_POSITIONS.get(path.removeprefix(HINT_PREFIX))
        return None if position is None else f"input_hint_block.{2 * position}.{leaf}"
    if path == "controlnet_mid_block":
        return _MIDDLE + leaf
    return f"zero_convs.{path.removeprefix('controlnet_down_blocks.')}.0.{leaf}"


# --- sizes -----------------------------------------------------------------------------------------------------
def hint_channels(shapes: Shapes) -> tuple[int, ...]:
    """Widths of the hint network's four resolutions (diffusers' naming). Raises ValueError if one is missing."""
    keys = [f"{HINT_PREFIX}conv_in.weight", *(f"{HINT_PREFIX}blocks.{index}.weight" for index in (1, 3, 5))]
    missing = [key for key in keys if key not in shapes]
    if missing:
        raise ValueError(f"{OPTION}: the ControlNet's hint network lacks {', '.join(missing)}.")
    return tuple(shapes[key][0] for key in keys)
