"""The options that are declared but do not work yet; switching one on ends the script with status 2."""

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
    """Why an option does not work yet.

    `values` limits that to some values (default: all that switch something on). `part_of` are the options that
    switch the feature on: without one of them the option asks for nothing, and with one only that one is named,
    if it does not work yet either.
    """

    reason: str
    values: tuple[Any, ...] | None = None
    part_of: tuple[str, ...] = ()


def _rows(group: type, reason: str, *switches: str) -> dict[str, NotYet]:
    """A row for every option of a group; all but the switches are parts of them."""
    return {spec.name: NotYet(reason, part_of=() if spec.name in switches else switches) for spec in specs_of(group)}


_NO_SWAP = "swapping blocks with main memory is not supported yet"
_NO_COMPILER = "compiling the model is not supported yet"
_NO_WANDB = "Weights & Biases is not supported yet"
_NO_HUB = "the Hugging Face hub is not supported yet"
_NO_CONTROL = "ControlNet is not supported yet"

NOT_YET: Mapping[str, NotYet] = MappingProxyType({
    **_rows(DeepSpeedOptions, "DeepSpeed is not supported yet", "deepspeed"),
    **_rows(HubOptions, _NO_HUB, "huggingface_repo_id"),
    "resume_from_huggingface": NotYet(_NO_HUB, part_of=("resume",)),
    **_rows(ValidationOptions, "validation is not supported yet", "validation_split"),
    "fp8_base": NotYet("8-bit base weights are not supported yet"),
    "fp8_base_unet": NotYet("8-bit base weights are not supported yet"),
    "torch_compile": NotYet(_NO_COMPILER),
    "dynamo_backend": NotYet(_NO_COMPILER, part_of=("torch_compile",)),
    "cpu_offload_checkpointing": NotYet("moving activations to main memory is not supported yet"),
    "log_with": NotYet(f"{_NO_WANDB}; use tensorboard", values=("wandb", "all")),
    "wandb_run_name": NotYet(_NO_WANDB, part_of=("log_with",)),
    "wandb_api_key": NotYet(_NO_WANDB, part_of=("log_with",)),
    **{
        name: NotYet(_NO_SWAP)
        for name in ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "split_mode")
    },
    "mem_eff_save": NotYet("writing the model tensor by tensor is not supported yet"),
})  # fmt: skip


GENERATION_NOT_YET: Mapping[str, NotYet] = MappingProxyType({
    **_rows(ControlOptions, _NO_CONTROL, "control_net_models", "control_net_lllite_models"),
    "guide_image_path": NotYet(_NO_CONTROL, part_of=("control_net_models", "control_net_lllite_models")),
    **_rows(HighresOptions, "drawing in two passes is not supported yet", "highres_fix_scale"),
    **_rows(DeepShrinkOptions, "Deep Shrink is not supported yet", "ds_depth_1"),
    **_rows(GradualLatentOptions, "Gradual Latent is not supported yet", "gradual_latent_timesteps"),
    **_rows(
        LossGuidanceOptions, "guidance by CLIP or VGG16 is not supported yet",
        "clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale",
    ),
    "clip_vision_strength": NotYet("drawing with the content of an image is not supported yet"),
    "pyramid_noise_prob": NotYet("pyramid noise is not supported yet"),
    "pyramid_noise_discount_range": NotYet("pyramid noise is not supported yet", part_of=("pyramid_noise_prob",)),
    "noise_offset_prob": NotYet("a noise offset is not supported yet"),
    "noise_offset_range": NotYet("a noise offset is not supported yet", part_of=("noise_offset_prob",)),
    "network_regional_mask_max_color_codes": NotYet("networks for regions are not supported yet"),
})  # fmt: skip

#: values that switch nothing on, besides the script's default; a block number of Deep Shrink may be 0
_OFF: tuple[Any, ...] = (None, False, 0, "", [], ())
_MAY_BE_ZERO = frozenset({"ds_depth_1", "gradual_latent_timesteps"})


def unsupported(options: OptionRecord, table: Mapping[str, NotYet] = NOT_YET) -> list[str]:
    """One sentence for each option of `table` that switches on what does not work yet."""
    switched_on = {
        name for name, value in non_default(options).items()
        if value not in _OFF or (name in _MAY_BE_ZERO and value is not None)
    }  # fmt: skip
    return [
        f"--{name}: {row.reason}."
        for name, value in non_default(options).items()
        if name in switched_on
        and (row := table.get(name)) is not None
        and (row.values is None or value in row.values)
        and (not row.part_of or any(switch in switched_on and switch not in table for switch in row.part_of))
    ]
