"""Python imports this first in programs that a watched test starts: note their lines, or give them the mutated module.

Standard library only, and quiet unless `mutation_map.py` or `mutations.py` set its variable.
"""

import os
import sys
from pathlib import Path

if {"MUTATION_MAP_DATA", "MUTATION"} & set(os.environ):
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    try:
        if "MUTATION" in os.environ:
            import mutants

            mutants.install(mutants.Mutant.from_json(os.environ["MUTATION"]))
        else:
            import atexit

            import mutation_map

            watch = mutation_map.start_coverage(os.environ["MUTATION_MAP_DATA"], os.environ["MUTATION_MAP_TEST"])
            atexit.register(watch.save)
            atexit.register(watch.stop)
    finally:
        sys.path.pop()
