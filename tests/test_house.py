"""Rules of the house: who imports whom, where families are named, light start-up, tidy files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).resolve().parent.parent
#: a room may import rooms of its own line and of the lines above it
ROOMS = (
    "options devices logs schedulers noise losses checkpoints hashes sampling_spec bootstrap",
    "models text data memory networks config_util config_schema config_sources config_validation",
    "objectives families model_files encoder_files model_util sdxl_model_util sd3_model_util "
    "flux_model_util flux_utils",
    "methods generation optimizers optimizer_state lr_schedulers metadata model_spec train_util training_state "
    "state_files run_record hub progress saving finite",
    "caching caching_tools bucket_preparation preflight training_loop launch tool_launch script_api "
    "sdxl_train_util sd3_train_utils flux_train_utils huggingface_util",
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}
#: where families may be named
FAMILY_PLACES = re.compile(
    r"library/(families/|models/|checkpoints/|options/(__init__|caching_tools|family_choice|family_scripts|flow|flux|minimal_inference|sd3)\b|metadata"
    r"|model_spec|\w*model_util|flux_utils|\w+_train_utils?)|networks/"
)
FAMILY_WORDS = {"sd", "sd1", "sd15", "sd2", "sd21", "sd3", "sd35", "sdxl", "flux", "stablediffusion"}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "cv2", "PIL", "safetensors", "bitsandbytes")
LONGEST_FILE = 500


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def entry_scripts() -> list[Path]:
    return sorted(
        path for path in ROOT.glob("*.py") if re.search(r"launch\.(Script|Tool)\(", path.read_text("utf-8"))
    )


def tools() -> list[Path]:
    return [path for path in sources("tools", "networks", "finetune") if "tool_launch.Tool(" in path.read_text("utf-8")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def running_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from running_code(node)


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in running_code(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "library":
            found |= {f"library.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name_of(path)}: import by full names"
            found.add(node.module)
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "library" and len(parts) > 1 else "networks" if parts[0] == "networks" else None


@pytest.mark.parametrize("path", sources("library"), ids=name_of)
def test_rooms_import_only_downwards(path: Path) -> None:
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no place in ROOMS yet"
    rooms = {room_of(module) for module in imported_modules(path)} - {None, own}
    assert rooms <= set(LEVEL)
    assert {room for room in rooms if LEVEL[room] > LEVEL[own]} == set()


def test_networks_and_data_never_import_a_family() -> None:
    for path in sources("networks", "library/data"):
        assert not [module for module in imported_modules(path) if module.startswith("library.families")], path


def family_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, word) of identifiers and of one-word strings that name a family."""
    for node in ast.walk(tree):
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.:]+", node.value):
            words.append(node.value)
        for word in words:
            if isinstance(word, str):
                parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", word).lower()
                if FAMILY_WORDS & {*re.split(r"[^a-z0-9]+|_", parts), parts.replace("_", "")}:
                    yield getattr(node, "lineno", 0), word


def test_family_words_are_found() -> None:
    code = "class SdxlThing: pass\nif kind == 'flux':\n    load_sd3()\nStableDiffusion\nadjusted = 'about flux'\n"
    assert [word for _, word in family_words(ast.parse(code))] == ["SdxlThing", "StableDiffusion", "flux", "load_sd3"]


@pytest.mark.parametrize("path", [p for p in sources("library") if not FAMILY_PLACES.match(name_of(p))], ids=name_of)
def test_families_are_named_only_in_their_places(path: Path) -> None:
    assert list(family_words(ast.parse(path.read_text("utf-8")))) == []


@pytest.mark.parametrize("path", entry_scripts() + tools(), ids=name_of)
def test_help_is_quick_and_leaves_heavy_packages_out(path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv, sys.path[0] = [{str(path)!r}, '--help'], {str(path.parent)!r}\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        f"    print('status', stop.code, 'heavy', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - begin
    print(f"{name_of(path)} --help: {seconds:.2f} s")
    assert result.stdout.startswith(f"usage: {name_of(path)}")
    assert result.stdout.splitlines()[-1] == "status 0 heavy []"
    assert seconds < 1.5


@pytest.mark.parametrize("path", entry_scripts() + tools(), ids=name_of)
def test_scripts_are_short_and_show_a_command(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= (LONGEST_FILE if path in tools() else 45)
    assert f"python {name_of(path)}" in (ast.get_docstring(ast.parse(text)) or "")
    assert {"setup_parser", "main"} <= {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", sources("library", "networks"), ids=name_of)
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(text)), "a module begins with one sentence of purpose"


def test_tests_are_skipped_only_for_named_reasons() -> None:
    skipping = re.compile(r"\b(skipif|importorskip|xfail)\(|pytest\.skip\(|mark\.skip\b")
    for path in sources("tests"):
        if path.name not in ("skips.py", Path(__file__).name):
            lines = [line for line in path.read_text("utf-8").splitlines() if skipping.search(line)]
            assert not [line for line in lines if not re.search(r"skips\.(NO_\w+)", line)], path
    assert len(set(skips.REASONS)) == len(skips.REASONS)


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", os.devnull]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_finds_nothing() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
