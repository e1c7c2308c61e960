"""What a row of the scripts' options says: groups, exclusions, changed defaults, and checks of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options import Options
from library.options.declare import OptionSpec, specs_of
from library.options.not_yet import NOT_YET, NotYet
from library.options.record import OptionRecord

Check = Callable[[Any], Iterable[str]]  # options -> one sentence for each thing to say


@dataclass(frozen=True)
class ScriptOptions:
    """The options of one script. `changes` maps an option name to the fields of its OptionSpec that differ here.

    `record` is the class that holds their values, `check` the dotted path of `(options, script options) -> Checked`.
    `problems` and `warnings` are what only this script looks at, besides what all scripts with these options check.
    """

    groups: tuple[type, ...]
    exclude: frozenset[str] = frozenset()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    record: type[OptionRecord] = Options
    check: str = "library.options.checks:check_options"
    not_yet: Mapping[str, NotYet] = field(default_factory=lambda: NOT_YET)
    problems: tuple[Check, ...] = ()
    warnings: tuple[Check, ...] = ()

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
