"""From a command line to a running script: parser, `--config_file`, checks, messages, and one place for failures."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from library import logs
from library.options import Options
from library.options.checks import check_options, published_by_wandb
from library.options.declare import OptionSpec
from library.options.errors import UserError
from library.options.not_yet import unsupported
from library.options.script import ScriptOptions
from library.options.toml_file import config_path, nearest, read_config, write_config

logger = logging.getLogger(__name__)

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


@dataclass(frozen=True)
class Script:
    """An entry script. Dotted paths are `module:name`; they are imported only after all options are checked."""

    name: str  # file name, e.g. "train_network.py"
    description: str
    options: ScriptOptions
    family: str
    method: str
    run: str = "library.training_loop:train"


@dataclass(frozen=True)
class Parsed:
    """A command line, its file, and what must be said about them once messages are set up."""

    options: Options
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as UserError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def build_parser(script: Script) -> argparse.ArgumentParser:
    """The script's parser: every option with its type, default and choices."""
    return _make_parser(script, _reader)


def _make_parser(script: Script, reader: Callable[[OptionSpec], Callable[[str], Any]] | None) -> _Parser:
    """`reader` makes argparse's type function of an option; with None every value stays the text that was given."""
    parser = _Parser(prog=script.name, description=script.description, formatter_class=_HelpFormatter)
    for group in script.options.groups:
        section = parser.add_argument_group((group.__doc_title__ if hasattr(group, "__doc_title__") else group.__name__))
        del section
    for spec in script.options.specs().values():
        _add(parser, spec, reader)
    return parser
