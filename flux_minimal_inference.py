"""Draw an image with a FLUX.1 model: the shortest way.

    python flux_minimal_inference.py --ckpt_path flux1-dev.safetensors --clip_l clip_l.safetensors \
        --t5xxl t5xxl.safetensors --ae ae.safetensors --prompt "a cat on a mat" --seed 1 --output_dir images \
        --lora_weights "my_lora.safetensors;0.8"
"""

from __future__ import annotations

import argparse

from library import tool_launch
from library.options.minimal_inference import FluxMinimalOptions


def draw(options: FluxMinimalOptions) -> None:
    """Load the model and draw."""
    from library.families.minimal import flux
    from library.generation.minimal import ask_lines, draw_minimal

    draw_minimal(options, flux, ask_lines)


TOOL = tool_launch.Tool(
    "flux_minimal_inference.py",
    "Draw an image with a FLUX.1 model: the shortest way.",
    FluxMinimalOptions,
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
