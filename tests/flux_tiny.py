"""The tiny recorded FLUX: its files, options for it, and its scripts run in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.families.base import Conditioning
from library.families.flux import Flux
from library.models.flux import FluxResiduals
from library.options import Options, make_options
from tests.golden import FOLDER
from tests.training import TOKENIZERS, run_script

MODELS = FOLDER / "models"
TRANSFORMER = MODELS / "flux_tiny.safetensors"
FILES = {
    "ae": MODELS / "flux_ae_tiny.safetensors",
    "clip_l": MODELS / "clip_l_tiny.safetensors",
    "t5xxl": MODELS / "t5xxl_tiny.safetensors",
}
SHORT = {"t5xxl_max_token_length": 24}


def flux_options(**changes: object) -> Options:
    """Options for the tiny model, by option name; None leaves one out."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": str(TRANSFORMER), "tokenizer_cache_dir": str(TOKENIZERS),
        "model_prediction_type": "raw", **{name: str(path) for name, path in FILES.items()}, **changes,
    }  # fmt: skip
    return make_options(**{name: value for name, value in values.items() if value is not None})


def flux_family(**changes: object) -> Flux:
    """The loaded tiny model, float32 on the CPU."""
    family = Flux(flux_options(**changes))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    return family


def dataset(folder: Path, *, subset: str = "") -> Path:
    """A dataset file over the recorded pictures: one bucket of 64 pixels, three batches of two."""
    path = folder / "dataset.toml"
    path.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f"[[datasets.subsets]]\nimage_dir = {str(FOLDER / 'dataset')!r}\n{subset}\n",
        encoding="utf-8",
    )
    return path


def train_flux(script: str, *arguments: str | Path, output_dir: Path, suffix: str = ".safetensors") -> Path:
    """Run `flux_train_network` or `flux_train` on top of small defaults; returns where the result lies."""
    words = [str(word) for word in arguments]
    defaults: dict[str, object] = {
        "--pretrained_model_name_or_path": TRANSFORMER, "--tokenizer_cache_dir": TOKENIZERS, "--seed": 42,
        "--max_data_loader_n_workers": 0, "--learning_rate": "1e-3", "--model_prediction_type": "raw",
        "--guidance_scale": "1.0", **{f"--{name}": path for name, path in FILES.items()},
    }  # fmt: skip
    if script == "flux_train_network":
        defaults |= {"--network_module": "networks.lora_flux", "--network_dim": 2}
    for option, value in defaults.items():
        if option not in words:
            words += [option, str(value)]
    run_script(script, *words, "--output_dir", output_dir, "--output_name", "run")
    return output_dir / f"run{suffix}"


def prediction(family: Flux, *, residuals: FluxResiduals | None = None, **conditioning: Tensor) -> Tensor:
    """Velocity for fixed latents and one caption."""
    x_t = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        text = family.encode_text(family.tokenize(["a cat girl"]))
        chosen = Conditioning({**text.tensors, **conditioning})
        return family.predict(x_t, torch.tensor([400.0]), chosen, residuals=residuals)


def without_guidance(folder: Path) -> Path:
    """The tiny model as schnell is: without the guidance input."""
    path = folder / "schnell.safetensors"
    save_file({k: v for k, v in load_file(TRANSFORMER).items() if not k.startswith("guidance_in.")}, path)
    return path


def problems(**changes: object) -> list[str]:
    """What the family says about these options."""
    return Flux(flux_options(**changes)).check_options()


def load(path: Path, **changes: object) -> Flux:
    """The model at `path`, with short prompts."""
    return flux_family(**SHORT, pretrained_model_name_or_path=str(path), **changes)


NOTHING_ELSE = {"ae": None, "clip_l": None, "t5xxl": None}
