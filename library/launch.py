"""From a command line to a running script: parser, `--config_file`, checks, messages, and one place for failures."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from library import logs
from library.config_util import ConfigError, SupportedKinds, load_data_config, unsupported_data
from library.options.checks import published_by_wandb
from library.options.declare import OptionSpec, specs_of
from library.options.errors import UserError
from library.options.not_yet import unsupported
from library.options.script_options import ScriptOptions
from library.options.suggestions import meaning
from library.options.toml_file import ConfigFile, config_path, read_config, write_config

logger = logging.getLogger(__name__)

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
MISTAKES = (ValueError, ImportError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


@dataclass(frozen=True)
class Script:
    """An entry script. Dotted paths are `module:name`; they are imported only after all options are checked.

    A script without training data gets `run(options, family)`, one with data `run(options, family, method, kinds)`.
    """

    name: str  # file name, e.g. "train_network.py"
    description: str
    options: ScriptOptions
    family: str
    method: str | None = None
    run: str = "library.training_loop:train"
    data: SupportedKinds | None = SupportedKinds()  # `--masked_loss` adds the kind with mask images


@dataclass(frozen=True)
class CommandLine:
    """What a command line and its `--config_file` say; `raw` has every option as it would stand in a TOML file."""

    options: Any  # the script's record: `library.options.Options` for training
    raw: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


# --- parser --------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Reports a mistake as UserError instead of printing all of the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def build_parser(script: Script) -> argparse.ArgumentParser:
    """The script's parser: every option with its type, default and choices. Its errors are UserError."""
    return _make_parser(script, is_checked=True)


def _make_parser(script: Script, *, is_checked: bool) -> Parser:
    """With `is_checked` false every value stays the text that was given."""
    parser = Parser(
        prog=script.name,
        usage=f"{script.name} [options]",
        description=script.description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    titles = {group: f"{name.replace('_', ' ')} options" for name, group in script.options.record.groups().items()}
    specs = script.options.specs()
    for group in script.options.groups:
        section = parser.add_argument_group(titles[group])
        for spec in (specs[item.name] for item in specs_of(group) if item.name in specs):
            section.add_argument(*spec.flags, **argument(spec, is_checked=is_checked))
    return parser


def argument(spec: OptionSpec, *, is_checked: bool) -> dict[str, Any]:
    """What `add_argument` gets for an option besides its flags."""
    text = spec.help.replace("%", "%%")
    if spec.is_flag:
        return {"dest": spec.name, "action": "store_true", "default": spec.default, "help": text}
    if spec.default not in (None, "") and "(default" not in text:
        text += " (default: %(default)s)"

    def read(word: str) -> Any:
        try:
            value = spec.read(word)
            spec.final([value] if spec.nargs else value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    read.__name__ = spec.type_name
    if spec.is_positional:
        return {"dest": spec.name, "type": read, "help": text}
    names = [str(choice) for choice in spec.choices or () if choice is not None]
    metavar = "{" + ",".join(names) + "}" if 0 < len(",".join(names)) <= 40 else spec.type_name.upper()
    return {
        "dest": spec.name,
        "type": read if is_checked else str,
        "default": spec.default,
        "choices": spec.choices if is_checked else None,
        "nargs": spec.nargs,
        "metavar": metavar,
        "required": spec.required,
        "help": text if len(",".join(names)) <= 40 else f"{text}; one of {', '.join(names)}",
    }


# --- command line and file -----------------------------------------------------------------------------------
def read_command_line(script: Script, argv: Sequence[str]) -> CommandLine:
    """Command line > `--config_file` > defaults. Raises UserError when the words cannot be told apart at all.

    With `--output_config` the file is not read. `--help` prints and raises SystemExit(0), as argparse does.
    """
    specs = script.options.specs()
    given, problems = _given(script, argv)
    secrets, remarks = published_by_wandb(given)
    warnings = list(secrets)
    raw = {name: spec.default for name, spec in specs.items()}
    if given.get("config_file") and not given.get("output_config"):
        file = _read_file(config_path(given["config_file"]), specs, script.name, problems)
        raw |= file.values
        problems += file.problems
        warnings += file.warnings
    raw |= given
    if raw.get("config_file"):
        raw["config_file"] = str(config_path(raw["config_file"]).with_suffix(""))
    values = {name: spec.final(raw[name]) for name, spec in specs.items()}
    record: Any = script.options.record().with_values(**values)
    options = replace(record, script_defaults=script.options.defaults())
    return CommandLine(options, raw, tuple(problems), tuple(warnings), tuple(remarks))


def _read_file(path: Path, specs: Mapping[str, OptionSpec], script: str, problems: Sequence[str]) -> ConfigFile:
    """The file's options; a file cannot name another one. Without it too much is missing to look for more mistakes."""
    try:
        readable = {name: spec for name, spec in specs.items() if name not in ("config_file", "output_config")}
        return read_config(path, readable, script)
    except UserError as error:
        raise UserError([*problems, *error.problems], error.hints) from error


def _given(script: Script, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values of the options that stand on the command line, mistakes in them)."""
    specs = script.options.specs()
    missing = object()
    namespace = argparse.Namespace(**dict.fromkeys(specs, missing))
    namespace, rest = _make_parser(script, is_checked=False).parse_known_args(list(argv), namespace)
    problems = unknown_words(rest, specs, script.name)
    given: dict[str, Any] = {}
    for name, value in vars(namespace).items():
        if value is missing:
            continue
        if specs[name].means_nothing(value):
            given[name] = specs[name].default
            continue
        try:
            if specs[name].nargs is not None:
                value = [specs[name].read(word) for word in value if word.strip()]
            elif not specs[name].is_flag:
                value = specs[name].read(value)
            specs[name].check_choice(value)
            specs[name].final(value)
            given[name] = value
        except ValueError as error:
            problems.append(f"--{name}: {error}.")
    return given, problems


def unknown_words(words: Sequence[str], specs: Mapping[str, OptionSpec], script: str) -> list[str]:
    """One sentence for every word of a command line that is no option, with what may have been meant."""
    problems = []
    after_unknown = False
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0]
            phrase = meaning(name.lstrip("-"), specs, script)
            end = "" if phrase and phrase.endswith("?") else "."
            problems.append(f"unknown option {name}{f'; {phrase}' if phrase else ''}{end}")
        elif not after_unknown:
            problems.append(f"unexpected word {word!r}; options begin with --.")
        after_unknown = word.startswith("--") or after_unknown
    return problems


def check(script: Script, command_line: CommandLine) -> CommandLine:
    """The same with implied values filled in. Raises UserError that lists everything that is wrong.

    Looks at the options, the files they name and the dataset file, and imports nothing heavy.
    """
    checked = resolve(script.options.check)(command_line.options, script.options)
    problems = [*command_line.problems, *checked.problems]
    warnings = command_line.warnings + checked.warnings
    hints: tuple[str, ...] = ()
    if script.data is not None:
        data_problems, hints = _data_problems(script.data, checked.options)
        problems += data_problems
    problems += unsupported(command_line.options, script.options.not_yet)
    if problems:
        raise UserError(list(dict.fromkeys(problems)), hints=[*warnings, *hints])
    return replace(command_line, options=checked.options, warnings=warnings)


def data_kinds(kinds: SupportedKinds, options: Any) -> SupportedKinds:
    """The kinds of datasets that a script accepts; mask images come with `--masked_loss`."""
    return replace(kinds, controlnet=kinds.controlnet or options.dataset.masked_loss)


def _data_problems(kinds: SupportedKinds, options: Any) -> tuple[Sequence[str], tuple[str, ...]]:
    """(what is wrong with the dataset file or folders, warnings about them); the run reads and warns again."""
    if options.dataset.dataset_class:
        return (), ()
    problems: Sequence[str] = ()
    with logs.kept_warnings() as warnings:
        try:
            config = load_data_config(options.dataset, data_kinds(kinds, options), bucket_step=1)
            problems = unsupported_data(config)
        except ConfigError as error:
            problems = error.problems
        except (ValueError, OSError) as error:
            problems = [str(error)]
    return problems, tuple(warnings)


def parse(script: Script, argv: Sequence[str]) -> Any:
    """The checked options of a command line. Raises UserError that lists everything that is wrong."""
    return check(script, read_command_line(script, argv)).options


# --- running -------------------------------------------------------------------------------------------------
def main(script: Script, argv: Sequence[str] | None = None) -> None:
    """Run an entry script; it ends as `exit_status` says.

    Mistakes found while running show their traceback too under `--console_log_level DEBUG`.
    """
    with exit_status(script.name):
        _main(script, sys.argv[1:] if argv is None else argv)


@contextmanager
def exit_status(name: str) -> Iterator[None]:
    """What is done inside ends the process the way users of the script `name` expect.

    A user's mistake prints one line per mistake, then the warnings that may explain them, and exits with status 2, an
    interrupt with 130, a termination with 143; any other failure leaves as the exception that it is (status 1).
    """
    try:
        with _termination_as_exit():
            yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MISTAKES as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        for line in _lines(error):
            print(f"{name}: error: {line}", file=sys.stderr)
        for hint in error.hints if isinstance(error, UserError) else ():
            print(f"{name}: warning: {hint}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _main(script: Script, argv: Sequence[str]) -> None:
    command_line = read_command_line(script, argv)
    if command_line.raw.get("output_config"):
        _write_options(script, command_line)
        return
    command_line = check(script, command_line)
    logs.set_up(command_line.options.console)
    for text in command_line.warnings:
        logger.warning("%s", text)
    for text in command_line.remarks:
        logger.info("%s", text)
    run, *parts = (resolve(path) for path in (script.run, script.family, script.method) if path)
    if script.data is not None:
        parts.append(data_kinds(script.data, command_line.options))
    run(command_line.options, *parts)


def _write_options(script: Script, command_line: CommandLine) -> None:
    name = command_line.raw["config_file"]
    problems = list(command_line.problems)
    if name is None:
        problems.append("--output_config needs --config_file: it names the file to write.")
    if problems:
        raise UserError(problems)
    path = config_path(str(name))
    write_config(path, command_line.raw, {name: spec.default for name, spec in script.options.specs().items()})
    print(f"options written to {path}")


def resolve(dotted_path: str) -> Any:
    """`package.module:name` -> the object of that name."""
    module, _, name = dotted_path.partition(":")
    return getattr(importlib.import_module(module), name)


def _lines(error: Exception) -> Sequence[str]:
    """What to print for a mistake, one line per mistake; a line from another package says where it comes from."""
    if isinstance(error, ModuleNotFoundError):
        return (f"{error}. Install what the scripts need with: python quickstart.py",)
    text = str(error) or type(error).__name__
    worker = list(re.finditer(r"^[\w.]+(?:Error|Exception): ", text, re.MULTILINE)) if "Traceback" in text else []
    if worker:  # a data worker hands its whole traceback over
        text = text[worker[-1].end() :]
    lines = [line for line in text.splitlines() if line.strip()] or [text]
    place = traceback.extract_tb(error.__traceback__)[-1]
    if not worker and not _is_ours(Path(place.filename)):
        name = type(error).__name__
        lines[-1] += f" ({name} in {place.filename}:{place.lineno}; --console_log_level DEBUG shows how it came to it)"
    return lines


def _is_ours(path: Path) -> bool:
    """Whether a source file belongs to this project."""
    root = Path(__file__).resolve().parent.parent
    return path.resolve().is_relative_to(root) and "site-packages" not in path.parts


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that files are closed and temporary files removed."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
