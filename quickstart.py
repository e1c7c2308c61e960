"""Everything in one command: install what is needed, then train and draw with a small built-in example.

    python quickstart.py            (add --cpu on a machine without a GPU)
"""

from __future__ import annotations

import argparse
import sys

from library import bootstrap


def main() -> int:
    """Prepare the environment and run the example in it; unknown words go to the example."""
    parser = argparse.ArgumentParser(description="Install what is needed, then run the built-in example.")
    parser.add_argument("--cpu", action="store_true", help="install a torch without CUDA and run on the processor")
    arguments, rest = parser.parse_known_args()
    command = ["demo/run_quickstart.py", *(["--cpu"] if arguments.cpu else []), *rest]
    return bootstrap.start("quickstart.py", ["requirements.txt"], command, cpu=arguments.cpu)


if __name__ == "__main__":
    sys.exit(main())
