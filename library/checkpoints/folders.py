"""Diffusers folders on disk: where a component's weights and settings are, and hub names as local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PICKLE_STEMS = {"model": "pytorch_model"}


def weight_stem(part: str) -> str:
    """The file name, without ending, of a component's weights ("model" for text encoders)."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def part_file(folder: Path, part: str, variant: str | None = None) -> Path:
    """The weights of one component folder: safetensors before pickles, the variant first, whole before sharded.

    Raises FileNotFoundError that lists what was looked for.
    """
    stem = weight_stem(part)
    looked_for = []
    for infix in [f".{variant}"] * bool(variant) + [""]:
        looked_for += [f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"]
        pickled = _PICKLE_STEMS.get(stem, stem)
        looked_for += [f"{pickled}{infix}.bin", f"{pickled}.bin.index{infix}.json"]
    for name in looked_for:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no weights; looked for {', '.join(looked_for)}.")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's settings file; empty if there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def hub_patterns(suffix: str) -> tuple[list[str], list[str]]:
    """(wanted, unwanted) file patterns of a hub model: settings, tokenizers, and weights with this suffix.

    Single-file checkpoints at the root, half-precision copies and parts that are never used are left out.
    """
    weights = [f"{stem}*{suffix}" for stem in ("diffusion_pytorch_model", "*/diffusion_pytorch_model")]
    weights += [f"text_encoder*/{stem}*{suffix}" for stem in ("model", "pytorch_model")]
    unwanted = ["safety_checker/*", "feature_extractor/*", "image_encoder/*", "*.fp16*", "*non_ema*"]
    return [*weights, "*.json", "tokenizer*/*"], unwanted


def hub_folder(name: str, *, option: str) -> Path:
    """A hub model's local folder, downloaded unless it is in the cache; pickles only where there is nothing else.

    Raises FileNotFoundError with the reason.
    """
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"{option} {name}: no such file or folder.")
    try:
        for suffix in (".safetensors", ".bin"):
            wanted, unwanted = hub_patterns(suffix)
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
            if any(folder.rglob(f"diffusion_pytorch_model*{suffix}")):
                break
        return folder
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{option} {name}: no such file or folder, and it could not be fetched from huggingface.co "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'})."
        ) from error
