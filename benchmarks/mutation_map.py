"""Which test runs which line of the code, and how long each test takes: the map that `mutations.py` chooses tests by.

    pip install coverage
    python benchmarks/mutation_map.py --to mutation_map.json                 # the quick tests, with everything they run
    python benchmarks/mutation_map.py --to mutation_map.json --also slow     # adds the slow ones to an existing map

Runs pytest once in this process with `coverage`, which notes for each line the tests that reached it. What a fixture of
a module or a session does counts for every test that asks for the fixture, and programs that a test starts are watched
too (`mutation_hook/sitecustomize.py`). Lines that run while modules are imported belong to no test.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOK = Path(__file__).resolve().parent / "mutation_hook"
#: for started programs: where to leave what they ran, and on behalf of which test
DATA_VARIABLE, TEST_VARIABLE = "MUTATION_MAP_DATA", "MUTATION_MAP_TEST"
WATCHED = ("library/*", "networks/*")
FIXTURE = "fixture "


@dataclass(frozen=True)
class TestFacts:
    """What is known about one test."""

    __test__ = False  # for pytest: this is no test

    seconds: float
    passed: bool
    is_slow: bool


@dataclass
class TestMap:
    """Facts by test, and for each file (relative to the root) the tests by line."""

    __test__ = False

    tests: dict[str, TestFacts] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> TestMap:
        """Read what `write` wrote."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = list(stored["tests"])
        lines = {
            file: {int(line): {names[index] for index in indices} for line, indices in of_file.items()}
            for file, of_file in stored["lines"].items()
        }
        return cls({name: TestFacts(*facts) for name, facts in stored["tests"].items()}, lines)

    def write(self, path: Path) -> None:
        """One JSON file; tests are numbers in the order of the table."""
        index = {name: number for number, name in enumerate(self.tests)}
        lines = {
            file: {line: sorted(index[name] for name in names) for line, names in sorted(of_file.items())}
            for file, of_file in self.lines.items()
        }
        tests = {name: (round(t.seconds, 3), t.passed, t.is_slow) for name, t in self.tests.items()}
        path.write_text(json.dumps({"tests": tests, "lines": lines}), encoding="utf-8")

    def add(self, tests: dict[str, TestFacts], lines: dict[str, dict[int, set[str]]]) -> None:
        """What another run of pytest found."""
        self.tests |= tests
        for file, of_file in lines.items():
            for line, names in of_file.items():
                self.lines.setdefault(file, {}).setdefault(line, set()).update(names)

    def of_lines(self, file: str, first: int, last: int) -> list[str]:
        """The passing tests that run one of these lines, fastest first."""
        of_file = self.lines.get(file, {})
        names = {name for line in range(first, last + 1) for name in of_file.get(line, ())}
        return sorted((name for name in names if self.tests[name].passed), key=lambda name: self.tests[name].seconds)


class Recorder:
    """The pytest plugin: tells coverage whose lines these are, and notes times, outcomes and fixtures."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.slow: set[str] = set()
        self.users: dict[str, set[str]] = defaultdict(set)  # tests by fixture

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.slow = {item.nodeid for item in items if item.get_closest_marker("slow")}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        self._belongs_to(item.nodeid)
        result = yield
        self._belongs_to("")
        return result  # noqa: B901 - the protocol of pytest's wrappers

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        before = os.environ.get(TEST_VARIABLE, "")
        if fixturedef.scope != "function":
            self._belongs_to(f"{FIXTURE}{fixturedef.baseid}:{fixturedef.argname}")
        try:
            return (yield)  # noqa: B901
        finally:
            self._belongs_to(before)

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        for definitions in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009 - pytest's own
            for made in definitions:
                if made.scope != "function":
                    self.users[f"{FIXTURE}{made.baseid}:{made.argname}"].add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def _belongs_to(self, name: str) -> None:
        os.environ[TEST_VARIABLE] = name
        self.coverage.switch_context(name)

    def facts(self) -> dict[str, TestFacts]:
        return {
            name: TestFacts(seconds, name not in self.failed, name in self.slow)
            for name, seconds in self.seconds.items()
        }


def start_coverage(data: str, context: str = "") -> Any:
    """A running coverage of the watched folders, whose data will lie beside `data`."""
    import coverage

    watch = coverage.Coverage(
        data_file=data, data_suffix=True, include=[str(ROOT / place) for place in WATCHED], config_file=False,
        messages=False, check_preimported=False, context=context or None,
    )  # fmt: skip
    watch.start()
    return watch


def collect(words: list[str]) -> tuple[dict[str, TestFacts], dict[str, dict[int, set[str]]]]:
    """Run pytest with these words; (facts by test, tests by file and line)."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "lines")
        os.environ[DATA_VARIABLE] = data
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH"))))
        watch = start_coverage(data)
        recorder = Recorder(watch)
        pytest.main(["-q", "-p", "no:cacheprovider", *words], plugins=[recorder])
        watch.stop()
        watch.save()
        watch.combine([folder])
        return recorder.facts(), _tests_by_line(watch.get_data(), recorder)


def _tests_by_line(data: Any, recorder: Recorder) -> dict[str, dict[int, set[str]]]:
    result: dict[str, dict[int, set[str]]] = {}
    for file in data.measured_files():
        of_file: dict[int, set[str]] = {}
        for line, contexts in data.contexts_by_lineno(file).items():
            names: set[str] = set()
            for context in contexts:
                names |= recorder.users[context] if context.startswith(FIXTURE) else {context}
            if names := {name for name in names if name in recorder.seconds}:
                of_file[line] = names
        result[Path(file).relative_to(ROOT).as_posix()] = of_file
    return result


def main() -> None:
    """Collect, and write or extend the map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="the map's file")
    parser.add_argument("--also", choices=("slow",), help="run the slow tests and add them to the map")
    arguments, words = parser.parse_known_args()  # further words go to pytest
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    found = TestMap.read(arguments.to) if arguments.also else TestMap()
    target = arguments.to.resolve()
    found.add(*collect(["-m", arguments.also or "not slow", *words]))
    found.write(target)
    print(f"{len(found.tests)} tests, {sum(map(len, found.lines.values()))} lines of {len(found.lines)} files")


if __name__ == "__main__":
    main()
