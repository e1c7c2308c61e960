"""Names of the FLUX.1 scripts that other programs import."""

from __future__ import annotations

import argparse

from library import script_api
from library.options.family_scripts import FLUX_GROUPS, FLUX_LACKS
from library.options.memory import MemoryOptions


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of FLUX.1's model, text encoders and timesteps; what the parser has already stays."""
    script_api.add_arguments(parser, tuple(group for group in FLUX_GROUPS if group is not MemoryOptions), FLUX_LACKS)
