"""Train a network (LoRA and relatives) for SDXL.

    python sdxl_train_network.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config dataset.toml \
        --network_module networks.lora --network_dim 8 --output_dir output --output_name my_lora
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.family_scripts import SDXL_NETWORK_TRAINING

SCRIPT = launch.Script(
    name="sdxl_train_network.py",
    description="Train a network (LoRA and relatives) for SDXL.",
    options=SDXL_NETWORK_TRAINING,
    family="library.families.sdxl:StableDiffusionXL",
    method="library.methods.network:NetworkTraining",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class SdxlNetworkTrainer(script_api.Trainer):
    """This script for other programs: `SdxlNetworkTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
