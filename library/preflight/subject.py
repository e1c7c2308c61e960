"""What is checked before a run: the options of one script, and the family and method that the script names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from library.checkpoints.lineages import Lineage, lineage_of_family
from library.checkpoints.recognition import ModelKind
from library.options.script_options import ScriptOptions


@dataclass(frozen=True)
class Subject:
    """`options` is the script's record; family, method and run are dotted paths, as the script has them."""

    options: Any
    rows: ScriptOptions
    script: str  # file name
    family: str
    method: str | None = None
    run: str = ""

    @cached_property
    def option_names(self) -> frozenset[str]:
        """The options that the script has."""
        return frozenset(self.rows.specs())

    @property
    def lineage(self) -> Lineage | None:
        """The kind of model that the script is for, if it is one of those that are known by their files."""
        return lineage_of_family(self.family)

    @property
    def kinds(self) -> frozenset[ModelKind]:
        """What the model's file may be with these options; empty if nobody knows."""
        if self.lineage is None:
            return frozenset()
        return self.lineage.kinds_for(v2=self.options.model.v2 if "v2" in self.option_names else None)


def existing(name: str | None) -> Path | None:
    """The file or folder that an option names; None for a missing one and for names on the hub."""
    path = Path(name) if name else None
    return path if path is not None and path.exists() else None


def resolve(dotted_path: str) -> Any:
    """`package.module:name` -> the object of that name; this is where heavy packages come in."""
    module, _, name = dotted_path.partition(":")
    return getattr(importlib.import_module(module), name)
