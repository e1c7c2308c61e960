"""What README and docs show exists: scripts, options of every command, links, keys of dataset examples, rooms."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.config_schema import KEYS
from library.generation.request import GENERATION, TRAINING_SAMPLES
from library.launch import Script, read_command_line, resolve
from library.options.declare import specs_of
from library.options.not_yet import unsupported
from library.options.suggestions import nearest
from library.tool_launch import Tool
from library.tool_launch import parse as parse_tool

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("library", "networks", "tools", "finetune", "demo", "benchmarks", "tests")
#: words of commands that are not for our scripts
LAUNCHER_OPTIONS = {"num_cpu_threads_per_process"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """A command line of a page: the script's path and the words after it."""

    page: str
    script: str
    words: tuple[str, ...]


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def commands(page: Path) -> Iterator[Command]:
    """Every command of a fenced or indented block that runs one of the project's scripts."""
    text = text_of(page)
    fenced = [block for language, block in FENCE.findall(text) if language in ("", "sh", "bash")]
    lines = [line for block in fenced for line in _lines(block)]
    lines += [line[4:] for line in _lines(FENCE.sub("", text)) if line.startswith("    ")]
    for line in lines:
        if line.startswith(("python ", "accelerate launch ")):
            words = shlex.split(line, comments=True)
            script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None:
                yield Command(page.name, words[script], tuple(words[script + 1 :]))


def _lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


COMMANDS = [command for page in PAGES for command in commands(page)]


@functools.cache
def program_of(path: str) -> Script | Tool:
    """The script or tool of ours with this path."""
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.SCRIPT if hasattr(module, "SCRIPT") else module.TOOL


def has_our_parser(path: Path) -> bool:
    return bool(re.search(r"launch\.(Script|Tool)\(", text_of(path))) if path.is_file() else False


def programs() -> list[Path]:
    """Everything that is run by its path: entry scripts and tools."""
    folders = (ROOT, *(ROOT / name for name in ("tools", "networks", "finetune")))
    return [path for folder in folders for path in sorted(folder.glob("*.py")) if has_our_parser(path)]


@functools.cache
def known_options() -> frozenset[str]:
    """Every option of every program, of our own small programs, and of prompt lines."""
    found = {*LAUNCHER_OPTIONS, "help"}
    for path in programs():
        program = program_of(path.relative_to(ROOT).as_posix())
        specs = program.options.specs().values() if isinstance(program, Script) else specs_of(program.options)
        found |= {spec.name for spec in specs}
    for folder in (ROOT, *(ROOT / name for name in ("demo", "benchmarks", "library"))):
        for path in folder.glob("*.py"):
            found |= set(re.findall(r'"--([\w-]+)"', text_of(path)))
    keyboard = text_of(ROOT / "library" / "generation" / "minimal.py")  # importing it takes seconds
    found |= set(re.findall(r'"(\w+)": PromptOption\(', keyboard))
    return frozenset(found | {name for dialect in (GENERATION, TRAINING_SAMPLES) for name in dialect.options})


# --- commands --------------------------------------------------------------------------------------------------
def test_commands_are_found() -> None:
    assert len(COMMANDS) > 20
    assert {"train_network.py", "flux_train.py", "networks/merge_lora.py"} <= {command.script for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.script}")
def test_every_command_is_accepted_by_its_script(command: Command) -> None:
    path = ROOT / command.script
    assert path.is_file(), f"{command.page}: there is no {command.script}"
    if not has_our_parser(path):
        options = [word.lstrip("-") for word in command.words if word.startswith("--")]
        assert [name for name in options if f'"--{name}"' not in text_of(path)] == []
    elif isinstance(program := program_of(command.script), Script):
        assert problems_of(program, command.words) == []
    else:
        parse_tool(program, list(command.words))


def problems_of(script: Script, words: Sequence[str]) -> list[str]:
    """What is wrong with a command, but for the files that only its reader has."""
    command_line = read_command_line(script, words)
    checked = resolve(script.options.check)(command_line.options, script.options)
    problems = [*command_line.problems, *checked.problems, *unsupported(checked.options, script.options.not_yet)]
    return [text for text in problems if not re.search(r"there is no (file|folder)", text)]


def test_mistakes_in_commands_are_found() -> None:
    script = program_of("sdxl_train.py")
    assert isinstance(script, Script)
    given = ["--pretrained_model_name_or_path", "m.safetensors", "--output_dir", "output"]
    assert problems_of(script, given) == []
    for wrong in (["--network_dim", "4"], ["--v2"], ["--mixed_precision", "fp8"], ["--torch_compile"]):
        assert len(problems_of(script, [*given, *wrong])) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    prose = FENCE.sub("", text_of(page))
    named = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", prose))
    unknown = {name: nearest(name, known_options()) for name in named - known_options()}
    assert unknown == {}


# --- names and links -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_in_the_text_exist(page: Path) -> None:
    everything = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py"))
    names = {path.relative_to(ROOT).as_posix() for path in everything}
    named = {word.removeprefix("./") for word in re.findall(r"[\w*./-]+\.py\b", text_of(page))}
    missing = []
    for word in named:
        pattern = re.compile(r"(?:.*/)?" + re.escape(word).replace(r"\*", "[^/]*"))
        if not any(pattern.fullmatch(name) for name in names):
            missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ +(.+)$", text_of(path), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.name)
def test_the_readme_names_every_program(path: Path) -> None:
    assert f"`{path.relative_to(ROOT).as_posix()}`" in text_of(ROOT / "README.md")


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(text_of(ROOT / "README.md"))}
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in linked] == []


def test_the_architecture_names_every_room() -> None:
    tree = text_of(ROOT / "docs" / "architecture.md").partition("## The two axes")[0]
    rooms = {path.stem for path in (ROOT / "library").iterdir() if not path.name.startswith("__")}
    assert sorted(room for room in rooms if not re.search(rf"\b{room}\b", tree)) == []


# --- dataset examples ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dataset_examples_have_known_keys(page: Path) -> None:
    for language, block in FENCE.findall(text_of(page)):
        content = tomllib.loads(block) if language == "toml" else {}
        if "datasets" not in content:
            continue
        tables = [content.get("general", {}), *content["datasets"]]
        tables += [subset for dataset in content["datasets"] for subset in dataset.get("subsets", [])]
        assert {key for table in tables for key in table} - {*KEYS, "subsets"} == set()
