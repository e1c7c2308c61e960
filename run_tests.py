"""Install what the tests need and run them.

    python run_tests.py             everything
    python run_tests.py --quick     without the slow ones; further words go to pytest

As many tests run at a time as there are processor cores, four at most; `-n 0` runs them one after the other.
"""

from __future__ import annotations

import argparse
import os
import sys

from library import bootstrap

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
#: by files, because the tests of a file share what they train; words of the user come later and win
PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]


def main() -> int:
    """Prepare the environment and run pytest in it; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description="Install what the tests need and run them with pytest.")
    parser.add_argument("--quick", action="store_true", help="leave out tests that are marked slow")
    parser.add_argument("--cpu", action="store_true", help="install a torch without CUDA")
    arguments, rest = parser.parse_known_args()
    command = ["-m", "pytest", *PARALLEL, *(["-m", "not slow"] if arguments.quick else []), *rest]
    environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    requirements = ["requirements.txt", "requirements-test.txt"]
    return bootstrap.start("run_tests.py", requirements, command, cpu=arguments.cpu, environment=environment)


if __name__ == "__main__":
    sys.exit(main())
