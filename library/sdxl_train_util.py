"""Names of the SDXL scripts that other programs import."""

from __future__ import annotations

import argparse

from library import script_api
from library.options.cache import CacheOptions
from library.options.model import ModelOptions
from library.options.script import all_but

_CACHED_TEXT = frozenset({"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"})


def add_sdxl_training_arguments(parser: argparse.ArgumentParser, support_text_encoder_caching: bool = True) -> None:
    """Add what the SDXL scripts have beyond those of Stable Diffusion; what the parser has already stays."""
    wanted = {"disable_mmap_load_safetensors"} | (_CACHED_TEXT if support_text_encoder_caching else set())
    groups = (CacheOptions, ModelOptions)
    exclude = frozenset().union(*(all_but(group) for group in groups)) - wanted
    script_api.add_arguments(parser, groups, exclude)
