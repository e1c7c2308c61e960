"""Where a dataset configuration comes from: a TOML or JSON file, or the folders named on the command line."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from library.config_schema import KEYS, ConfigError, SupportedKinds, shown_key
from library.options import Options
from library.options.toml_text import decoded, parsed

logger = logging.getLogger(__name__)

IGNORED_WITH_FILE = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


def read_dataset_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.toml` or `.json` dataset file (UTF-8, byte-order mark allowed).

    Raises ConfigError that names the file: it is missing, has another suffix, or cannot be parsed.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError([f"--dataset_config {path}: there is no such file"])
    suffix = file.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise ConfigError([f"--dataset_config {path}: the file name must end in .toml or .json"])
    text = _read_text(file)
    try:
        content = parsed(text) if suffix == ".toml" else json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ConfigError([f"{path}: the file is not valid {suffix[1:].upper()}: {_reason(error, text)}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: lists and tables are nested too deeply to be `general` or `datasets`"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: the file must hold a table with the keys `general` and `datasets`"])
    _refuse_options(content, path)
    return content


def _refuse_options(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """A file with options of the command line instead of datasets is one mistake, not one per key."""
    if "datasets" in content:
        return
    tables = [value for value in content.values() if isinstance(value, dict)]
    known = Options.specs()
    options = [key for table in (content, *tables) for key in table if key in known and key not in KEYS]
    if options:
        raise ConfigError([
            f"--dataset_config {path}: the file holds options ({', '.join(options[:3])}): give it as --config_file "
            f"{path}; a dataset file has [general] and [[datasets]]"
        ])  # fmt: skip


def _read_text(file: Path) -> str:
    try:
        return decoded(file.read_bytes())
    except OSError as error:
        raise ConfigError([f"--dataset_config {file}: the file cannot be read ({error.strerror})"]) from error
    except ValueError as error:
        raise ConfigError([f"{file}: {error}"]) from error


def _reason(error: ValueError, text: str) -> str:
    """A parser's message with the line that it may lack."""
    too_long = re.search(r"\d[\d_]{4000,}", text) if "digits" in str(error) else None
    if too_long:
        return f"a number with too many digits (line {text.count(chr(10), 0, too_long.start()) + 1})"
    return str(error).replace("at end of document", f"at the end, line {text.count(chr(10)) + 1}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"repeated key: {', '.join(map(shown_key, repeated))}")
    return dict(pairs)


def warn_about_ignored_options(options: Any) -> None:
    """One warning that lists the folder options that a dataset file replaces."""
    given = [f"--{name}" for name in IGNORED_WITH_FILE if getattr(options, name, None)]
    if given:
        logger.warning("%s ignored because --dataset_config is given", ", ".join(given))


def folder_configuration(options: Any, supported: SupportedKinds) -> tuple[dict[str, Any], str]:
    """What the folder options describe, in the form of a dataset file, and the words that name this source.

    Raises ConfigError when the options do not name training data.
    """
    if supported.kinds() == ("controlnet",):
        subsets, source = _conditioning_subset(options), f"--train_data_dir {options.train_data_dir}"
    else:
        _refuse_mask_without_file(options)
        if supported.fine_tuning and (getattr(options, "in_json", None) or not supported.dreambooth):
            subsets, source = _metadata_subset(options), f"--in_json {options.in_json}"
        else:
            subsets, source = _named_folder_subsets(options), f"--train_data_dir {options.train_data_dir}"
    return {"datasets": [{"subsets": subsets}]}, source


def _refuse_mask_without_file(options: Any) -> None:
    has_mask_folder = bool(getattr(options, "conditioning_data_dir", None))
    if getattr(options, "masked_loss", False) and (has_mask_folder or not getattr(options, "alpha_mask", False)):
        raise ConfigError(
            ["--masked_loss without a config file needs --alpha_mask; mask images need --dataset_config"]
        )


def _conditioning_subset(options: Any) -> list[dict[str, Any]]:
    missing = [name for name in ("train_data_dir", "conditioning_data_dir") if not getattr(options, name, None)]
    if missing:
        raise ConfigError(
            [f"no training data: give --dataset_config, or {' and '.join('--' + name for name in missing)}"]
        )
    subset = {"image_dir": options.train_data_dir, "conditioning_data_dir": options.conditioning_data_dir}
    return [subset | {"num_repeats": 1}]  # explicit, so that --dataset_repeats has no effect here


def _metadata_subset(options: Any) -> list[dict[str, Any]]:
    if not getattr(options, "in_json", None):
        raise ConfigError(["no training data: give --dataset_config, or --in_json with a metadata file"])
    if getattr(options, "color_aug", False) or getattr(options, "random_crop", False):
        logger.warning("--color_aug and --random_crop change images, so latents for --in_json cannot be cached")
    subset = {"metadata_file": options.in_json}
    if getattr(options, "train_data_dir", None):
        subset["image_dir"] = options.train_data_dir
    return [subset]


def _named_folder_subsets(options: Any) -> list[dict[str, Any]]:
    train_dir = getattr(options, "train_data_dir", None)
    reg_dir = getattr(options, "reg_data_dir", None)
    if not train_dir:
        raise ConfigError(["no training data: give --dataset_config, or --train_data_dir"])
    problems = [
        f"--{name} {folder}: there is no such directory"
        for name, folder in (("train_data_dir", train_dir), ("reg_data_dir", reg_dir))
        if folder and not os.path.isdir(folder)
    ]
    if problems:
        raise ConfigError(problems)
    training = _subsets_of(train_dir, is_reg=False)
    if not training:
        raise ConfigError(
            f"No data found in --train_data_dir {train_dir}: it must contain directories named "
            "<repeats>_<class words>, for example `10_sks dog`, which hold the images"
        )
    return training + (_subsets_of(reg_dir, is_reg=True) if reg_dir else [])


def _subsets_of(folder: str, *, is_reg: bool) -> list[dict[str, Any]]:
    subsets = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        path = os.path.join(folder, name)
        repeats_text, _, class_tokens = name.partition("_")
        try:
            repeats = int(repeats_text)
        except ValueError:
            logger.warning("%s ignored: its name does not begin with a number of repeats, like `10_sks dog`", path)
            continue
        if repeats < 1:
            logger.warning("%s ignored: its number of repeats is below 1", path)
            continue
        if not class_tokens:
            logger.warning("%s names no class: images in it without a caption file get an empty caption", path)
        subsets.append(
            {"image_dir": path, "num_repeats": repeats, "is_reg": is_reg, "class_tokens": class_tokens}
        )
    return subsets
