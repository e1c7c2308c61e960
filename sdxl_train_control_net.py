"""Train a ControlNet for SDXL.

    python sdxl_train_control_net.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config dataset.toml \
        --learning_rate 1e-5 --output_dir output --output_name my_control_net
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.family_scripts import SDXL_CONTROL_NET_TRAINING

SCRIPT = launch.Script(
    name="sdxl_train_control_net.py",
    description="Train a ControlNet for SDXL.",
    options=SDXL_CONTROL_NET_TRAINING,
    family="library.families.sdxl:StableDiffusionXL",
    method="library.methods.control_net:ControlNetTraining",
    data=SupportedKinds(dreambooth=False, fine_tuning=False, controlnet=True),
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
