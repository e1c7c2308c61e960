"""The family of a tool that serves all of them: what its options say."""

from __future__ import annotations

import torch

from library.families.base import ModelFamily
from library.families.flux import Flux
from library.families.minimal import wide_dtype
from library.families.sd import StableDiffusion
from library.families.sd3 import StableDiffusion3
from library.families.sdxl import StableDiffusionXL
from library.model_files import VAE
from library.options import Options, make_options


def of_options(options: Options) -> ModelFamily:
    """SDXL with `--sdxl`, FLUX.1 with `--flux`, Stable Diffusion 3 with `--sd3`, otherwise Stable Diffusion 1 or 2."""
    chosen = options.cached_family
    if chosen.sdxl:
        return StableDiffusionXL(options)
    if chosen.flux:
        flux = Flux(options)
        if options.encoders.t5xxl_dtype:
            flux.encoder_dtypes = {"t5xxl": wide_dtype(options.encoders.t5xxl_dtype, "--t5xxl_dtype")}
        return flux
    return StableDiffusion3(options) if chosen.sd3 else StableDiffusion(options)


def of_vae(path: str, *, option: str, dtype: torch.dtype, device: torch.device | str) -> ModelFamily:
    """Stable Diffusion 1 or 2 with the VAE of a file, folder or hub name and nothing else."""
    family = StableDiffusion(make_options())
    family.parts = frozenset({VAE})
    family.load_vae_alone(path, option=option, dtype=dtype, device=device)
    return family
