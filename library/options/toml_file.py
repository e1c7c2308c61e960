"""Options in a TOML file: `--config_file` reads them, `--output_config` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options.declare import OptionSpec
from library.options.errors import UserError
from library.options.suggestions import meaning
from library.options.toml_text import read_toml

NEVER_WRITTEN = frozenset({"config_file", "output_config", "wandb_api_key", "huggingface_token"})


@dataclass(frozen=True)
class ConfigFile:
    """What a file gives: values by option name, mistakes, and remarks; one sentence each."""

    values: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def config_path(name: str) -> Path:
    """The file that `--config_file NAME` means: `.toml` is added when missing."""
    return Path(name if name.endswith(".toml") else name + ".toml")


def read_config(path: Path, specs: Mapping[str, OptionSpec], script: str) -> ConfigFile:
    """The options in a TOML file. Tables are flattened; their names mean nothing.

    `script` is the name of the script whose options `specs` are. Raises UserError if the file is missing or is no
    TOML. Unknown keys give one warning, bad values one problem each.
    """
    try:
        content = read_toml(path)
    except FileNotFoundError:
        raise UserError(f"--config_file: there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config_file: {path} cannot be read as TOML: {error}") from error
    if isinstance(content.get("datasets"), list):
        raise UserError(
            f"--config_file: {path} is a dataset file ([[datasets]]): give it as --dataset_config {path}; "
            "--config_file names a file with options."
        )
    values: dict[str, Any] = {}
    problems: list[str] = []
    unknown: list[str] = []
    for key, value in _flattened(content, specs):
        if key not in specs:
            unknown.append(key)
            continue
        if specs[key].means_nothing(value):
            continue
        try:
            values[key] = specs[key].read_value(value)
            specs[key].check_choice(values[key])
        except ValueError as error:
            problems.append(f"{path}: {key}: {error}.")
    return ConfigFile(values, tuple(problems), _unknown_keys_warning(path, unknown, specs, script))


def _flattened(content: Mapping[str, Any], specs: Mapping[str, OptionSpec]) -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and key not in specs:
            yield from _flattened(value, specs)
        else:
            yield key, value


def _unknown_keys_warning(
    path: Path, unknown: list[str], specs: Mapping[str, OptionSpec], script: str
) -> tuple[str, ...]:
    if not unknown:
        return ()
    words = []
    for key in dict.fromkeys(unknown):
        phrase = meaning(key, specs, script, dashes="")
        words.append(f"{key} ({phrase})" if phrase else key)
    return (f"{path}: this script has no option of these names, they have no effect: {', '.join(words)}",)


def write_config(path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Write the options that differ from their default, flat, as UTF-8. Raises UserError if the file exists."""
    if path.exists():
        raise UserError(f"--output_config: {path} exists already; give another --config_file or remove it")
    lines = [
        f"{name} = {_toml(value)}\n"
        for name, value in values.items()
        if value is not None and value != defaults[name] and name not in NEVER_WRITTEN
    ]
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--output_config: {path} cannot be written: {error.strerror}") from error


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
