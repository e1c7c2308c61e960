"""Diffusers folders on disk: a component's weights and settings, read and written; hub names as local folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.file_kind import read_json_table
from library.checkpoints.tensors import atomic_write, cast, is_safetensors, save_pickle, save_tensors

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
    shards = sorted(folder.glob(f"{stem}*-00001-of-*.safetensors"))  # also without an index
    if shards:
        return shards[0]
    raise FileNotFoundError(f"{folder} holds no weights; looked for {', '.join(looked_for)}.")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's settings file; empty if there is none."""
    path = folder / name
    return read_json_table(path) if path.is_file() else {}


def hub_patterns(suffix: str, variant: str | None = None) -> tuple[list[str], list[str]]:
    """(wanted, unwanted) file patterns of a hub model: settings, tokenizers, and weights with this suffix.

    Single-file checkpoints at the root, half-precision copies (unless they are the `variant` that is asked for) and
    parts that are never used are left out.
    """
    weights = [f"{stem}*{suffix}" for stem in ("diffusion_pytorch_model", "*/diffusion_pytorch_model")]
    weights += [f"text_encoder*/{stem}*{suffix}" for stem in ("model", "pytorch_model")]
    unwanted = ["safety_checker/*", "feature_extractor/*", "image_encoder/*"]
    unwanted += [f"*.{name}*" for name in ("fp16", "non_ema") if name != variant]
    return [*weights, "*.json", "tokenizer*/*"], unwanted


def hub_folder(name: str, *, option: str, variant: str | None = None, with_weights: bool = True) -> Path:
    """A hub model's local folder, downloaded unless it is in the cache; pickles only where there is nothing else.

    Without weights only settings and tokenizers are fetched. Raises FileNotFoundError with the reason.
    """
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"{option} {name}: no such file or folder.")
    try:
        if not with_weights:
            return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer*/*"]))
        for suffix in (".safetensors", ".bin"):
            wanted, unwanted = hub_patterns(suffix, variant)
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


# --- writing ---------------------------------------------------------------------------------------------------
def module_config(module: Any) -> dict[str, Any]:
    """The config.json of a diffusers module, without what tells where it came from."""
    config = {k: v for k, v in dict(module.config).items() if k not in ("_name_or_path", "_use_default_values")}
    return {"_class_name": type(module).__name__, **config}


def model_index(pipeline: str, components: Mapping[str, tuple[str, str] | None]) -> dict[str, Any]:
    """The model_index.json of a pipeline class: name of each part -> (package, class), or None where it is missing."""
    parts = {name: list(component or (None, None)) for name, component in components.items()}
    return {"_class_name": pipeline, "feature_extractor": [None, None], "image_encoder": [None, None], **parts}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a settings file atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def write_part(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes the weights of one component, safetensors or pickle by the extension; floating ones cast to `dtype`."""
    if is_safetensors(path):
        save_tensors(path, tensors, metadata={"format": "pt"}, dtype=dtype)
    else:
        save_pickle(path, {k: cast(tensors[k].detach(), dtype=dtype, device="cpu").clone() for k in tensors})
