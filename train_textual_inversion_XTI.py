"""Train an embedding per layer of a new word for Stable Diffusion 1.x and 2.x (XTI).

    python train_textual_inversion_XTI.py --pretrained_model_name_or_path sd15.safetensors \
        --dataset_config dataset.toml \
        --token_string mythings --init_word thing --use_object_template \
        --learning_rate 1e-4 --output_dir output --output_name mythings
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.script import LAYERED_EMBEDDING_TRAINING

SCRIPT = launch.Script(
    name="train_textual_inversion_XTI.py",
    description="Train an embedding per layer of a new word for Stable Diffusion 1.x and 2.x (XTI).",
    options=LAYERED_EMBEDDING_TRAINING,
    family="library.families.sd:StableDiffusion",
    method="library.methods.extended_textual_inversion:ExtendedTextualInversion",
    data=SupportedKinds(caption_dropout=False),
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
