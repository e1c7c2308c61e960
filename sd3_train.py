"""Train a whole Stable Diffusion 3 or 3.5 model.

    python sd3_train.py --pretrained_model_name_or_path sd3.5_medium.safetensors --dataset_config dataset.toml \
        --clip_l clip_l.safetensors --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors \
        --learning_rate 5e-6 --output_dir output --output_name my_model
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.family_scripts import SD3_FULL_TRAINING

SCRIPT = launch.Script(
    name="sd3_train.py",
    description="Train a whole Stable Diffusion 3 or 3.5 model.",
    options=SD3_FULL_TRAINING,
    family="library.families.sd3:StableDiffusion3",
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
