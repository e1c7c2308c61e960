"""All options of all scripts, declared once and free of heavy imports; `Options` is what the other rooms read."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options.cache import CacheOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.declare import OptionSpec, specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.errors import UserError
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

__all__ = ["Options", "UserError", "make_options", "non_default", "option_specs", "read_only_namespace"]


@dataclass(frozen=True)
class Options:
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
    config_file: ConfigFileOptions = ConfigFileOptions()
    script_defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)

    def flat(self) -> Mapping[str, Any]:
        """Every option by its command-line name; options that take several values are new lists."""
        values: dict[str, Any] = {}
        for name, group in group_classes().items():
            for spec in specs_of(group):
                value = getattr(getattr(self, name), spec.name)
                values[spec.name] = list(value) if spec.nargs is not None and value is not None else value
        return MappingProxyType(values)

    def with_values(self, **values: Any) -> Options:
        """A copy in which the options of these (flat) names have these final values."""
        by_group: dict[str, dict[str, Any]] = {}
        names = group_of_option()
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"no such option: {', '.join(unknown)}")
        for name, value in values.items():
            by_group.setdefault(names[name], {})[name] = value
        changed = {group: dataclasses.replace(getattr(self, group), **part) for group, part in by_group.items()}
        return dataclasses.replace(self, **changed)


def group_classes() -> dict[str, type]:
    """Attribute of `Options` -> class of that group."""
    groups = (item for item in dataclasses.fields(Options) if item.name != "script_defaults")
    return {item.name: type(item.default) for item in groups}


def group_of_option() -> dict[str, str]:
    """Option name -> attribute of `Options` that holds it."""
    return {spec.name: name for name, group in group_classes().items() for spec in specs_of(group)}


def option_specs() -> dict[str, OptionSpec]:
    """Every option of every group by name."""
    return {spec.name: spec for group in group_classes().values() for spec in specs_of(group)}


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


def non_default(options: Options) -> Mapping[str, Any]:
    """The options whose value differs from the script's default, by name."""
    defaults = {name: spec.final(spec.default) for name, spec in option_specs().items()} | dict(options.script_defaults)
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


def read_only_namespace(options: Options) -> argparse.Namespace:
    """The options as a flat, read-only `argparse.Namespace` for modules that are written against one."""
    return ReadOnlyNamespace(options.flat())
