"""U-Net layer names in LoRA files: those of diffusers (ours for SD 1 and 2) and the original ones (ours for SDXL)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from networks.places import Place

logger = logging.getLogger(__name__)

_RESNET_PARTS = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "norm2": "out_layers_0", "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _build_prefixes(levels: int, *, attends_at_the_bottom: bool) -> dict[str, str]:
    """Diffusers prefix -> original prefix, both behind `lora_unet_`."""
    names: dict[str, str] = {}
    for level in range(levels):
        for item in range(2):
            _add_resnet(names, f"down_blocks_{level}_resnets_{item}", f"input_blocks_{3 * level + item + 1}_0")
            names[f"down_blocks_{level}_attentions_{item}"] = f"input_blocks_{3 * level + item + 1}_1"
        for item in range(3):
            _add_resnet(names, f"up_blocks_{level}_resnets_{item}", f"output_blocks_{3 * level + item}_0")
            names[f"up_blocks_{level}_attentions_{item}"] = f"output_blocks_{3 * level + item}_1"
        names[f"down_blocks_{level}_downsamplers_0_conv"] = f"input_blocks_{3 * (level + 1)}_0_op"
        place = 2 if level or attends_at_the_bottom else 1
        names[f"up_blocks_{level}_upsamplers_0"] = f"output_blocks_{3 * level + 2}_{place}"
    for item in range(2):
        _add_resnet(names, f"mid_block_resnets_{item}", f"middle_block_{2 * item}")
    names["mid_block_attentions_0"] = "middle_block_1"
    for first, second in ((1, 0), (2, 2)):
        names[f"time_embedding_linear_{first}"] = f"time_embed_{second}"
        names[f"add_embedding_linear_{first}"] = f"label_emb_0_{second}"
    names |= {"conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2"}
    return names


def _add_resnet(names: dict[str, str], diffusers: str, original: str) -> None:
    for part, original_part in _RESNET_PARTS.items():
        names[f"{diffusers}_{part}"] = f"{original}_{original_part}"


DIFFUSERS_TO_SAI = _build_prefixes(3, attends_at_the_bottom=True)
#: without the attention that would share its name with the first upsampler: SD has none there
SAI_TO_DIFFUSERS = {
    original: name
    for name, original in _build_prefixes(4, attends_at_the_bottom=False).items()
    if not name.startswith(("up_blocks_0_attentions", "add_embedding"))
}


def original_layer_name(name: str) -> str | None:
    """`input_blocks_4_1_proj_in` for `down_blocks_1_attentions_0_proj_in`; None if it is not a diffusers name."""
    return _renamed(name, DIFFUSERS_TO_SAI)


def place_in_original(layer: str) -> Place | None:
    """Where a layer of an SDXL file belongs, if the file has diffusers' names; None otherwise."""
    name = _renamed(layer, DIFFUSERS_TO_SAI)
    return Place(name) if name else None


def place_in_diffusers(layer: str) -> Place | None:
    """Where a layer of an SD 1 or 2 file belongs, if the file has the checkpoint's names; None otherwise."""
    name = _renamed(layer, SAI_TO_DIFFUSERS)
    return Place(name) if name else None


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The name with its longest beginning that the table has replaced."""
    for end in (index for index in range(len(name), 0, -1) if index == len(name) or name[index] == "_"):
        if name[:end] in table:
            return table[name[:end]] + name[end:]
    return None


def convert_diffusers_to_sai_if_needed(weights_sd: dict[str, Any]) -> None:
    """Rename diffusers-style U-Net keys of an SDXL LoRA in place; a file in original naming stays as it is."""
    prefix = "lora_unet_"
    if not any("down_blocks" in key or "up_blocks" in key for key in weights_sd):
        return
    unknown = []
    for key in list(weights_sd):
        module, dot, parameter = key.partition(".")
        if not module.startswith(prefix):
            continue
        renamed = original_layer_name(module.removeprefix(prefix))
        if renamed is not None:
            weights_sd[f"{prefix}{renamed}{dot}{parameter}"] = weights_sd.pop(key)
        elif not module.removeprefix(prefix).startswith(("input_blocks_", "middle_block_", "output_blocks_")):
            unknown.append(module)
    if unknown:
        names = sorted(set(unknown))
        logger.warning("%d modules have no SDXL name and keep theirs: %s", len(names), ", ".join(names[:10]))
