"""The bootstrap: which Python and torch are accepted, what counts as installed, and what failures say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from library import bootstrap

REQUIREMENTS = [bootstrap.ROOT / "requirements.txt", bootstrap.ROOT / "requirements-test.txt"]


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_pythons_pass(version: tuple[int, int]) -> None:
    bootstrap.check_version(version, "python")


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7), (4, 0)])
def test_other_pythons_get_one_clear_line(version: tuple[int, int]) -> None:
    with pytest.raises(bootstrap.SetupError) as error:
        bootstrap.check_version(version, "/usr/bin/python")
    assert "Python 3.11 to 3.13 is needed" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.6.0", True), ("2.13.0+cpu", True), ("3.0.1", True), ("2.5.1+cu124", False), ("1.13.1", False), ("", False)],
)
def test_suitable_torch_is_2_6_or_newer(version: str, fits: bool) -> None:
    assert bootstrap.is_suitable_torch(version) is fits


def test_every_requirement_is_pinned_to_a_version_in_its_range() -> None:
    pins = dict(line.split("==") for line in bootstrap.requirement_lines([bootstrap.ROOT / "constraints.txt"]))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for line in bootstrap.requirement_lines(REQUIREMENTS):
        name, limits = re.fullmatch(r"([\w.-]+)((?:[<>=]=?[\d.]+,?)*)(?: *;.*)?", line).groups()  # type: ignore[union-attr]
        version = numbers(pins[re.sub(r"[-_.]+", "-", name).lower()])
        for operator, limit in re.findall(r"([<>=]=?)([\d.]+)", limits):
            found = {">=": version >= numbers(limit), "<": version < numbers(limit), "==": version == numbers(limit)}
            assert found[operator], line


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_names_leave_out_what_only_some_platforms_need() -> None:
    names = bootstrap.required_names(REQUIREMENTS)
    assert {"torch", "diffusers", "opencv-python-headless", "pytest"} <= set(names)
    assert "bitsandbytes" not in names


def test_installed_versions_are_read_in_order() -> None:
    found = bootstrap.installed_versions(Path(sys.executable), ["pytest", "package-that-nobody-has", "torch"])
    assert found[0] == pytest.__version__ and found[1] == "" and bootstrap.is_suitable_torch(found[2])


def test_fingerprint_follows_the_requirements(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_bytes(b"torch\nnumpy\n")
    before = bootstrap.fingerprint([file])
    file.write_bytes(b"torch\r\nnumpy\r\n")
    assert bootstrap.fingerprint([file]) == before
    file.write_bytes(b"torch\nnumpy>=2\n")
    assert bootstrap.fingerprint([file]) != before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("NewConnectionError: Temporary failure in name resolution", "offline"),
        ("ERROR: Could not find a version of torch (from versions: none)", "offline"),
        ("ERROR: Could not build wheels", "pip failed with status 3"),
    ],
)
def test_failing_pip_is_explained(output: str, message: str) -> None:
    shown: list[str] = []
    with pytest.raises(bootstrap.SetupError, match=message):
        bootstrap.run_pip([sys.executable, "-c", f"import sys; print({output!r}); sys.exit(3)"], shown.append)
    assert shown == [output]


@pytest.mark.slow
def test_complete_environment_is_recognised_without_a_package_index(tmp_path: Path) -> None:
    assert bootstrap.is_satisfied(Path(sys.executable), REQUIREMENTS)
    absent = tmp_path / "requirements.txt"
    absent.write_text("package-that-nobody-has\n")
    assert not bootstrap.is_satisfied(Path(sys.executable), [absent])


def test_bootstraps_import_nothing_that_must_be_installed_first() -> None:
    code = "import sys; old = set(sys.modules); import quickstart, run_tests; print(sorted(set(sys.modules) - old))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=bootstrap.ROOT, capture_output=True, text=True, check=True
    )
    names = {name.split(".")[0] for name in re.findall(r"'([\w.]+)'", result.stdout)}
    assert names - set(sys.stdlib_module_names) == {"library", "quickstart", "run_tests"}
