"""Print the metadata of a safetensors file: how a LoRA was trained, what a checkpoint is.

    python tools/show_metadata.py --model my_lora.safetensors --decode
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import tool_launch
from library.options.declare import flag, option


@dataclass(frozen=True)
class ShowMetadataOptions:
    model: str = option("the safetensors file", required=True)
    decode: bool = flag("show values that are JSON texts as what they hold, not as one long text")


def show(options: ShowMetadataOptions) -> None:
    """Print the metadata as JSON with sorted keys. Raises FileNotFoundError or ValueError for a bad file."""
    from library.checkpoints.tensors import read_metadata

    metadata = read_metadata(options.model)
    if not metadata:
        print("No metadata found")
        return
    shown = decoded(metadata) if options.decode else metadata
    print(json.dumps(shown, sort_keys=True, indent=4))


def decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The same entries, those that hold a JSON object or list decoded; numbers and words stay texts."""
    return {key: _decoded(value) for key, value in metadata.items()}


def _decoded(text: str) -> Any:
    try:
        content = json.loads(text)
    except ValueError:
        return text
    return content if isinstance(content, dict | list) else text


TOOL = tool_launch.Tool(
    name="tools/show_metadata.py",
    description="Print the metadata of a safetensors file.",
    options=ShowMetadataOptions,
    run=show,
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this tool."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and print."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
