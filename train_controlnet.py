"""Old name of `train_control_net.py`: warns, then trains the same.

    python train_controlnet.py --pretrained_model_name_or_path sd15.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_control_net
"""

from __future__ import annotations

import argparse
import dataclasses
import logging

from library import launch, script_api
from train_control_net import SCRIPT as RENAMED

SCRIPT = dataclasses.replace(RENAMED, name="train_controlnet.py")


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


def train(args: argparse.Namespace) -> None:
    """This script for other programs, with arguments that its parser has read."""
    script_api.train(SCRIPT, args)


def main() -> None:
    """Read the command line and train."""
    logging.getLogger(__name__).warning("this is the old name of %s; please use that one", RENAMED.name)
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
