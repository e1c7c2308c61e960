"""Standard library only: find or make a Python environment and install what the scripts need, once.

Written so that Pythons which are too old can still read it and say what is wanted.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TYPE_CHECKING = False  # importing typing would cost time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
OLDEST_TORCH = (2, 6)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OFFLINE_SIGNS = (
    "newconnectionerror", "name resolution", "failed to establish", "network is unreachable", "connection refused",
    "connecttimeout", "getaddrinfo", "connection broken", "max retries exceeded", "nodename nor servname",
    "from versions: none",
)  # fmt: skip
LIST_MISSING = """
import importlib.metadata, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
print("\\n".join(version(name) for name in sys.argv[1:]))
"""


class SetupError(Exception):
    """The environment cannot be made ready; the text says why and what to do."""


def prepare(requirements: list[Path], *, cpu: bool = False, say: Callable[[str], None] = print) -> Path:
    """A Python in which everything in the requirements files is installed: the active virtual environment, or `.venv`.

    Installs only what is missing, and nothing when it has done so before. Raises SetupError.
    """
    check_version(sys.version_info[:2], sys.executable)
    python = environment_python(say)
    stamp = python.parent.parent / f".installed-{fingerprint(requirements)}"
    names = required_names(requirements)
    if stamp.exists() and all(installed_versions(python, names)):
        return python
    ensure_pip(python)
    if not is_satisfied(python, requirements):
        say("installing into " + str(python.parent.parent) + " (several GB the first time; this takes minutes)")
        install(python, requirements, cpu=cpu, say=say)
    stamp.touch()
    return python


def check_version(version: tuple[int, ...], executable: str) -> None:
    """Raises SetupError unless the Python version is one of those that work."""
    if not OLDEST <= tuple(version) <= NEWEST:
        raise SetupError(
            f"Python {version[0]}.{version[1]} ({executable}) does not fit: Python {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]} is needed. Install one and run this with it."
        )


def venv_python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment_python(say: Callable[[str], None] = print) -> Path:
    """The active virtual environment's interpreter, else that of `.venv`, which is made if it is not there."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    folder = ROOT / ".venv"
    python = venv_python(folder)
    if not python.exists():
        make_environment(folder, say)
    version = run_quietly([python, "-c", "import sys; print(*sys.version_info[:2])"])
    if version.returncode != 0:
        raise SetupError(f"{folder} is broken (its Python does not start); remove that folder and run this again.")
    check_version(tuple(int(part) for part in version.stdout.split()), str(python))
    return python


def make_environment(folder: Path, say: Callable[[str], None] = print) -> None:
    """A virtual environment; it sees the packages of this Python if a suitable torch is among them."""
    say(f"making the environment {folder}")
    command = [sys.executable, "-m", "venv", str(folder)]
    if is_suitable_torch(installed_versions(Path(sys.executable), ["torch"])[0]):
        command.append("--system-site-packages")
    made = run_quietly(command)
    if made.returncode != 0:
        hint = " On Debian and Ubuntu: apt install python3-venv." if "ensurepip" in made.stdout + made.stderr else ""
        raise SetupError(f"no environment could be made in {folder}: {last_line(made)}{hint}")


def fingerprint(requirements: list[Path]) -> str:
    """Changes when a requirements file or the constraints change."""
    digest = hashlib.sha256()
    for path in [*requirements, ROOT / "constraints.txt"]:
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def requirement_lines(requirements: list[Path]) -> list[str]:
    """The requirements themselves, without comments and empty lines."""
    lines = [line.split("#")[0].strip() for path in requirements for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if line]


def required_names(requirements: list[Path]) -> list[str]:
    """Names of the packages that every platform needs."""
    return [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requirement_lines(requirements) if ";" not in line]


def installed_versions(python: Path, names: list[str]) -> list[str]:
    """The installed version of each package, "" for one that is missing."""
    found = run_quietly([python, "-c", LIST_MISSING, *names])
    return found.stdout.split("\n")[: len(names)] if found.returncode == 0 else [""] * len(names)


def is_suitable_torch(version: str) -> bool:
    """Whether an installed torch may stay."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers.group(1)), int(numbers.group(2))) >= OLDEST_TORCH


def ensure_pip(python: Path) -> None:
    """Raises SetupError if there is no pip and none can be made."""
    if run_quietly([python, "-m", "pip", "--version"]).returncode != 0:
        if run_quietly([python, "-m", "ensurepip"]).returncode != 0:
            raise SetupError(f"{python} has no pip; install pip there, or leave that environment and run this again.")


def pip_install(python: Path) -> list[str]:
    """The beginning of a pip command."""
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check"]


def is_satisfied(python: Path, requirements: list[Path]) -> bool:
    """Whether everything is installed in a version that fits; asks no package index."""
    files = [word for path in requirements for word in ("-r", str(path))]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    return run_quietly([*pip_install(python), "--quiet", "--no-index", *files], environment).returncode == 0


def install(
    python: Path, requirements: list[Path], *, cpu: bool = False, say: Callable[[str], None] = print
) -> None:
    """Install the tested versions; a suitable torch that is already there stays. Raises SetupError."""
    torch = installed_versions(python, ["torch"])[0]
    if cpu and sys.platform.startswith("linux") and not is_suitable_torch(torch):
        install_cpu_torch(python, say)
        torch = installed_versions(python, ["torch"])[0]
    lines = requirement_lines(requirements)
    constraints = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if is_suitable_torch(torch):
        say(f"keeping torch {torch}")
        lines = [line for line in lines if not re.match(r"torch\b(?!-)", line)]
        constraints = [line for line in constraints if not line.startswith("torch==")] + [f"torch=={torch}"]
    with tempfile.TemporaryDirectory() as folder:
        wanted, pinned = Path(folder) / "requirements.txt", Path(folder) / "constraints.txt"
        wanted.write_text("\n".join(lines) + "\n", "utf-8")
        pinned.write_text("\n".join(constraints) + "\n", "utf-8")
        run_pip([*pip_install(python), "-r", str(wanted), "-c", str(pinned)], say)


def install_cpu_torch(python: Path, say: Callable[[str], None] = print) -> None:
    """A torch without CUDA: from the usual package index if it has one, else from PyTorch's own.

    Leaves it to the general installation, which takes what it gets, when neither has one.
    """
    pinned = next(line for line in requirement_lines([ROOT / "constraints.txt"]) if line.startswith("torch=="))
    for more in ([f"{pinned}+cpu"], [pinned, "--index-url", CPU_INDEX]):
        say("looking for " + " ".join(more))
        if run_quietly([*pip_install(python), "--retries", "1", *more]).returncode == 0:
            return
    say("no CPU build of torch found; taking the usual one")


def run_pip(command: list[str], say: Callable[[str], None] = print) -> None:
    """Run pip with its output shown. Raises SetupError that says whether the network is the reason."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if not line.startswith("Requirement already satisfied"):
            say(line.rstrip())
    if process.wait() == 0:
        return
    output = "".join(lines).lower()
    if any(sign in output for sign in OFFLINE_SIGNS):
        raise SetupError(
            "the package index cannot be reached, or has nothing for this machine (offline?). Connect, and try again."
        )
    raise SetupError(f"pip failed with status {process.returncode}; its messages stand above.")


def run_quietly(
    command: list[Any], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return status, stdout and stderr; a program that cannot start counts as status 127."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(
            words, capture_output=True, check=False, encoding="utf-8", errors="replace", env=environment
        )
    except OSError as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The last line that a program wrote."""
    lines = (result.stdout + result.stderr).strip().splitlines()
    return lines[-1] if lines else f"status {result.returncode}"


def start(
    name: str, requirements: list[str], command: list[str], *, cpu: bool = False,
    environment: dict[str, str] | None = None,
) -> int:
    """Prepare, then run `python *command` in the project folder; returns its exit status, or 2 after a clear line."""
    try:
        python = prepare([ROOT / item for item in requirements], cpu=cpu)
        sys.stdout.flush()
        return subprocess.call([str(python), *command], cwd=str(ROOT), env=dict(os.environ, **(environment or {})))
    except SetupError as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
