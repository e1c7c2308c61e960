"""From a command line to a tool: one dataclass of options and one function that works with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from library import logs
from library.launch import Parser, argument, exit_status, unknown_words
from library.options.console import ConsoleOptions
from library.options.declare import specs_of
from library.options.errors import UserError
from library.preflight.outputs import file_problems, folder_problems


@dataclass(frozen=True)
class Tool:
    """A script with few options of its own, which no other script shares and no `--config_file` holds.

    `options` is a dataclass whose fields are declared with `option` and `flag`; `run` gets one of it. `writes_file`
    and `writes_folder` name the option whose file, or folder for files, must be writable before `run` begins.
    """

    name: str  # path from the project's root, e.g. "tools/show_metadata.py"
    description: str
    options: type
    run: Callable[[Any], None]
    writes_file: str | None = None
    writes_folder: str | None = None


def build_parser(tool: Tool) -> argparse.ArgumentParser:
    """The tool's parser: every option with its type, default and choices. Its errors are UserError."""
    parser = Parser(
        prog=tool.name,
        usage=" ".join([tool.name, *(spec.name for spec in specs_of(tool.options) if spec.is_positional), "[options]"]),
        description=tool.description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    for spec in specs_of(tool.options):
        parser.add_argument(*spec.flags, **argument(spec, is_checked=True))
    return parser


def parse(tool: Tool, argv: Sequence[str]) -> Any:
    """The options of a command line. Raises UserError; `--help` prints and raises SystemExit(0)."""
    namespace, rest = build_parser(tool).parse_known_args(list(argv))
    specs = {spec.name: spec for spec in specs_of(tool.options)}
    problems = unknown_words(rest, specs, tool.name)
    if problems:
        raise UserError(problems)
    return tool.options(**{name: spec.final(getattr(namespace, name)) for name, spec in specs.items()})


def main(tool: Tool, argv: Sequence[str] | None = None) -> None:
    """Run a tool; it ends as `library.launch.exit_status` says."""
    with exit_status(tool.name):
        options = parse(tool, sys.argv[1:] if argv is None else argv)
        check_outputs(tool, options)
        logs.set_up(ConsoleOptions())
        tool.run(options)


def check_outputs(tool: Tool, options: Any) -> None:
    """Raises UserError if what the tool makes cannot be written where the options say."""
    specs = {spec.name: spec for spec in specs_of(tool.options)}
    problems: list[str] = []
    for name, check in ((tool.writes_file, file_problems), (tool.writes_folder, folder_problems)):
        if name and getattr(options, name):
            problems += check(name if specs[name].is_positional else f"--{name}", str(getattr(options, name)))
    if problems:
        raise UserError(problems)
