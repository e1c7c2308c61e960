"""Makes small mistakes in the code, one at a time, and says which of them no test notices.

    python benchmarks/mutation_map.py --to mutation_map.json      # once: which test runs which line
    python benchmarks/mutations.py --map mutation_map.json --count 150 --seed 1 --to mutations.jsonl

For every mistake (`mutants.py`) the tests that run its line are started, quickest first and until one fails: at most
`--tests` of them, from as many test files as there are, and as many as `--seconds` of test time hold. A mistake is
noticed when a test fails, cannot start or does not end. Slow tests are chosen only where no other runs the line.

No file of the project is changed: a process that has imported torch and its like forks for every mistake, and the fork
compiles the changed module itself; programs that a test starts do the same (`mutation_hook/sitecustomize.py`).

`--to` gets one line of JSON per mistake; what stands there already is not done again. `--only FILE` does the survivors
of such a file again, `--at library/losses.py:40` every mistake of one line. In the end all tests that noticed something
run once without a mistake: one that fails then has noticed nothing, and its lines are taken back.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOK = Path(__file__).resolve().parent / "mutation_hook"
sys.path.insert(0, str(HOOK.parent))

from mutants import Mutant, install, mutants_of, option_defaults  # noqa: E402
from mutation_map import TestMap  # noqa: E402

DEFAULT_FILES = (
    "library/train_util.py", "library/training_loop.py", "library/training_state.py", "library/saving.py",
    "library/objectives.py", "library/noise.py", "library/losses.py", "library/methods/*.py", "library/families/*.py",
    "library/checkpoints/unpickle.py", "library/checkpoints/tensors.py", "library/data/cache.py",
    "library/data/augmentation.py", "library/data/buckets.py", "library/data/captions.py", "library/data/loader.py",
    "library/data/dataset.py", "library/data/text_cache.py", "library/caching.py", "library/generation/hooks.py",
    "library/generation/engine.py", "library/generation/samplers.py", "library/generation/guidance.py",
    "library/progress.py", "library/optimizers.py", "library/lr_schedulers.py", "library/options/checks.py",
    "networks/*.py",
)  # fmt: skip
#: what is imported before the first fork: everything heavy that is not ours
PRELOADED = (
    "numpy", "PIL.Image", "torch", "torch.utils.data", "torch.utils.tensorboard", "torch._dynamo", "safetensors.torch",
    "accelerate", "diffusers", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers", "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
    "transformers.models.t5.modeling_t5", "transformers.optimization", "cv2", "bitsandbytes", "lycoris", "hypothesis",
)  # fmt: skip
GRACE = 60.0  # seconds beyond five times what the tests need, before a mutant counts as hanging
SURVIVED, NOT_RUN = "SURVIVED", "NO TEST"


@dataclass(frozen=True)
class Limits:
    """How many tests a mutant gets, and how many seconds of tests."""

    tests: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What became of a mutant: `outcome` is the test that noticed it, or SURVIVED, or NO TEST."""

    mutant: Mutant
    outcome: str
    how: str = ""
    seconds: float = 0.0
    tests: int = 0

    @property
    def is_noticed(self) -> bool:
        return self.outcome not in (SURVIVED, NOT_RUN)

    def __str__(self) -> str:
        end = f"noticed by {self.outcome} ({self.how})" if self.is_noticed else self.outcome
        return f"{self.mutant}  |  {end}  [{self.seconds:.1f} s, {self.tests} tests]"


# --- results in a file -----------------------------------------------------------------------------------------
def read_results(path: Path) -> list[Result]:
    """The results in a file; of several for one mutant the last."""
    found: dict[Any, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values = json.loads(line)
        mutant = Mutant.from_json(json.dumps(values.pop("mutant")))
        found[key_of(mutant)] = Result(mutant, **values)
    return list(found.values())


def append_result(path: Path, result: Result) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def key_of(mutant: Mutant) -> tuple[str, str, str, str, int]:
    """What tells mutants apart, also when the file has grown a line."""
    return mutant.file, mutant.kind, mutant.before, mutant.after, mutant.number


# --- choosing --------------------------------------------------------------------------------------------------
def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as many of every kind as there are; the same ones for the same seed."""
    rng = random.Random(seed)
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        kinds[mutant.kind].append(mutant)
    for of_kind in kinds.values():
        rng.shuffle(of_kind)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(kinds.values()):
        for of_kind in kinds.values():
            if of_kind and len(chosen) < count:
                chosen.append(of_kind.pop())
    return chosen


def tests_for(mutant: Mutant, found: TestMap, limits: Limits, distrusted: set[str]) -> list[str]:
    """The tests to run, in the order to run them."""
    if mutant.is_import:
        names = found.of_lines(mutant.file, 1, 10**9)
    else:
        names = found.of_lines(mutant.file, mutant.first, mutant.last) or found.of_lines(mutant.file, *mutant.scope)
    names = [name for name in names if name not in distrusted]
    names = [name for name in names if not found.tests[name].is_slow] or names
    chosen, seconds = [], 0.0
    for name in _by_turns(names):
        seconds += found.tests[name].seconds
        if len(chosen) == limits.tests or chosen and seconds > limits.seconds:
            break
        chosen.append(name)
    files = Counter[str]()
    for name in chosen:
        files[_file_of(name)] = max(files[_file_of(name)], int(1000 * found.tests[name].seconds))
    return sorted(chosen, key=lambda name: (files[_file_of(name)], _file_of(name), found.tests[name].seconds))


def _file_of(test: str) -> str:
    return test.split("::")[0]


def _by_turns(names: Sequence[str]) -> Iterator[str]:
    """The quickest test of every file, then the second of every file, and so on."""
    files: dict[str, list[str]] = defaultdict(list)
    for name in names:
        files[_file_of(name)].append(name)
    for turn in range(max(map(len, files.values()), default=0)):
        yield from (of_file[turn] for of_file in files.values() if turn < len(of_file))


# --- running ---------------------------------------------------------------------------------------------------
class FirstFailure:
    """The pytest plugin of a fork: keeps the given order of tests, and the first one that fails."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = {name: number for number, name in enumerate(order)}
        self.name = self.how = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name, self.how = report.nodeid, _last_line(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name, self.how = report.nodeid, f"import: {_last_line(report)}"


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip()
    lines = text.splitlines() if crash else text.splitlines()[-1:]
    return lines[0][:120] if lines else report.outcome


def run_in_fork(mutant: Mutant | None, tests: Sequence[str], scratch: Path, *, stops: bool) -> int:
    """Start a process that runs the tests and leaves what failed in `scratch`; returns its number."""
    number = os.fork()
    if number:
        return number
    os.setsid()
    with contextlib.suppress(BaseException):
        os.environ |= {"TMPDIR": str(scratch), "PYTHONPATH": _python_path(), "PYTHONDONTWRITEBYTECODE": "1"}
        tempfile.tempdir, sys.dont_write_bytecode = None, True
        log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.path.remove(str(HOOK.parent))
        if mutant is not None:
            os.environ["MUTATION"] = mutant.to_json()
            install(mutant)
        failures = Failures(tests)
        words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *(["-x"] if stops else []), *tests]
        status = int(pytest.main(words, plugins=[failures]))
        found = {"status": status, "name": failures.name, "how": failures.how, "all": sorted(failures.all)}
        (scratch / "result.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


class Failures(FirstFailure):
    """The same, with the names of all that fail."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__(order)
        self.all: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        super().pytest_runtest_logreport(report)
        if report.failed:
            self.all.add(report.nodeid)


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH"))))


@dataclass(frozen=True)
class Job:
    """A mutant whose tests are running."""

    mutant: Mutant
    tests: Sequence[str]
    scratch: Path
    started: float
    limit: float

    def result(self, ended: bool) -> Result:
        """What its process left; one that was ended for its time counts as noticed."""
        seconds = time.monotonic() - self.started
        file = self.scratch / "result.json"
        if ended or not file.exists():
            how = f"no end after {seconds:.0f} s" if ended else "the process died"
            return Result(self.mutant, "the time limit" if ended else "a crash", how, seconds, len(self.tests))
        found = json.loads(file.read_text(encoding="utf-8"))
        outcome = SURVIVED if found["status"] == 0 else found["name"] or f"pytest's status {found['status']}"
        return Result(self.mutant, outcome, found["how"], seconds, len(self.tests))


def run_all(
    mutants: Iterable[Mutant], found: TestMap, limits: Limits, distrusted: set[str], jobs: int
) -> Iterator[Result]:
    """Results as they come; at most `jobs` processes at a time."""
    waiting, running = iter(mutants), dict[int, Job]()
    is_done = False
    while running or not is_done:
        while len(running) < jobs and not is_done:
            mutant = next(waiting, None)
            is_done = mutant is None
            if mutant is None:
                break
            if not (tests := tests_for(mutant, found, limits, distrusted)):
                yield Result(mutant, NOT_RUN)
                continue
            scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
            limit = GRACE + 5 * sum(found.tests[name].seconds for name in tests)
            job = Job(mutant, tests, scratch, time.monotonic(), limit)
            running[run_in_fork(mutant, tests, scratch, stops=True)] = job
        time.sleep(0.05)
        for number, job in list(running.items()):
            ended = time.monotonic() - job.started > job.limit
            if ended:
                os.killpg(number, signal.SIGKILL)
            if ended or os.waitpid(number, os.WNOHANG)[0]:
                if ended:
                    os.waitpid(number, 0)
                yield running.pop(number).result(ended)
                shutil.rmtree(job.scratch, ignore_errors=True)


def failing_without_mutant(tests: Sequence[str]) -> set[str]:
    """Those of the tests that fail in a fork although nothing is mutated."""
    scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
    os.waitpid(run_in_fork(None, tests, scratch, stops=False), 0)
    file = scratch / "result.json"
    failing = set(json.loads(file.read_text(encoding="utf-8"))["all"]) if file.exists() else set(tests)
    shutil.rmtree(scratch, ignore_errors=True)
    return failing


def preload() -> None:
    """Import what every test needs and nothing of the project."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    if ours := [name for name in sys.modules if name.split(".")[0] in ("library", "networks", "tests")]:
        raise RuntimeError(f"modules of the project are imported already: {ours[:3]}")


# --- the command -----------------------------------------------------------------------------------------------
def wanted(arguments: argparse.Namespace) -> list[Mutant]:
    """The mutants that the command line asks for, as the sources are now."""
    defaults = option_defaults()
    if arguments.at:
        file, _, line = arguments.at.rpartition(":")
        return [mutant for mutant in mutants_of(ROOT / file, defaults) if mutant.first == int(line)]
    patterns = arguments.files or DEFAULT_FILES
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    every = [mutant for path in paths for mutant in mutants_of(path, defaults)]
    if arguments.only:
        survivors = {key_of(each.mutant) for each in read_results(arguments.only) if not each.is_noticed}
        return [mutant for mutant in every if key_of(mutant) in survivors]
    return sample(every, arguments.count, arguments.seed)


def summary(results: Sequence[Result]) -> str:
    """Counts by file and altogether."""
    files: Mapping[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        files[result.mutant.file]["noticed" if result.is_noticed else result.outcome] += 1
    rows = [f"{file}: {', '.join(f'{count} {name}' for name, count in row.items())}" for file, row in files.items()]
    total = sum(files.values(), Counter[str]())
    seconds = sum(result.seconds for result in results) / max(1, len(results))
    return "\n".join([*sorted(rows), f"{len(results)} mutants: {dict(total)}; {seconds:.1f} s each"])


def main() -> None:
    """Choose mutants, run them, print and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="source files, patterns allowed (default: the core rooms)")
    parser.add_argument("--map", type=Path, required=True, help="what mutation_map.py wrote")
    parser.add_argument("--to", type=Path, required=True, help="file for the results, one line of JSON each")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--tests", type=int, default=40, help="tests per mutant at most")
    parser.add_argument("--seconds", type=float, default=90, help="seconds of tests per mutant at most")
    parser.add_argument("--only", type=Path, help="the survivors of this file of results")
    parser.add_argument("--at", metavar="FILE:LINE", help="every mutant of this line")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args()
    os.environ |= {
        name: os.environ.get(name, value)
        for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items()
    }
    for name in ("map", "to", "only"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    os.chdir(ROOT)
    mutants = wanted(arguments)
    if arguments.list:
        print(*mutants, sep="\n")
        return
    done = {key_of(result.mutant) for result in read_results(arguments.to)}
    found, limits = TestMap.read(arguments.map), Limits(arguments.tests, arguments.seconds)
    preload()
    distrusted: set[str] = set()
    while rest := [mutant for mutant in mutants if key_of(mutant) not in done]:
        for result in run_all(rest, found, limits, distrusted, arguments.jobs):
            done.add(key_of(result.mutant))
            append_result(arguments.to, result)
            print(result, flush=True)
        done -= take_back(arguments.to, mutants, found, distrusted)
    keys = {key_of(mutant) for mutant in mutants}
    print(summary([result for result in read_results(arguments.to) if key_of(result.mutant) in keys]))


def take_back(path: Path, mutants: Sequence[Mutant], found: TestMap, distrusted: set[str]) -> set[Any]:
    """Mutants that only a test noticed that also fails without them; such tests join `distrusted`."""
    keys = {key_of(mutant) for mutant in mutants}
    noticed = [
        result for result in read_results(path) if key_of(result.mutant) in keys and result.outcome in found.tests
    ]
    new = failing_without_mutant(sorted({result.outcome for result in noticed})) - distrusted if noticed else set()
    distrusted |= new
    for name in sorted(new):
        print(f"{name} fails without a mutant too; what it noticed is done again without it")
    return {key_of(result.mutant) for result in noticed if result.outcome in new}


if __name__ == "__main__":
    main()
