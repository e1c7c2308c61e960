"""SDXL U-Net layer names in LoRA files: from diffusers' block names to the original checkpoint's."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

_RESNET_PARTS = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "norm2": "out_layers_0", "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _build_prefixes() -> dict[str, str]:
    """Diffusers prefix -> original prefix, both behind `lora_unet_`."""
    names: dict[str, str] = {}
    for level in range(3):
        for item in range(2):
            _add_resnet(names, f"down_blocks_{level}_resnets_{item}", f"input_blocks_{3 * level + item + 1}_0")
            names[f"down_blocks_{level}_attentions_{item}"] = f"input_blocks_{3 * level + item + 1}_1"
        for item in range(3):
            _add_resnet(names, f"up_blocks_{level}_resnets_{item}", f"output_blocks_{3 * level + item}_0")
            names[f"up_blocks_{level}_attentions_{item}"] = f"output_blocks_{3 * level + item}_1"
        names[f"down_blocks_{level}_downsamplers_0_conv"] = f"input_blocks_{3 * (level + 1)}_0_op"
        names[f"up_blocks_{level}_upsamplers_0"] = f"output_blocks_{3 * level + 2}_2"
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


DIFFUSERS_TO_SAI = _build_prefixes()
_LENGTHS = sorted({len(name) for name in DIFFUSERS_TO_SAI}, reverse=True)


def original_layer_name(name: str) -> str | None:
    """`input_blocks_4_1_proj_in` for `down_blocks_1_attentions_0_proj_in`; None if it is not a diffusers name."""
    for length in _LENGTHS:
        head, tail = name[:length], name[length:]
        if head in DIFFUSERS_TO_SAI and (not tail or tail.startswith("_")):
            return DIFFUSERS_TO_SAI[head] + tail
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
