"""Train a network (LoRA and relatives) for Stable Diffusion 3 and 3.5.

    python sd3_train_network.py --pretrained_model_name_or_path sd3.5_medium.safetensors --dataset_config dataset.toml \
        --clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors \
        --network_module networks.lora_sd3 --network_dim 8 --output_dir output --output_name my_lora
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.family_scripts import SD3_NETWORK_TRAINING

SCRIPT = launch.Script(
    name="sd3_train_network.py",
    description="Train a network (LoRA and relatives) for Stable Diffusion 3 and 3.5.",
    options=SD3_NETWORK_TRAINING,
    family="library.families.sd3:StableDiffusion3",
    method="library.methods.network:NetworkTraining",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class Sd3NetworkTrainer(script_api.Trainer):
    """This script for other programs: `Sd3NetworkTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
