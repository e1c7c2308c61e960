"""Names of the Stable Diffusion 3 scripts that other programs import."""

from __future__ import annotations

import argparse

from library import script_api
from library.options.family_scripts import SD3_GROUPS, SD3_LACKS
from library.options.memory import MemoryOptions


def add_sd3_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of SD3's model, text encoders and timesteps; what the parser has already stays."""
    script_api.add_arguments(parser, tuple(group for group in SD3_GROUPS if group is not MemoryOptions), SD3_LACKS)
