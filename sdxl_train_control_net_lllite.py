"""Train a ControlNet-LLLite for SDXL.

    python sdxl_train_control_net_lllite.py --pretrained_model_name_or_path sdxl.safetensors \
        --dataset_config dataset.toml \
        --cond_emb_dim 32 --network_dim 64 --learning_rate 2e-4 --output_dir output --output_name my_lllite
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.family_scripts import SDXL_LLLITE_TRAINING

SCRIPT = launch.Script(
    name="sdxl_train_control_net_lllite.py",
    description="Train a ControlNet-LLLite for SDXL.",
    options=SDXL_LLLITE_TRAINING,
    family="library.families.sdxl:StableDiffusionXL",
    method="library.methods.lllite:LLLiteTraining",
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
