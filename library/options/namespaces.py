"""Options as other programs hold them: a namespace that argparse filled, completed by its `--config_file`."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from library.options import option_specs
from library.options.checks import published_by_wandb
from library.options.errors import UserError
from library.options.toml_file import config_path, read_config, write_config

logger = logging.getLogger(__name__)


def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """`args` completed by the file of `--config_file`: what stands on the command line wins over the file.

    The words that the parser has read last are read once more, on top of the file's values. With `--output_config`
    the options are written instead, and SystemExit(0) is raised. Raises UserError for a file that cannot be used.
    """
    if not getattr(args, "config_file", None):
        return args
    path = config_path(str(args.config_file))
    if getattr(args, "output_config", False):
        defaults = {action.dest: action.default for action in parser._actions}
        write_config(path, {name: vars(args)[name] for name in vars(args) if name in defaults}, defaults)
        logger.info("options written to %s", path)
        raise SystemExit(0)
    known = {action.dest for action in parser._actions} - {"config_file", "output_config"}
    file = read_config(path, {name: spec for name, spec in option_specs().items() if name in known}, parser.prog)
    for text in file.warnings:
        logger.warning("%s", text)
    if file.problems:
        raise UserError(file.problems)
    words: Any = getattr(parser, "words", None)
    completed = parser.parse_args(words, argparse.Namespace(**file.values))
    completed.config_file = str(path.with_suffix(""))
    return completed


def verify_command_line_training_args(args: argparse.Namespace) -> None:
    """Warn about secrets and private paths on a command line that Weights & Biases would publish."""
    given = {name: value for name, value in vars(args).items() if name in option_specs()}
    for text in (text for texts in published_by_wandb(given) for text in texts):
        logger.warning("%s", text)
