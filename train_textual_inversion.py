"""Train the embedding of a new word for Stable Diffusion 1.x and 2.x (Textual Inversion).

    python train_textual_inversion.py --pretrained_model_name_or_path sd15.safetensors --dataset_config dataset.toml \
        --token_string mythings --init_word thing --num_vectors_per_token 4 --use_object_template \
        --learning_rate 1e-4 --output_dir output --output_name mythings
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.script import EMBEDDING_TRAINING

SCRIPT = launch.Script(
    name="train_textual_inversion.py",
    description="Train the embedding of a new word for Stable Diffusion 1.x and 2.x (Textual Inversion).",
    options=EMBEDDING_TRAINING,
    family="library.families.sd:StableDiffusion",
    method="library.methods.textual_inversion:TextualInversion",
    data=SupportedKinds(caption_dropout=False),
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class TextualInversionTrainer(script_api.Trainer):
    """This script for other programs: `TextualInversionTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
