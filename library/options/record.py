"""The base of all typed options of a kind of script: one attribute per group, and the options by their flat names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from library.options.declare import OptionSpec, specs_of


class OptionRecord:
    """What subclasses, frozen dataclasses, share. Every field is a group; `script_defaults` holds changed defaults."""

    script_defaults: Mapping[str, Any]

    @classmethod
    def groups(cls) -> dict[str, type]:
        """Attribute -> class of that group."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {item.name: type(item.default) for item in fields if item.name != "script_defaults"}

    @classmethod
    def specs(cls) -> dict[str, OptionSpec]:
        """Every option of every group by name."""
        return {spec.name: spec for group in cls.groups().values() for spec in specs_of(group)}

    @classmethod
    def group_of_option(cls) -> dict[str, str]:
        """Option name -> attribute that holds it."""
        return {spec.name: name for name, group in cls.groups().items() for spec in specs_of(group)}

    def flat(self) -> Mapping[str, Any]:
        """Every option by its command-line name; options that take several values are new lists."""
        values: dict[str, Any] = {}
        for name, group in self.groups().items():
            for spec in specs_of(group):
                value = getattr(getattr(self, name), spec.name)
                values[spec.name] = list(value) if spec.nargs is not None and value is not None else value
        return MappingProxyType(values)

    def with_values(self, **values: Any) -> Self:
        """A copy in which the options of these (flat) names have these final values."""
        by_group: dict[str, dict[str, Any]] = {}
        names = self.group_of_option()
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"no such option: {', '.join(unknown)}")
        for name, value in values.items():
            by_group.setdefault(names[name], {})[name] = value
        changed = {group: dataclasses.replace(getattr(self, group), **part) for group, part in by_group.items()}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]
