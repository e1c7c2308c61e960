"""Options for FLUX.1 models."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class FluxOptions:
    ae: str | None = option("autoencoder file")
    model_type: str = option("kind of the model; only flux can be trained", "flux", choices=("flux", "chroma"))
    split_mode: bool = flag("old form of --blocks_to_swap 18")
