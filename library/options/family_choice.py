"""Options that force the model family of a script which serves several."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag


@dataclass(frozen=True)
class CachedFamilyOptions:
    sdxl: bool = flag("the model is an SDXL model (default: Stable Diffusion 1.x or, with --v2, 2.x)")
    flux: bool = flag("the model is a FLUX.1 model")
    sd3: bool = flag("the model is a Stable Diffusion 3 or 3.5 model")
    skip_existing: bool = flag("old option; files that fit are never made again")


@dataclass(frozen=True)
class FamilyChoiceOptions:
    sdxl: bool = flag("the model is an SDXL model (default: its keys say what it is)")
    v1: bool = flag("the model is a Stable Diffusion 1.x model (default: its keys say what it is)")
