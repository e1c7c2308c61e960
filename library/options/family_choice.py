"""Options that force the model family of a script which serves several."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag

UNSUPPORTED = ("sdxl",)


@dataclass(frozen=True)
class FamilyChoiceOptions:
    sdxl: bool = flag("the model is an SDXL model (default: its keys say what it is)")
    v1: bool = flag("the model is a Stable Diffusion 1.x model (default: its keys say what it is)")
