"""VAEs of all families as diffusers' `AutoencoderKL`: from files of either layout, Diffusers folders and hub names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import layout_vae
from library.checkpoints.folders import hub_folder, part_file, read_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.recognition import check_not_quantised, is_ignorable
from library.checkpoints.stored import fill_from_file
from library.checkpoints.tensors import LazyTensors, RenamedTensors, open_tensors, select, shapes_of

SCALING_FACTOR = 0.18215
_SETTINGS = ("scaling_factor", "shift_factor", "force_upcast", "sample_size")


def build_vae(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    latent_channels: int = 4,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """diffusers' AutoencoderKL for tensors in diffusers layout; sizes come from shapes.

    `config` gives what shapes cannot tell (scaling_factor, shift_factor, force_upcast, sample_size).
    Raises ValueError if the VAE has another number of latent channels.
    """
    from diffusers import AutoencoderKL

    require_channels(tensors, latent_channels)
    with naming_file(tensors), torch.device("meta"):
        arguments = layout_vae.vae_config(shapes_of(tensors), scaling_factor=SCALING_FACTOR)
        arguments.update({k: v for k, v in (config or {}).items() if k in _SETTINGS})
        vae = AutoencoderKL(**arguments)
    fill_from_file(vae, tensors, component="VAE", dtype=dtype, device=device)
    vae.weights_digest = _encoder_digest(tensors)
    return vae.eval().requires_grad_(False)


def require_channels(tensors: Mapping[str, Tensor], wanted: int) -> None:
    """Raises ValueError unless a VAE in diffusers layout has this number of latent channels; reads shapes only."""
    with naming_file(tensors):
        found = layout_vae.vae_config(shapes_of(tensors))["latent_channels"]
    if found != wanted:
        source = getattr(tensors, "source", "the given tensors")
        raise ValueError(f"{source}: this VAE has {found} latent channels, the model needs {wanted}.")


def _encoder_digest(tensors: Mapping[str, Tensor]) -> str:
    """What identifies a VAE to latent caches: a hash of its encoder as stored, whatever dtype it runs in."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if key.startswith(("encoder.", "quant_conv.")):
            flat = tensors[key].detach().contiguous().reshape(-1).cpu()
            digest.update(key.encode() + str(flat.dtype).encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def load_vae(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    latent_channels: int = 4,
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
    option: str = "--vae",
) -> Any:
    """What `option` names: a VAE or full-model file of either layout, a Diffusers folder (or its `vae/`), a hub name.

    `variant` of a folder's weight file is preferred to the plain one.
    """
    location = Path(path)
    if location.is_file():
        tensors = vae_part(open_tensors(location), option=option)
        return build_vae(tensors, dtype=dtype, device=device, latent_channels=latent_channels, config=config)
    if not location.is_dir():
        location = hub_folder(str(path), option=option, variant=variant)
    folder = location / "vae" if (location / "vae").is_dir() else location
    tensors = layout_vae.to_diffusers(open_tensors(part_file(folder, "vae", variant)))
    settings = {**read_config(folder), **(config or {})}
    return build_vae(tensors, dtype=dtype, device=device, latent_channels=latent_channels, config=settings)


def vae_part(tensors: LazyTensors, *, option: str = "--vae") -> RenamedTensors:
    """The VAE inside a file of any kind (bare, prefixed, inside a full model), in diffusers layout."""
    check_not_quantised(tensors.shapes, source=tensors.source)
    for prefix in layout_vae.VAE_PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            return layout_vae.to_diffusers(select(tensors, prefix))
    plan = {key: (key, None) for key in tensors if not is_ignorable(key)}
    part = layout_vae.to_diffusers(RenamedTensors(tensors, plan))
    if not layout_vae.level_count(part.shapes):
        raise ValueError(f"{option} {tensors.source} holds no VAE (keys: {', '.join(list(tensors)[:5])}).")
    return part
