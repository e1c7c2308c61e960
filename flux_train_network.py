"""Train a network (LoRA and relatives) for FLUX.1.

    python flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors --dataset_config dataset.toml \
        --clip_l clip_l.safetensors --t5xxl t5xxl.safetensors --ae ae.safetensors --model_prediction_type raw \
        --network_module networks.lora_flux --network_dim 8 --output_dir output --output_name my_lora
"""

from __future__ import annotations

import argparse

from library import launch, script_api
from library.options.family_scripts import FLUX_NETWORK_TRAINING

SCRIPT = launch.Script(
    name="flux_train_network.py",
    description="Train a network (LoRA and relatives) for FLUX.1.",
    options=FLUX_NETWORK_TRAINING,
    family="library.families.flux:Flux",
    method="library.methods.network:NetworkTraining",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


class FluxNetworkTrainer(script_api.Trainer):
    """This script for other programs: `FluxNetworkTrainer().train(args)`."""

    script = SCRIPT


def main() -> None:
    """Read the command line and train."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
