"""All options of all scripts, declared once and free of heavy imports; `Options` is what the other rooms read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options.cache import CacheOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.control_net import ControlNetOptions
from library.options.dataset import DatasetOptions
from library.options.declare import OptionSpec
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.embedding_training import EmbeddingTrainingOptions
from library.options.encoders import TextEncoderOptions
from library.options.errors import UserError
from library.options.family_choice import CachedFamilyOptions
from library.options.flow import FlowOptions
from library.options.flux import FluxOptions
from library.options.full import FullTrainingOptions
from library.options.hub import HubOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.model import ModelOptions
from library.options.model_spec import ModelSpecOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.record import OptionRecord
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.sd3 import Sd3Options
from library.options.tracking import LoggingOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions

__all__ = ["Options", "UserError", "make_options", "non_default", "option_specs", "read_only_namespace"]


@dataclass(frozen=True)
class Options(OptionRecord):
    """One attribute per group; a group that a script does not have holds its defaults.

    `script_defaults` are the defaults that the script changed; they matter only for `non_default`.
    """

    console: ConsoleOptions = ConsoleOptions()
    model: ModelOptions = ModelOptions()
    model_spec: ModelSpecOptions = ModelSpecOptions()
    dataset: DatasetOptions = DatasetOptions()
    cache: CacheOptions = CacheOptions()
    saving: SavingOptions = SavingOptions()
    hub: HubOptions = HubOptions()
    training: TrainingOptions = TrainingOptions()
    device: DeviceOptions = DeviceOptions()
    logging: LoggingOptions = LoggingOptions()
    noise: NoiseOptions = NoiseOptions()
    loss: LossOptions = LossOptions()
    sampling: SamplingOptions = SamplingOptions()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    network: NetworkOptions = NetworkOptions()
    validation: ValidationOptions = ValidationOptions()
    encoders: TextEncoderOptions = TextEncoderOptions()
    flow: FlowOptions = FlowOptions()
    flux: FluxOptions = FluxOptions()
    sd3: Sd3Options = Sd3Options()
    full: FullTrainingOptions = FullTrainingOptions()
    textual_inversion: EmbeddingTrainingOptions = EmbeddingTrainingOptions()
    control_net: ControlNetOptions = ControlNetOptions()
    memory: MemoryOptions = MemoryOptions()
    cached_family: CachedFamilyOptions = CachedFamilyOptions()
    config_file: ConfigFileOptions = ConfigFileOptions()
    script_defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)


def group_classes() -> dict[str, type]:
    """Attribute of `Options` -> class of that group."""
    return Options.groups()


def option_specs() -> dict[str, OptionSpec]:
    """Every option of every group of `Options` by name."""
    return Options.specs()


def make_options(**values: Any) -> Options:
    """Options from flat names and values in any form that the command line or a TOML file may have.

    `make_options(resolution="512,768", network_dim=4)`. Raises ValueError for an unknown name or a bad value.
    """
    specs = option_specs()
    unknown = sorted(set(values) - set(specs))
    if unknown:
        raise ValueError(f"no such option: {', '.join(unknown)}")
    final: dict[str, Any] = {}
    for name, value in values.items():
        spec = specs[name]
        read = None if value is None else spec.read_value(value)
        spec.check_choice(read)
        final[name] = spec.final(read)
    return Options().with_values(**final)


def non_default(options: OptionRecord) -> Mapping[str, Any]:
    """The options whose value differs from the script's default, by name."""
    defaults = {name: spec.final(spec.default) for name, spec in options.specs().items()}
    defaults |= options.script_defaults
    return MappingProxyType({
        name: value
        for name, value in options.flat().items()
        if (tuple(value) if isinstance(value, list) else value) != defaults[name]
    })  # fmt: skip


class ReadOnlyNamespace(argparse.Namespace):
    """A namespace for third-party hooks; setting or deleting an attribute raises AttributeError."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"options are read-only: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"options are read-only: {name} cannot be deleted")


def read_only_namespace(options: OptionRecord) -> argparse.Namespace:
    """The options as a flat, read-only `argparse.Namespace` for modules that are written against one."""
    return ReadOnlyNamespace(options.flat())
