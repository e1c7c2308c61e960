"""Draw images with an SDXL model.

    python sdxl_gen_img.py --ckpt model.safetensors --outdir outputs --prompt "a cat --n blurry --d 42 --ow 2048" \
        --network_module networks.lora --network_weights my_lora.safetensors --fp16
"""

from __future__ import annotations

import argparse

from library import launch
from library.options.family_scripts import SDXL_GEN_IMG

SCRIPT = launch.Script(
    name="sdxl_gen_img.py",
    description="Draw images with an SDXL model.",
    options=SDXL_GEN_IMG,
    family="library.families.drawn:stable_diffusion_xl",
    run="library.generation.run:generate",
    data=None,
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return launch.build_parser(SCRIPT)


def main() -> None:
    """Read the command line and draw."""
    launch.main(SCRIPT)


if __name__ == "__main__":
    main()
