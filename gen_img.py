"""Draw images; the model file says which family it is (Stable Diffusion 1.x, 2.x or SDXL).

    python gen_img.py --ckpt model.safetensors --outdir outputs --prompt "a cat --n blurry --d 42" \
        --network_module networks.lora --network_weights my_lora.safetensors --fp16
"""

from __future__ import annotations

import argparse

from library import launch
from library.options.script import GEN_IMG

SCRIPT = launch.Script(
    name="gen_img.py",
    description="Draw images; the model file says which family it is (Stable Diffusion 1.x, 2.x or SDXL).",
    options=GEN_IMG,
    family="library.families.drawn:of_model",
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
