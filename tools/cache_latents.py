"""Encode every image of a dataset once and keep the latents in files beside the images.

    accelerate launch tools/cache_latents.py --pretrained_model_name_or_path model.safetensors \
        --dataset_config dataset.toml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import launch
from library.config_schema import SupportedKinds
from library.options.caching_tools import LATENT_CACHING

SCRIPT = launch.Script(
    name="tools/cache_latents.py",
    description="Encode every image of a dataset once and keep the latents in files beside the images.",
    options=LATENT_CACHING,
    family="library.families.chosen:of_options",
    run="library.caching_tools:cache_latents",
    data=SupportedKinds(controlnet=True),
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this tool."""
    return launch.build_parser(SCRIPT)


def main() -> None:
    """Read the command line and cache."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
