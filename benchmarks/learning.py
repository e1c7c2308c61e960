"""Learning, measured: entry scripts train on the demo's tiny models, and pictures are judged before and after.

    python benchmarks/learning.py                       # the names of all cases
    python benchmarks/learning.py control_net           # run one; it prints what it measured and what was wanted
    python benchmarks/learning.py control_net --record  # and writes it into benchmarks/learning.json

A case gets an empty folder, runs a script as a user would, and returns measures. Extra words after `--` are added to
the script's command line: `python benchmarks/learning.py control_net -- --max_train_steps 50` tries something out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "benchmarks")]

#: name -> "module:function" in this folder
CASES = {
    "colour": "learning_colour:colour",
    "control_net": "learning_hints:control_net",
    "dreambooth": "learning_star:dreambooth",
    "full_flux": "learning_star:full_flux",
    "full_sd3": "learning_star:full_sd3",
    "full_sdxl": "learning_star:full_sdxl",
    "lllite": "learning_hints:lllite",
    "lora_flux": "learning_star:lora_flux",
    "lora_sd3": "learning_star:lora_sd3",
    "lora_sdxl": "learning_star:lora_sdxl",
    "ti": "learning_words:ti",
    "ti_sdxl": "learning_words:ti_sdxl",
    "xti": "learning_words:xti",
}
RESULTS = ROOT / "benchmarks" / "learning.json"


@dataclass(frozen=True)
class Measure:
    """One number and what it should be: at least `at_least`, at most `at_most` (None: no limit)."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the value is within its limits."""
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def __str__(self) -> str:
        wanted = [f"at least {self.at_least}"] * (self.at_least is not None)
        wanted += [f"at most {self.at_most}"] * (self.at_most is not None)
        limits = f" (wanted: {', '.join(wanted)})" if wanted else ""
        return f"{self.name}: {self.value:.3f}{limits} {'ok' if self.is_met else 'NOT MET'}"


Case = Callable[[Path, Sequence[str]], list[Measure]]


def run_script(script: str, *arguments: str | Path) -> None:
    """Run an entry script of this project in this process with these words as its command line."""
    from library import launch

    launch.main(importlib.import_module(script).SCRIPT, [str(word) for word in arguments])


def find_case(name: str) -> Case:
    """The function of a case."""
    module, _, function = CASES[name].partition(":")
    return getattr(importlib.import_module(module), function)


def record(name: str, measures: Sequence[Measure], seconds: float, processor_seconds: float) -> None:
    """Put the result of one case into the results file."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results[name] = {
        "seconds": round(seconds), "processor_seconds": round(processor_seconds),
        "measures": [asdict(measure) for measure in measures],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words before `--`, words after it)."""
    position = list(words).index("--") if "--" in words else len(words)
    return list(words[:position]), list(words[position + 1 :])


def main() -> int:
    """Command line: run one case."""
    parser = argparse.ArgumentParser(description="train on the demo's tiny models and measure what was learned")
    parser.add_argument("case", nargs="?", choices=sorted(CASES), help="what to run (default: list the cases)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "learning", help="folder for its files")
    parser.add_argument("--record", action="store_true", help=f"write the result into {RESULTS.name}")
    own, words = split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(own)
    if arguments.case is None:
        print("\n".join(sorted(CASES)))
        return 0
    folder = arguments.output / arguments.case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin, processor_begin = time.monotonic(), time.process_time()
    measures = find_case(arguments.case)(folder, words)
    seconds, processor_seconds = time.monotonic() - begin, time.process_time() - processor_begin
    print(f"\n{arguments.case}: {seconds:.0f} s, {processor_seconds:.0f} s of processor time")
    for measure in measures:
        print(f"  {measure}")
    if arguments.record:
        record(arguments.case, measures, seconds, processor_seconds)
    return 0 if all(measure.is_met for measure in measures) else 1


if __name__ == "__main__":
    # cases import this module by its name
    sys.modules["learning"] = sys.modules["__main__"]
    sys.exit(main())
