"""Reads the recorded files of other programs and makes small runs of them: tiny models, small pictures, two steps.

A file has parts; each begins with a line `# what it is`. Only paths, sizes, counts and fp16 are replaced.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from library.options.toml_file import _toml
from tests.flux_tiny import FILES as FLUX_FILES
from tests.flux_tiny import TRANSFORMER
from tests.sdxl_tiny import MODEL as SDXL
from tests.training import MODEL, PHOTOS, TOKENIZERS

FOLDER = Path(__file__).parent / "data" / "real_commands"
_PARTS = {
    "argv": r"# argv",
    "config": r"# (the file named by --config_file|the TOML:|(training_config|config|default)\.toml)",
    "dataset": r"# dataset(_config)?\.toml",
    "prompts": r"# the prompt file",
}


@dataclass(frozen=True)
class ClientFile:
    """What a program sends: script, words after it, options of its `--config_file` and its dataset file."""

    script: str
    words: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    prompts: str = "a cat --w 64 --h 64 --s 1"


def sections(name: str) -> dict[str, str]:
    """The parts of a file by their kind."""
    found: dict[str, list[str]] = {}
    kind = ""
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if line.startswith("#"):
            kind = next((key for key, pattern in _PARTS.items() if re.match(pattern, line)), "")
        elif kind:
            found.setdefault(kind, []).append(line)
    return {kind: "\n".join(lines) for kind, lines in found.items()}


def command_lines(name: str) -> list[tuple[str, list[str]]]:
    """(script, the words after it) of every command of a file."""
    text = re.sub(r"\\\s*(\n\s*|$)", " ", sections(name)["argv"])
    commands = []
    for words in (shlex.split(line) for line in text.splitlines() if line.strip()):
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        commands.append((words[place], words[place + 1 :]))
    return commands


@cache
def client_file(name: str) -> ClientFile:
    """The training that a file describes."""
    parts = sections(name)
    [(script, words)] = command_lines(name)
    config, dataset = (tomllib.loads(parts.get(kind, "")) for kind in ("config", "dataset"))
    return ClientFile(Path(script).stem.removesuffix("_wrapper"), words, config, dataset, parts.get("prompts", ""))


# --- the small run -----------------------------------------------------------------------------------------------
def small_run(name: str, folder: Path, **changes: Any) -> list[str]:
    """The command line of a file's small run in `folder`; `changes` replace or (None) leave out options of the file."""
    sent = client_file(name)
    replace = _replacements(folder, sent)
    replace |= {key: (lambda _, value=value: value) for key, value in changes.items()}
    words = _small_words(sent.words, replace)
    if sent.config:
        content = _small_table(sent.config, replace)
        path = folder / "config.toml"
        path.write_text("".join(_lines(content)), "utf-8")
        words += ["--config_file", str(path)]
    if any(word.startswith("--dataset_config") for word in sent.words):
        content = sent.dataset or {"datasets": [{"resolution": 128, "subsets": [{"image_dir": ""}]}]}
        words += ["--dataset_config", str(_small_dataset(content, folder))]
    elif "min_bucket_reso" not in _flat(sent.config) and "--min_bucket_reso" not in words:
        words += ["--min_bucket_reso", "64"]
    if "--max_train_steps" not in words and "max_train_steps" not in _flat(sent.config):
        words += ["--max_train_steps", "2"]
    return [*words, "--tokenizer_cache_dir", str(TOKENIZERS)]


def _replacements(folder: Path, sent: ClientFile) -> dict[str, Callable[[Any], Any]]:
    family = sent.script.split("_")[0]
    model = {"sdxl": SDXL, "flux": TRANSFORMER}.get(family, MODEL)
    prompts = folder / "prompts.txt"
    prompts.write_text(re.sub(r"--([whs]) +\d+", r"--\1 64", sent.prompts).replace("--s 64", "--s 1"), "utf-8")
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": model, "vae": _vae(folder), "output_dir": folder / "out",
        "logging_dir": folder / "logs", "sample_prompts": prompts, "train_data_dir": folder / "data",
        "reg_data_dir": folder / "reg", "train_batch_size": 2, "max_train_steps": 2, "max_train_epochs": None,
        "max_data_loader_n_workers": 0, "mixed_precision": "bf16", "bucket_reso_steps": 64, "min_bucket_reso": 64,
        "max_bucket_reso": 256, "config_file": None, "dataset_config": None, **FLUX_FILES,
    }  # fmt: skip
    _photos(folder / "data" / "4_photos")
    _photos(folder / "reg" / "1_photo")
    replace: dict[str, Callable[[Any], Any]] = {
        name: (lambda old, value=value: value if old != "" else old) for name, value in values.items()
    }
    replace["resolution"] = lambda _: "128,128"
    return replace


def _small_words(words: list[str], replace: Mapping[str, Callable[[Any], Any]]) -> list[str]:
    """Options of a command line, written as `--name value` or `--name=value`, with replaced values."""
    kept: list[str] = []
    pieces = [piece for word in words for piece in (word.split("=", 1) if re.match(r"--\w+=", word) else [word])]
    for index, piece in enumerate(pieces):
        before = pieces[index - 1].removeprefix("--") if index and pieces[index - 1].startswith("--") else ""
        if piece.startswith("--") and piece[2:] in replace and replace[piece[2:]]("x") is None:
            continue
        if not piece.startswith("--") and before in replace:
            if replace[before](piece) is not None:
                kept.append(str(replace[before](piece)))
        else:
            kept.append(piece)
    return kept


def _small_table(table: dict[str, Any], replace: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in table.items():
        new = _small_table(value, replace) if isinstance(value, dict) else replace.get(key, lambda old: old)(value)
        if new is not None and key not in ("full_fp16", "full_bf16"):
            small[key] = str(new) if isinstance(new, Path) else new
        elif new:
            small["full_bf16"] = True
    return small


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    return plain | {key: value for part in table.values() if isinstance(part, dict) for key, value in part.items()}


def _lines(table: dict[str, Any]) -> list[str]:
    lines = [f"{key} = {_toml(value)}\n" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{key}]\n", *_lines(value)]
    return lines


def _small_dataset(content: dict[str, Any], folder: Path) -> Path:
    """The dataset file with small sizes and the photographs."""
    sizes = {"resolution": 128, "min_bucket_reso": 64, "max_bucket_reso": 256}
    path = folder / "dataset.toml"

    def level(table: dict[str, Any]) -> str:
        values = {key: sizes.get(key, value) for key, value in table.items() if not isinstance(value, list | dict)}
        values |= {key: sizes[key] for key in table if key in sizes}
        values |= {"image_dir": str(folder / "data" / "4_photos")} if "image_dir" in table else {}
        return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())

    lines = ["[general]\n", level(content.get("general", {}))]
    for dataset in content["datasets"]:
        lines += ["[[datasets]]\n", level(dataset)]
        for subset in dataset["subsets"]:
            lines += ["[[datasets.subsets]]\n", level(subset)]
    path.write_text("".join(lines), "utf-8")
    return path


def _photos(folder: Path) -> None:
    """Two photographs with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in PHOTOS.iterdir():
        if path.stem in ("cat", "coffee"):
            shutil.copy(path, folder)


def _vae(folder: Path) -> Path:
    """The tiny SDXL's VAE as a file of its own."""
    path, prefix = folder / "vae.safetensors", "first_stage_model."
    tensors = load_file(SDXL)
    save_file({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}, path)
    return path
