"""Draw an image with an SDXL model: the shortest way.

    python sdxl_minimal_inference.py --ckpt_path sdxl.safetensors --prompt "a cat on a mat" --seed 1 \
        --lora_weights "my_lora.safetensors;0.8" --output_dir images
"""

from __future__ import annotations

import argparse

from library import tool_launch
from library.options.minimal_inference import SdxlMinimalOptions


def draw(options: SdxlMinimalOptions) -> None:
    """Load the model and draw."""
    from library.families.minimal import sdxl
    from library.generation.minimal import ask_questions, draw_minimal

    draw_minimal(options, sdxl, ask_questions)


TOOL = tool_launch.Tool(
    "sdxl_minimal_inference.py",
    "Draw an image with an SDXL model: the shortest way.",
    SdxlMinimalOptions,
    draw,
    writes_folder="output_dir",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and draw."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
