"""Which options a script has: groups, exclusions and changed defaults; one row per script or kind of script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options import Options
from library.options.cache import CacheOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.declare import OptionSpec, specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.family_choice import FamilyChoiceOptions
from library.options.generation import GENERATION_GROUPS, GenerationOptions
from library.options.hub import HubOptions
from library.options.loss import LossOptions
from library.options.model import ModelOptions
from library.options.model_spec import ModelSpecOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.not_yet import GENERATION_NOT_YET, NOT_YET, NotYet
from library.options.optimizer import OptimizerOptions
from library.options.record import OptionRecord
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.tracking import LoggingOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions


@dataclass(frozen=True)
class ScriptOptions:
    """The options of one script. `changes` maps an option name to the fields of its OptionSpec that differ here.

    `record` is the class that holds their values, `check` the dotted path of `(options, script options) -> Checked`.
    """

    groups: tuple[type, ...]
    exclude: frozenset[str] = frozenset()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    record: type[OptionRecord] = Options
    check: str = "library.options.checks:check_options"
    not_yet: Mapping[str, NotYet] = field(default_factory=lambda: NOT_YET)

    def specs(self) -> dict[str, OptionSpec]:
        """Option name -> declaration as this script has it, in the order of the groups."""
        return {
            spec.name: dataclasses.replace(spec, **self.changes.get(spec.name, {}))
            for group in self.groups
            for spec in specs_of(group)
            if spec.name not in self.exclude
        }

    def defaults(self) -> Mapping[str, Any]:
        """The defaults that this script changes, as final values."""
        specs = self.specs()
        changed = {name: specs[name] for name, change in self.changes.items() if "default" in change}
        return MappingProxyType({name: spec.final(spec.default) for name, spec in changed.items()})

    def group_names(self) -> frozenset[str]:
        """The attributes of the record that this script fills."""
        return frozenset(name for name, group in self.record.groups().items() if group in self.groups)


TEXT_CACHE = frozenset({"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"})

TRAINING_GROUPS: tuple[type, ...] = (
    ModelOptions, DatasetOptions, CacheOptions, SavingOptions, TrainingOptions, OptimizerOptions, LossOptions,
    NoiseOptions, SamplingOptions, DeviceOptions, LoggingOptions, ModelSpecOptions, HubOptions, DeepSpeedOptions,
    ConsoleOptions, ConfigFileOptions,
)  # fmt: skip

NETWORK_TRAINING = ScriptOptions(
    groups=(NetworkOptions, *TRAINING_GROUPS, ValidationOptions),
    exclude=TEXT_CACHE | {"disable_mmap_load_safetensors"},
)

GEN_IMG = ScriptOptions(
    groups=GENERATION_GROUPS,
    exclude=frozenset({
        "XTI_embeddings", "control_net_weights", "clip_guidance_scale", "clip_image_guidance_scale",
        "vgg16_guidance_scale", "vgg16_guidance_layer",
    }),
    record=GenerationOptions,
    check="library.options.generation_checks:check_options",
    not_yet=GENERATION_NOT_YET,
)  # fmt: skip

GEN_IMG_DIFFUSERS = dataclasses.replace(
    GEN_IMG,
    exclude=frozenset({
        *(spec.name for spec in specs_of(FamilyChoiceOptions)),
        "original_width", "original_height", "original_width_negative", "original_height_negative", "crop_top",
        "crop_left", "pyramid_noise_prob", "pyramid_noise_discount_range", "noise_offset_prob", "noise_offset_range",
        "clip_vision_strength", "control_net_lllite_models", "control_net_multipliers",
    }),
)  # fmt: skip
