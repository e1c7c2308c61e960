"""Draw an image with a Stable Diffusion 3 or 3.5 model: the shortest way.

    python sd3_minimal_inference.py --ckpt_path sd3.5_medium.safetensors --clip_l clip_l.safetensors \
        --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors --prompt "a cat on a mat" --seed 1 --bf16
"""

from __future__ import annotations

import argparse

from library import tool_launch
from library.options.minimal_inference import Sd3MinimalOptions


def draw(options: Sd3MinimalOptions) -> None:
    """Load the model and draw."""
    from library.families.minimal import sd3
    from library.generation.minimal import ask_lines, draw_minimal

    draw_minimal(options, sd3, ask_lines)


TOOL = tool_launch.Tool(
    "sd3_minimal_inference.py", "Draw an image with a Stable Diffusion 3 or 3.5 model: the shortest way.",
    Sd3MinimalOptions, draw, writes_folder="output_dir",
)  # fmt: skip


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script, for programs that read or wrap its options."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and draw."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
