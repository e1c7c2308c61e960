"""Train a whole Stable Diffusion 1.x or 2.x model on folders of images (DreamBooth).

    python train_db.py --pretrained_model_name_or_path sd15.safetensors --dataset_config dataset.toml \
        --learning_rate 2e-6 --output_dir output --output_name my_model
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.script import DREAMBOOTH_TRAINING

SCRIPT = launch.Script(
    name="train_db.py",
    description="Train a whole Stable Diffusion 1.x or 2.x model on folders of images (DreamBooth).",
    options=DREAMBOOTH_TRAINING,
    family="library.families.sd:StableDiffusion",
    method="library.methods.full:DreamBoothTraining",
    data=SupportedKinds(fine_tuning=False),
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
