"""SD 1.x/2.x models: files, Diffusers folders and hub names -> modules, and modules -> files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import model_files
from library.checkpoints import layout_sd, layout_unet
from library.checkpoints.folders import part_file, read_config
from library.checkpoints.misfits import naming_file
from library.checkpoints.recognition import ModelKind, check_not_quantised, recognise, require_kind
from library.checkpoints.stored import fill_from_file, weights_of
from library.checkpoints.tensors import RenamedTensors, Shapes, open_tensors, shapes_of
from library.model_files import DENOISER, TEXT, VAE, PipelineFolder, locate, recorded_prediction_type, scheduler_config
from library.models.layers import accept_single_values, rename_time_embedding
from library.models.text_encoders import ClipTextEncoder, build_clip
from library.models.vae import build_vae, load_vae
from library.text.clip import ClipTokenizer

__all__ = [
    "FolderFacts", "LoadSpec", "SdModules", "build_unet", "inspect_folder", "load_checkpoint",
    "load_diffusers_folder", "load_model", "load_models_from_stable_diffusion_checkpoint", "load_vae",
    "model_metadata", "recorded_prediction_type", "save_checkpoint", "save_diffusers_folder",
    "save_stable_diffusion_checkpoint", "scheduler_config",
]  # fmt: skip


@dataclass
class SdModules:
    """A loaded model. `source` is the checkpoint file or folder; `is_single_file` says which of the two."""

    text_encoder: ClipTextEncoder
    vae: Any  # diffusers AutoencoderKL
    unet: Any  # diffusers UNet2DConditionModel
    source: Path
    is_single_file: bool


@dataclass(frozen=True)
class LoadSpec(model_files.LoadSpec):
    """What to load and how, for SD 1.x and 2.x."""

    v2: bool = False
    linear_projections: bool = True  # SD2: `proj_in`/`proj_out` as Linear layers; False: as 1x1 convolutions


# --- loading ---------------------------------------------------------------------------------------------------
def load_model(spec: LoadSpec) -> SdModules:
    """A checkpoint file, a Diffusers folder or a hub name -> modules in eval mode without gradients.

    Raises FileNotFoundError or ValueError that names the file, the component and the keys.
    """
    path = locate(spec)
    return _load_file(path, spec) if path.is_file() else _load_folder(path, spec)


def load_checkpoint(
    path: str | Path,
    *,
    v2: bool,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vae: str | None = None,
) -> SdModules:
    """A single checkpoint file, a folder or a hub name -> modules, all in `dtype` (None: as stored)."""
    return load_model(LoadSpec(str(path), v2=v2, dtype=dtype, vae_dtype=dtype, device=device, vae=vae))


def load_diffusers_folder(
    folder: str | Path, *, v2: bool, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SdModules:
    """A Diffusers folder with `unet`, `vae` and `text_encoder` -> modules, all in `dtype` (None: as stored)."""
    return _load_folder(Path(folder), LoadSpec(str(folder), v2=v2, dtype=dtype, vae_dtype=dtype, device=device))


def _load_file(path: Path, spec: LoadSpec) -> SdModules:
    tensors = open_tensors(path)
    check_not_quantised(tensors.shapes, source=str(path))
    _require_version(recognise(tensors.shapes), spec)
    tensors = layout_sd.normalize(tensors)
    layout_sd.warn_of_foreign_keys(tensors, v2=spec.v2)
    text = layout_sd.text_tensors(tensors, v2=spec.v2)
    if not text and TEXT in spec.parts:
        raise ValueError(f"{path} holds no text encoder; a complete checkpoint is needed.")
    vae_part = layout_sd.vae_tensors(tensors)
    if not vae_part and not spec.vae and VAE in spec.parts:
        raise ValueError(f"{path} holds no VAE: one must come from --vae, or with a complete checkpoint.")
    return SdModules(
        text_encoder=spec.part(TEXT, lambda: build_clip(
            text, activation="gelu" if spec.v2 else "quick_gelu", component="text encoder", dtype=spec.dtype,
            device=spec.device,
        )),
        vae=spec.part(VAE, lambda: load_vae(spec.vae, dtype=spec.vae_dtype, device=spec.device) if spec.vae
        else build_vae(vae_part, dtype=spec.vae_dtype, device=spec.device)),
        unet=spec.part(DENOISER, lambda: _build_unet(layout_sd.unet_tensors(tensors), spec)),
        source=path,
        is_single_file=True,
    )  # fmt: skip


def _require_version(found: ModelKind, spec: LoadSpec) -> None:
    expected = ModelKind.SD2 if spec.v2 else ModelKind.SD1
    hint = {ModelKind.SD1: "Remove --v2.", ModelKind.SD2: "Add --v2."}.get(found, "")
    require_kind(found, expected, source=spec.path, option=spec.option, hint=hint)


def _kind_of_folder(unet_shapes: Shapes, text_config: Mapping[str, Any]) -> ModelKind:
    """By the U-Net; between SD 1 and 2 the text encoder's activation decides (old SD 2 folders look like SD 1)."""
    kind = recognise(unet_shapes)
    if kind not in (ModelKind.SD1, ModelKind.SD2):
        return kind
    return {"quick_gelu": ModelKind.SD1, "gelu": ModelKind.SD2}.get(text_config.get("hidden_act", ""), kind)


def _build_unet(tensors: Mapping[str, Tensor], spec: LoadSpec, config: Mapping[str, Any] | None = None) -> Any:
    linear = spec.linear_projections if spec.v2 else None
    return build_unet(tensors, dtype=spec.dtype, device=spec.device, linear_projections=linear, config=config)


def build_unet(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    linear_projections: bool | None = None,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """diffusers' U-Net for tensors in original layout; sizes come from shapes.

    `config` is a folder's config.json: head counts, sample size and upcasting are taken from it.
    `linear_projections`: whether `proj_in`/`proj_out` become Linear layers or 1x1 convolutions whatever their form in
    the file is; the heads are then those of linear ones, as in SD2. None keeps the form.
    """
    from diffusers import UNet2DConditionModel

    config = config or {}
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    with naming_file(tensors):
        uniform = tensors if linear_projections is None else layout_unet.with_projections(tensors, linear=True)
        heads = tuple(heads) if isinstance(heads, list) else heads
        arguments = layout_unet.unet_config(shapes_of(uniform), heads=heads)
    if linear_projections is not None:
        tensors = layout_unet.with_projections(tensors, linear=linear_projections)
        arguments["use_linear_projection"] = linear_projections
    arguments["sample_size"] = config.get("sample_size") or 64
    arguments["upcast_attention"] = bool(config.get("upcast_attention", False))
    with naming_file(tensors), torch.device("meta"):
        unet: Any = UNet2DConditionModel(**arguments)
    rename_time_embedding(unet)
    accept_single_values(unet)
    fill_from_file(unet, layout_unet.to_diffusers(tensors), component="U-Net", dtype=dtype, device=device)
    return unet.eval().requires_grad_(False)


def _load_folder(folder: Path, spec: LoadSpec) -> SdModules:
    variant = model_files.check_folder(folder, spec, _FOLDER_PARTS)
    unet_tensors = _folder_unet(folder, variant)
    _require_version(_kind_of_folder(unet_tensors.shapes, read_config(folder / "text_encoder")), spec)
    activation = "gelu" if spec.v2 else "quick_gelu"
    return SdModules(
        text_encoder=spec.part(TEXT, lambda: model_files.clip_of_folder(
            folder, "text_encoder", spec, activation=activation, variant=variant
        )),
        vae=spec.part(VAE, lambda: load_vae(
            spec.vae or folder, dtype=spec.vae_dtype, device=spec.device, variant=variant
        )),
        unet=spec.part(DENOISER, lambda: _build_unet(unet_tensors, spec, read_config(folder / "unet"))),
        source=folder,
        is_single_file=False,
    )  # fmt: skip


_FOLDER_PARTS = ("unet", "text_encoder")


def _folder_unet(folder: Path, variant: str | None) -> RenamedTensors:
    """A folder's U-Net under original names."""
    tensors = open_tensors(part_file(folder / "unet", "unet", variant))
    names = layout_unet.names_to_original(tensors)
    return RenamedTensors(tensors, {new: (old, None) for old, new in names.items()})


@dataclass(frozen=True)
class FolderFacts:
    """What a Diffusers folder is: SD 2 or 1, and whether its U-Net has linear projections."""

    v2: bool
    has_linear_projections: bool


def inspect_folder(folder: Path, spec: LoadSpec) -> FolderFacts:
    """Looks at settings and shapes only; `v2` and `linear_projections` of `spec` do not matter."""
    shapes = _folder_unet(folder, model_files.check_folder(folder, spec, _FOLDER_PARTS)).shapes
    kind = _kind_of_folder(shapes, read_config(folder / "text_encoder"))
    projections = (len(shape) for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    return FolderFacts(kind is ModelKind.SD2, next(projections, 4) == 2)


# --- saving ----------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: str | Path,
    modules: SdModules,
    *,
    v2: bool,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: tuple[int, int] = (0, 0),
) -> None:
    """Writes a single file, safetensors or pickle by its extension, atomically.

    Component tensors are cast to `dtype` if given, also those that only the source checkpoint has (such as the unused
    last text block of SD2); what belongs to no component keeps its bits (EMA copies are dropped). `counters` =
    (epochs, steps) of this run, added to those of a pickled source.
    """
    vae = None if modules.vae is None else weights_of(modules.vae)
    trained = layout_sd.to_single_file(weights_of(modules.unet), weights_of(modules.text_encoder), vae, v2=v2)
    tensors: dict[str, Tensor] = dict(trained)
    source = open_tensors(modules.source) if modules.is_single_file and modules.source.is_file() else None
    if source is not None:
        tensors.update(layout_sd.preserved_tensors(source, tensors))
    if v2 and f"{layout_sd.SD2_TEXT_PREFIX}text_projection" not in tensors:
        trained.update(layout_sd.sd2_tail(trained))
        tensors.update(trained)
    if not any(key.startswith(layout_sd.VAE_PREFIX) for key in tensors):
        raise ValueError(f"{path}: there is no VAE to write; name one with --vae.")
    if modules.is_single_file:
        counters = model_files.total_counters(modules.source, counters)
    model_files.write_single_file(
        path, tensors, components=layout_sd.COMPONENT_PREFIXES, dtype=dtype, metadata=metadata, counters=counters
    )


def save_diffusers_folder(
    folder: str | Path,
    modules: SdModules,
    *,
    scheduler: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    use_safetensors: bool = True,
    tokenizer: ClipTokenizer | None = None,
) -> None:
    """Writes a pipeline folder (unet, vae, text_encoder, scheduler, tokenizer if one is at hand) without a network.

    `scheduler` is its scheduler_config.json, such as `scheduler_config` makes.
    """
    target = PipelineFolder(folder, dtype=dtype, use_safetensors=use_safetensors)
    target.add_module("unet", modules.unet)
    target.add_module("vae", modules.vae)
    target.add_text_encoder("text_encoder", modules.text_encoder)
    target.add_scheduler(scheduler)
    target.add_tokenizer("tokenizer", tokenizer)
    target.finish("StableDiffusionPipeline", {"requires_safety_checker": False, "safety_checker": [None, None]})


def model_metadata(*, v2: bool, v_parameterization: bool) -> dict[str, Any]:
    """What saved files say about such a model: base version, architecture, default resolution, prediction type."""
    architecture = "stable-diffusion-v1"
    if v2:
        architecture = "stable-diffusion-v2-768-v" if v_parameterization else "stable-diffusion-v2-512"
    return {
        "ss_v2": v2,
        "ss_base_model_version": ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else ""),
        "architecture": architecture,
        "default_resolution": 768 if v2 and v_parameterization else 512,
        "prediction_type": "v" if v_parameterization else "epsilon",
    }


# --- names that other programs import --------------------------------------------------------------------------
def load_models_from_stable_diffusion_checkpoint(
    v2: bool,
    ckpt_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    unet_use_linear_projection_in_v2: bool = True,
) -> tuple[ClipTextEncoder, Any, Any]:
    """(text encoder, VAE, U-Net) of a single file; SD 2 projections are always linear."""
    modules = load_checkpoint(ckpt_path, v2=v2, dtype=dtype, device=device)
    return modules.text_encoder, modules.vae, modules.unet


def save_stable_diffusion_checkpoint(
    v2: bool,
    output_file: str | Path,
    text_encoder: Any,
    unet: nn.Module,
    ckpt_path: str | Path | None,
    epochs: int,
    steps: int,
    metadata: Mapping[str, str] | None = None,
    save_dtype: torch.dtype | None = None,
    vae: nn.Module | None = None,
) -> None:
    """Writes a single file; `ckpt_path` is the file whose other keys (and VAE, if none is given) are kept."""
    source = Path(ckpt_path) if ckpt_path else Path()
    modules = SdModules(text_encoder, vae, unet, source, is_single_file=source.is_file())
    save_checkpoint(output_file, modules, v2=v2, dtype=save_dtype, metadata=metadata, counters=(epochs, steps))
