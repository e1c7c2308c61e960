"""Train a whole SDXL model.

    python sdxl_train.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config dataset.toml \
        --learning_rate 4e-6 --output_dir output --output_name my_model
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.family_scripts import SDXL_FULL_TRAINING

SCRIPT = launch.Script(
    name="sdxl_train.py",
    description="Train a whole SDXL model.",
    options=SDXL_FULL_TRAINING,
    family="library.families.sdxl:StableDiffusionXL",
    method="library.methods.full:FullTraining",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


def train(args: argparse.Namespace) -> None:
    """This script for other programs, with arguments that its parser has read."""
    script_api.train(SCRIPT, args)


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
