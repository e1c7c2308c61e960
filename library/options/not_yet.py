"""The options that are declared but do not work yet; using one ends the script with status 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from library.options import non_default
from library.options.declare import specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.generation_features import (
    ControlOptions,
    DeepShrinkOptions,
    GradualLatentOptions,
    HighresOptions,
    LossGuidanceOptions,
)
from library.options.hub import HubOptions
from library.options.record import OptionRecord
from library.options.validation import ValidationOptions


@dataclass(frozen=True)
class NotYet:
    """Why an option does not work yet; `values` limits that to some values (default: all but the default value)."""

    reason: str
    values: tuple[Any, ...] | None = None


NOT_YET: Mapping[str, NotYet] = MappingProxyType(
    {
        **{spec.name: NotYet("DeepSpeed is not supported yet") for spec in specs_of(DeepSpeedOptions)},
        **{spec.name: NotYet("the Hugging Face hub is not supported yet") for spec in specs_of(HubOptions)},
        **{spec.name: NotYet("validation is not supported yet") for spec in specs_of(ValidationOptions)},
        "fp8_base": NotYet("8-bit base weights are not supported yet"),
        "fp8_base_unet": NotYet("8-bit base weights are not supported yet"),
        "torch_compile": NotYet("compiling the model is not supported yet"),
        "dynamo_backend": NotYet("compiling the model is not supported yet"),
        "cpu_offload_checkpointing": NotYet("moving activations to main memory is not supported yet"),
        "log_with": NotYet("Weights & Biases is not supported yet; use tensorboard", values=("wandb", "all")),
        "wandb_run_name": NotYet("Weights & Biases is not supported yet"),
        "wandb_api_key": NotYet("Weights & Biases is not supported yet"),
        **{
            name: NotYet("swapping blocks with main memory is not supported yet")
            for name in ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "split_mode")
        },
        "mem_eff_save": NotYet("writing the model tensor by tensor is not supported yet"),
    }
)


GENERATION_NOT_YET: Mapping[str, NotYet] = MappingProxyType(
    {
        **{
            spec.name: NotYet(reason)
            for group, reason in (
                (ControlOptions, "ControlNet is not supported yet"),
                (HighresOptions, "drawing in two passes is not supported yet"),
                (DeepShrinkOptions, "Deep Shrink is not supported yet"),
                (GradualLatentOptions, "Gradual Latent is not supported yet"),
                (LossGuidanceOptions, "guidance by CLIP or VGG16 is not supported yet"),
            )
            for spec in specs_of(group)
        },
        "clip_vision_strength": NotYet("drawing with the content of an image is not supported yet"),
        "guide_image_path": NotYet("ControlNet is not supported yet"),
        "pyramid_noise_prob": NotYet("pyramid noise is not supported yet"),
        "pyramid_noise_discount_range": NotYet("pyramid noise is not supported yet"),
        "noise_offset_prob": NotYet("a noise offset is not supported yet"),
        "noise_offset_range": NotYet("a noise offset is not supported yet"),
        "network_regional_mask_max_color_codes": NotYet("networks for regions are not supported yet"),
    }
)  # fmt: skip


def unsupported(options: OptionRecord, table: Mapping[str, NotYet] = NOT_YET) -> list[str]:
    """One sentence for each option of `table` whose value differs from the script's default."""
    return [
        f"--{name}: {table[name].reason}."
        for name, value in non_default(options).items()
        if name in table and ((only := table[name].values) is None or value in only)
    ]
