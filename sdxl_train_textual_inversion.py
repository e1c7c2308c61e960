"""Train the embedding of a new word for SDXL (Textual Inversion).

    python sdxl_train_textual_inversion.py --pretrained_model_name_or_path sdxl.safetensors \
        --dataset_config dataset.toml \
        --token_string mythings --init_word thing --num_vectors_per_token 4 --use_object_template \
        --learning_rate 1e-4 --output_dir output --output_name mythings
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.config_schema import SupportedKinds
from library.options.family_scripts import SDXL_EMBEDDING_TRAINING

SCRIPT = launch.Script(
    name="sdxl_train_textual_inversion.py",
    description="Train the embedding of a new word for SDXL (Textual Inversion).",
    options=SDXL_EMBEDDING_TRAINING,
    family="library.families.sdxl:StableDiffusionXL",
    method="library.methods.textual_inversion:TextualInversion",
    data=SupportedKinds(caption_dropout=False),
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class SdxlTextualInversionTrainer(script_api.Trainer):
    """This script for other programs: `SdxlTextualInversionTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
