"""Which options a script has: groups, exclusions and changed defaults; one row per script or kind of script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options import group_classes
from library.options.cache import CacheOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.declare import OptionSpec, specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.hub import HubOptions
from library.options.loss import LossOptions
from library.options.model import ModelOptions
from library.options.model_spec import ModelSpecOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.tracking import LoggingOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions


@dataclass(frozen=True)
class ScriptOptions:
    """The options of one script. `changes` maps an option name to the fields of its OptionSpec that differ here."""

    groups: tuple[type, ...]
    exclude: frozenset[str] = frozenset()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))

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
        """The attributes of `Options` that this script fills."""
        return frozenset(name for name, group in group_classes().items() if group in self.groups)


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
