"""SDXL models: files, Diffusers folders and hub names -> modules, and modules -> files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library import model_files
from library.checkpoints import layout_sdxl, layout_unet
from library.checkpoints.folders import part_file, read_config
from library.checkpoints.recognition import ModelKind, recognise, require_kind
from library.checkpoints.stored import weights_of
from library.checkpoints.tensors import LazyTensors, open_tensors
from library.model_files import (
    DENOISER,
    TEXT,
    V_PREDICTION_MARKER,
    VAE,
    ZERO_TERMINAL_SNR_MARKER,
    LoadSpec,
    PipelineFolder,
    RecordedNoise,
    locate,
    recorded_noise,
    scheduler_config,
)
from library.models.text_encoders import ClipTextEncoder, build_clip
from library.models.unet_sdxl import SIZE_COUNT, SdxlUNet2DConditionModel, build_sdxl_unet
from library.models.vae import build_vae, load_vae
from library.text.clip import ClipTokenizer

__all__ = [
    "LoadSpec", "SdxlModules", "load_checkpoint", "load_model", "model_metadata", "save_checkpoint",
    "save_diffusers_folder", "scheduler_config",
]  # fmt: skip

#: what shapes cannot tell about SDXL's VAE; the factor holds for every VAE that takes its place
VAE_SETTINGS: Mapping[str, Any] = {"scaling_factor": 0.13025, "force_upcast": True}
_FOLDER_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass
class SdxlModules:
    """A loaded model. `source` is the checkpoint file or folder; `is_single_file` says which of the two."""

    text_encoder1: ClipTextEncoder
    text_encoder2: ClipTextEncoder  # with projection
    vae: Any  # diffusers AutoencoderKL
    unet: SdxlUNet2DConditionModel
    source: Path
    is_single_file: bool
    recorded: RecordedNoise = RecordedNoise()  # what the source says


# --- loading ---------------------------------------------------------------------------------------------------
def load_model(spec: LoadSpec) -> SdxlModules:
    """A checkpoint file, a Diffusers folder or a hub name -> modules in eval mode without gradients.

    Raises FileNotFoundError or ValueError that names the file, the component and the keys.
    """
    path = locate(spec)
    return _load_file(path, spec) if path.is_file() else _load_folder(path, spec)


def load_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vae: str | None = None,
) -> SdxlModules:
    """A single checkpoint file, a folder or a hub name -> modules, all in `dtype` (None: as stored)."""
    return load_model(LoadSpec(str(path), dtype=dtype, vae_dtype=dtype, device=device, vae=vae))


def _load_file(path: Path, spec: LoadSpec) -> SdxlModules:
    file = open_tensors(path)
    layout_sdxl.check_file(file, option=spec.option)
    tensors = layout_sdxl.normalize(file)
    layout_sdxl.warn_of_foreign_keys(tensors)
    text1, text2 = layout_sdxl.text1_tensors(tensors), layout_sdxl.text2_tensors(tensors)
    for number, part in ((1, text1), (2, text2)):
        if not part and TEXT in spec.parts:
            raise ValueError(f"{path} holds no text encoder {number}; a complete checkpoint is needed.")
    vae_part = layout_sdxl.vae_tensors(tensors)
    if not vae_part and not spec.vae and VAE in spec.parts:
        raise ValueError(f"{path} holds no VAE: one must come from --vae, or with a complete checkpoint.")
    return SdxlModules(
        text_encoder1=spec.part(TEXT, lambda: _build_text(text1, spec, activation="quick_gelu", number=1)),
        text_encoder2=spec.part(TEXT, lambda: _build_text(text2, spec, activation="gelu", number=2)),
        vae=spec.part(VAE, lambda: load_vae(
            spec.vae, dtype=spec.vae_dtype, device=spec.device, config=VAE_SETTINGS
        ) if spec.vae else build_vae(vae_part, dtype=spec.vae_dtype, device=spec.device, config=VAE_SETTINGS)),
        unet=spec.part(DENOISER, lambda: build_sdxl_unet(
            layout_sdxl.unet_tensors(tensors), dtype=spec.dtype, device=spec.device
        )),
        source=path,
        is_single_file=True,
        recorded=RecordedNoise("v", ZERO_TERMINAL_SNR_MARKER in file) if V_PREDICTION_MARKER in file
        else recorded_noise(path),
    )  # fmt: skip


def _build_text(tensors: Mapping[str, Tensor], spec: LoadSpec, *, activation: str, number: int) -> ClipTextEncoder:
    return build_clip(
        tensors, activation=activation, component=f"text encoder {number}", dtype=spec.dtype, device=spec.device
    )


def _load_folder(folder: Path, spec: LoadSpec) -> SdxlModules:
    if not (folder / "text_encoder_2").is_dir() and (folder / "text_encoder").is_dir():
        require_kind(_kind_of_folder(folder, spec), ModelKind.SDXL, source=spec.path, option=spec.option)
    variant = model_files.check_folder(folder, spec, _FOLDER_PARTS)
    unet_tensors = _folder_unet(folder, variant)
    require_kind(_kind(unet_tensors), ModelKind.SDXL, source=spec.path, option=spec.option)
    config = read_config(folder / "unet")
    return SdxlModules(
        text_encoder1=spec.part(TEXT, lambda: model_files.clip_of_folder(
            folder, "text_encoder", spec, activation="quick_gelu", variant=variant
        )),
        text_encoder2=spec.part(TEXT, lambda: model_files.clip_of_folder(
            folder, "text_encoder_2", spec, activation="gelu", variant=variant
        )),
        vae=spec.part(VAE, lambda: load_vae(
            spec.vae or folder, dtype=spec.vae_dtype, device=spec.device, variant=variant, config=VAE_SETTINGS
        )),
        unet=spec.part(DENOISER, lambda: build_sdxl_unet(
            unet_tensors, dtype=spec.dtype, device=spec.device,
            heads=config.get("num_attention_heads") or config.get("attention_head_dim"),
        )),
        source=folder,
        is_single_file=False,
        recorded=recorded_noise(folder),
    )  # fmt: skip


def _folder_unet(folder: Path, variant: str | None) -> LazyTensors:
    """A folder's U-Net under original names, with linear projections."""
    tensors = open_tensors(part_file(folder / "unet", "unet", variant))
    return layout_unet.to_original(tensors, linear_projection=True)


def _kind_of_folder(folder: Path, spec: LoadSpec) -> ModelKind:
    return _kind(_folder_unet(folder, spec.variant)) if (folder / "unet").is_dir() else ModelKind.UNKNOWN


def _kind(unet: LazyTensors) -> ModelKind:
    return recognise(unet.shapes)


# --- saving ----------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: str | Path,
    modules: SdxlModules,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: tuple[int, int] = (0, 0),
) -> None:
    """Writes a single file, safetensors or pickle by its extension, atomically.

    Component tensors are cast to `dtype` if given; what else the source checkpoint holds (markers such as `v_pred`)
    keeps its bits. `counters` = (epochs, steps) of this run, added to those of a pickled source.
    """
    source = open_tensors(modules.source) if modules.is_single_file and modules.source.is_file() else None
    has_scale = source is not None and layout_sdxl.LOGIT_SCALE in source
    tensors = layout_sdxl.to_single_file(
        weights_of(modules.unet), weights_of(modules.text_encoder1), weights_of(modules.text_encoder2),
        weights_of(modules.vae), logit_scale=source[layout_sdxl.LOGIT_SCALE] if source and has_scale else None,
    )  # fmt: skip
    if source is not None:
        tensors.update(layout_sdxl.preserved_tensors(source, tensors))
        counters = model_files.total_counters(modules.source, counters)
    model_files.write_single_file(
        path, tensors, components=layout_sdxl.COMPONENT_PREFIXES, dtype=dtype, metadata=metadata, counters=counters
    )


def save_diffusers_folder(
    folder: str | Path,
    modules: SdxlModules,
    *,
    v_parameterization: bool,
    dtype: torch.dtype | None = None,
    use_safetensors: bool = True,
    tokenizers: tuple[ClipTokenizer | None, ClipTokenizer | None] = (None, None),
) -> None:
    """Writes a pipeline folder (U-Net, VAE, both encoders, scheduler, tokenizers if at hand) without a network."""
    target = PipelineFolder(folder, dtype=dtype, use_safetensors=use_safetensors)
    unet = weights_of(modules.unet)
    target.add_weights("unet", unet_folder_config(modules), layout_unet.to_diffusers(unet))
    target.add_module("vae", modules.vae)
    target.add_text_encoder("text_encoder", modules.text_encoder1)
    target.add_text_encoder("text_encoder_2", modules.text_encoder2)
    target.add_scheduler(scheduler_config(v_parameterization=v_parameterization, name="EulerDiscreteScheduler"))
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        target.add_tokenizer(part, tokenizer)
    target.finish("StableDiffusionXLPipeline", {"force_zeros_for_empty_prompt": False, "add_watermarker": None})


def unet_folder_config(modules: SdxlModules) -> dict[str, Any]:
    """The config.json of diffusers' U-Net for this one: structure from its shapes, heads and size width as loaded.

    Raises ValueError for a U-Net that diffusers' class cannot represent.
    """
    unet = modules.unet
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    projection = modules.text_encoder2.text_projection
    pooled_width = modules.text_encoder2.config.hidden_size if projection is None else projection.out_features
    config = layout_unet.unet_config(shapes, heads=list(unet.config.heads))
    config["addition_time_embed_dim"] = (unet.config.vector_width - pooled_width) // SIZE_COUNT
    return {"_class_name": "UNet2DConditionModel", "sample_size": 128, **config}


def model_metadata(*, v_parameterization: bool) -> dict[str, Any]:
    """What saved files say about such a model: base version, architecture, default resolution, prediction type."""
    return {
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
        "architecture": "stable-diffusion-xl-v1-base",
        "default_resolution": 1024,
        "prediction_type": "v" if v_parameterization else "epsilon",
    }
