"""Options for Stable Diffusion 3 and 3.5 models."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class Sd3Options:
    pos_emb_random_crop_rate: float = option(
        "3.5 medium: chance that positions are cut from a random place of the position table instead of its middle",
        0.0,
        type="float",
    )
    enable_scaled_pos_embed: bool = flag("3.5 medium: stretch the position table to each training resolution")
