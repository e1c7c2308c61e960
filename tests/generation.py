"""Runs `gen_img_diffusers.py` and `gen_img.py` inside the test process, on the tiny recorded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tests.training import MODEL, TOKENIZERS, clean_process

SMALL = {"--ckpt": MODEL, "--tokenizer_cache_dir": TOKENIZERS, "--W": "64", "--H": "64", "--steps": "2"}


def generate(*arguments: str | Path, outdir: Path, script: str = "gen_img_diffusers") -> list[Path]:
    """Draw with the given options on top of small defaults; returns the files that are new, in order of writing."""
    import importlib

    from library import launch

    words = [str(word) for word in arguments]
    for option, value in SMALL.items():
        if option not in words:
            words += [option, str(value)]
    before = set(outdir.rglob("*")) if outdir.is_dir() else set()
    with clean_process():
        launch.main(importlib.import_module(script).SCRIPT, [*words, "--outdir", str(outdir)])
    files = [path for path in outdir.rglob("*") if path.is_file() and path not in before] if outdir.is_dir() else []
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def texts_of(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file."""
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


def pixels_of(path: Path) -> torch.Tensor:
    """float32 [H,W,3] in [0,1]."""
    import numpy as np

    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).astype("float32") / 255)


def difference(one: Path, other: Path) -> int:
    """Largest difference of two pictures' pixels, in levels of 255."""
    return round(float((pixels_of(one) - pixels_of(other)).abs().max()) * 255)


def write_lora(path: Path, *, scale: float = 0.3, seed: int = 0, layers: Sequence[str] = ("",)) -> Path:
    """A LoRA with random weights for the tiny model, for all layers whose names contain one of `layers`."""
    from safetensors.torch import save_file

    from library.model_util import load_checkpoint
    from networks import lora

    host = load_checkpoint(MODEL, v2=False, dtype=torch.float32)
    network = lora.create_network(1.0, 2, 2, host.vae, host.text_encoder, host.unet)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: value if name.endswith("alpha") else torch.randn(value.shape, generator=generator) * scale
        for name, value in network.state_dict().items()
        if any(part in name for part in layers)
    }
    save_file(state, path, {"ss_network_module": "networks.lora"})
    return path
