"""Loading the parts of FLUX.1 under names that other programs import; `flux_model_util` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from library.encoder_files import EncoderKind, find_encoder
from library.flux_model_util import CLIP_L, T5XXL, FluxLoadSpec, load_autoencoder, load_model
from library.model_files import DENOISER
from library.models.flux import Flux

Device = torch.device | str


def load_flow_model(
    ckpt_path: str | Path, dtype: torch.dtype | None, device: Device, disable_mmap: bool = False
) -> tuple[bool, Flux]:
    """(is it of the schnell type, transformer) of a file or folder; files are never mapped, whatever is asked for."""
    modules = load_model(FluxLoadSpec(str(ckpt_path), dtype, device=device, parts=frozenset({DENOISER})))
    return modules.facts.is_schnell, modules.transformer


def load_ae(ckpt_path: str | Path, dtype: torch.dtype | None, device: Device, disable_mmap: bool = False) -> Any:
    """The autoencoder of a file or folder."""
    return load_autoencoder(ckpt_path, dtype=dtype, device=device, option="--ae")


def load_clip_l(ckpt_path: str | Path, dtype: torch.dtype | None, device: Device, disable_mmap: bool = False) -> Any:
    """The CLIP-L text encoder of a file or folder."""
    return _load_encoder(CLIP_L, ckpt_path, dtype, device)


def load_t5xxl(ckpt_path: str | Path, dtype: torch.dtype | None, device: Device, disable_mmap: bool = False) -> Any:
    """The T5-XXL text encoder of a file or folder."""
    return _load_encoder(T5XXL, ckpt_path, dtype, device)


def _load_encoder(kind: EncoderKind, path: str | Path, dtype: torch.dtype | None, device: Device) -> Any:
    source = find_encoder(kind, str(path), Path(path), None)
    if source is None:
        raise FileNotFoundError(f"{path} holds no {kind.name}.")
    return source.build(dtype=dtype, device=device)
