"""Encode every caption of a dataset once and keep the text-encoder outputs in files beside the images.

    accelerate launch tools/cache_text_encoder_outputs.py --sdxl --pretrained_model_name_or_path model.safetensors \
        --dataset_config dataset.toml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import launch
from library.config_schema import SupportedKinds
from library.options.caching_tools import TEXT_CACHING

SCRIPT = launch.Script(
    name="tools/cache_text_encoder_outputs.py",
    description="Encode every caption of a dataset once and keep the text-encoder outputs in files beside the images.",
    options=TEXT_CACHING,
    family="library.families.chosen:of_options",
    run="library.caching_tools:cache_text_encoder_outputs",
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
