"""Old name of `sdxl_train_control_net_lllite.py`: warns, then trains the same.

    python sdxl_train_control_net_lllite_old.py --pretrained_model_name_or_path sdxl.safetensors \
        --dataset_config dataset.toml --output_dir output --output_name my_lllite
"""

from __future__ import annotations

import argparse
import dataclasses
import logging

from library import launch, script_api
from sdxl_train_control_net_lllite import SCRIPT as RENAMED

SCRIPT = dataclasses.replace(RENAMED, name="sdxl_train_control_net_lllite_old.py")


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
