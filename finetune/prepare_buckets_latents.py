"""Sort a folder of images into buckets and keep their latents in `<stem>.npz` files, for training with metadata.

    python finetune/prepare_buckets_latents.py images meta_clean.json meta_latents.json model.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import tool_launch
from library.options.bucket_preparation import BucketPreparationOptions


def prepare(options: BucketPreparationOptions) -> None:
    """Encode every image and write the metadata with its bucket."""
    from library import bucket_preparation

    bucket_preparation.prepare(options)


TOOL = tool_launch.Tool(
    name="finetune/prepare_buckets_latents.py",
    description="Sort a folder of images into buckets and keep their latents in `<stem>.npz` files.",
    options=BucketPreparationOptions,
    run=prepare,
    writes_file="out_json",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this tool."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and prepare."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
