"""The network modules of this project and the kinds of models that each is for; imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

#: module -> names of the lineages (`library.checkpoints.lineages`) whose models it adapts
OWN_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "networks.lora": ("sd", "sdxl"),
    "networks.lora_flux": ("flux",),
    "networks.lora_sd3": ("sd3",),
})  # fmt: skip


def modules_for(lineage: str) -> list[str]:
    """The modules of this project for a kind of model."""
    return [module for module, lineages in OWN_MODULES.items() if lineage in lineages]


def modules_with_argument(name: str) -> list[str]:
    """The modules of this project that know a network argument; imports them."""
    return [module for module in OWN_MODULES if name in importlib.import_module(module).known_arguments()]
