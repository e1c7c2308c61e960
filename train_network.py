"""Train a network (LoRA and relatives) for Stable Diffusion 1.x and 2.x.

    python train_network.py --pretrained_model_name_or_path sd15.safetensors --dataset_config dataset.toml \
        --network_module networks.lora --network_dim 8 --output_dir output --output_name my_lora
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.script import NETWORK_TRAINING

SCRIPT = launch.Script(
    name="train_network.py",
    description="Train a network (LoRA and relatives) for Stable Diffusion 1.x and 2.x.",
    options=NETWORK_TRAINING,
    family="library.families.sd:StableDiffusion",
    method="library.methods.network:NetworkTraining",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class NetworkTrainer(script_api.Trainer):
    """This script for other programs: `NetworkTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
