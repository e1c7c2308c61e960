"""The tiny recorded SD3 model: its files, options that name them, its family loaded, whole files made of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.families.sd3 import StableDiffusion3
from library.options import Options, make_options
from tests.golden import FOLDER

MODELS = FOLDER / "models"
FILES: dict[str, Path] = {
    "pretrained_model_name_or_path": MODELS / "sd3_tiny.safetensors",
    "clip_l": MODELS / "clip_l_tiny.safetensors",
    "clip_g": MODELS / "clip_g_tiny.safetensors",
    "t5xxl": MODELS / "t5xxl_tiny.safetensors",
    "tokenizer_cache_dir": FOLDER / "tokenizers",
}
CAPTIONS = ["a small boat on the lake", "portrait of a girl, smiling, (bright:1.2) eyes"]


def tiny_options(**changes: Any) -> Options:
    """Options for the tiny files; None leaves one out."""
    given = {name: str(path) for name, path in FILES.items()} | changes
    return make_options(**{name: value for name, value in given.items() if value is not None})


def tiny_family(dtype: torch.dtype = torch.float32, **changes: Any) -> StableDiffusion3:
    """The loaded family."""
    family = StableDiffusion3(tiny_options(**changes))
    family.load(weight_dtype=dtype, vae_dtype=dtype, device="cpu")
    return family


def whole_file(path: Path, *names: str, factor: float = 1.0) -> Path:
    """The tiny model with text encoders `names` inside, as all-in-one files hold them; theirs are scaled."""
    tensors: dict[str, Tensor] = load_file(FILES["pretrained_model_name_or_path"])
    for name in names:
        own = load_file(FILES[name])
        tensors |= {f"text_encoders.{name}.transformer.{key}": value * factor for key, value in own.items()}
    save_file(tensors, path)
    return path


def denoiser_inputs(family: StableDiffusion3, *, size: int = 8) -> dict[str, Tensor]:
    """Latents [2,16,size,size], timesteps and random text for `predict`."""
    generator = torch.Generator().manual_seed(4)
    parameters = family.denoiser.params
    return {
        "x_t": torch.randn(2, 16, size, size, generator=generator),
        "timesteps": torch.tensor([20.0, 871.0]),
        "context": torch.randn(2, 9, parameters.context_size, generator=generator),
        "vector": torch.randn(2, parameters.vector_size, generator=generator),
    }
