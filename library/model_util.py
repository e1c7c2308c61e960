"""SD 1.x/2.x models: files, Diffusers folders and hub names -> modules, and modules -> files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import layout_clip, layout_sd, layout_unet, layout_vae
from library.checkpoints.folders import (
    hub_folder,
    model_index,
    module_config,
    part_file,
    read_config,
    weight_stem,
    write_json,
    write_part,
)
from library.checkpoints.recognition import ModelKind, check_not_quantised, is_ignorable, recognise, require_kind
from library.checkpoints.tensors import (
    LazyTensors,
    Operation,
    RenamedTensors,
    Shapes,
    cast,
    fill_module,
    is_safetensors,
    open_tensors,
    read_metadata,
    save_pickle,
    save_tensors,
    shapes_of,
)
from library.checkpoints.unpickle import load_pickle
from library.models.layers import rename_time_embedding
from library.models.text_encoders import ClipTextEncoder, build_clip
from library.text.clip import ClipTokenizer

logger = logging.getLogger(__name__)

SCALING_FACTOR = 0.18215


@dataclass
class SdModules:
    """A loaded model. `source` is the checkpoint file or folder; `is_single_file` says which of the two."""

    text_encoder: ClipTextEncoder
    vae: Any  # diffusers AutoencoderKL
    unet: Any  # diffusers UNet2DConditionModel
    source: Path
    is_single_file: bool


@dataclass(frozen=True)
class LoadSpec:
    """What to load and how; a dtype of None keeps the file's. `option` is what messages call the path."""

    path: str
    v2: bool = False
    dtype: torch.dtype | None = None  # U-Net and text encoder
    vae_dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    vae: str | None = None
    option: str = "--pretrained_model_name_or_path"
    variant: str | None = None  # of a folder's weight files, e.g. "fp16"; at least one component must have it
    linear_projections: bool = True  # SD2: `proj_in`/`proj_out` as Linear layers; False: as 1x1 convolutions


# --- loading ---------------------------------------------------------------------------------------------------
def load_model(spec: LoadSpec) -> SdModules:
    """A checkpoint file, a Diffusers folder or a hub name -> modules in eval mode without gradients.

    Raises FileNotFoundError or ValueError that names the file, the component and the keys.
    """
    path = Path(spec.path).resolve() if Path(spec.path).exists() else Path(spec.path)
    if path.is_file():
        return _load_file(path, spec)
    folder = path if path.is_dir() else hub_folder(spec.path, option=spec.option, variant=spec.variant)
    return _load_folder(folder, spec)


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
    layout_sd.check_foreign_keys(tensors, v2=spec.v2)
    text = layout_sd.text_tensors(tensors, v2=spec.v2)
    if not text:
        raise ValueError(f"{path} holds no text encoder; a complete checkpoint is needed.")
    vae_part = layout_sd.vae_tensors(tensors)
    if not vae_part and not spec.vae:
        raise ValueError(f"{path} holds no VAE: one must come from --vae, or with a complete checkpoint.")
    return SdModules(
        text_encoder=build_clip(
            text, activation="gelu" if spec.v2 else "quick_gelu", component="text encoder", dtype=spec.dtype,
            device=spec.device,
        ),
        vae=load_vae(spec.vae, dtype=spec.vae_dtype, device=spec.device) if spec.vae
        else build_vae(vae_part, dtype=spec.vae_dtype, device=spec.device),
        unet=_build_unet(layout_sd.unet_tensors(tensors), spec),
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
    shapes = shapes_of(tensors if linear_projections is None else _with_projections(tensors, linear=True))
    arguments = layout_unet.unet_config(shapes, heads=tuple(heads) if isinstance(heads, list) else heads)
    if linear_projections is not None:
        tensors = _with_projections(tensors, linear=linear_projections)
        arguments["use_linear_projection"] = linear_projections
    arguments["sample_size"] = config.get("sample_size") or 64
    arguments["upcast_attention"] = bool(config.get("upcast_attention", False))
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**arguments)
    rename_time_embedding(unet)
    fill_module(unet, layout_unet.to_diffusers(tensors), component="U-Net", dtype=dtype, device=device)
    return unet.eval().requires_grad_(False)


def _with_projections(tensors: Mapping[str, Tensor], *, linear: bool) -> RenamedTensors:
    plan = {
        key: (key, layout_unet.projection_operation(key, shape, linear=linear))
        for key, shape in shapes_of(tensors).items()
    }
    return RenamedTensors(tensors, plan)


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

    arguments = layout_vae.vae_config(shapes_of(tensors), scaling_factor=SCALING_FACTOR)
    if arguments["latent_channels"] != latent_channels:
        source = getattr(tensors, "source", "the given tensors")
        raise ValueError(
            f"{source}: this VAE has {arguments['latent_channels']} latent channels, the model needs {latent_channels}."
        )
    arguments.update({k: v for k, v in (config or {}).items() if k in _VAE_SETTINGS})
    with torch.device("meta"):
        vae = AutoencoderKL(**arguments)
    fill_module(vae, tensors, component="VAE", dtype=dtype, device=device)
    vae.weights_digest = _encoder_digest(tensors)
    return vae.eval().requires_grad_(False)


def _encoder_digest(tensors: Mapping[str, Tensor]) -> str:
    """What identifies a VAE to latent caches: a hash of its encoder as stored, whatever dtype it runs in."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if key.startswith(("encoder.", "quant_conv.")):
            flat = tensors[key].detach().contiguous().reshape(-1).cpu()
            digest.update(key.encode() + str(flat.dtype).encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


_VAE_SETTINGS = ("scaling_factor", "shift_factor", "force_upcast", "sample_size")


def load_vae(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    latent_channels: int = 4,
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Any:
    """`--vae`: a VAE or full-model file of either layout, a Diffusers folder (its root or `vae/`), or a hub name.

    `variant` of a folder's weight file is preferred to the plain one.
    """
    location = Path(path)
    if location.is_file():
        tensors = vae_part(open_tensors(location))
        return build_vae(tensors, dtype=dtype, device=device, latent_channels=latent_channels, config=config)
    if not location.is_dir():
        location = hub_folder(str(path), option="--vae", variant=variant)
    folder = location / "vae" if (location / "vae").is_dir() else location
    tensors = layout_vae.to_diffusers(open_tensors(part_file(folder, "vae", variant)))
    settings = {**read_config(folder), **(config or {})}
    return build_vae(tensors, dtype=dtype, device=device, latent_channels=latent_channels, config=settings)


def vae_part(tensors: LazyTensors) -> RenamedTensors:
    """The VAE inside a file of any kind (bare, prefixed, inside a full model), in diffusers layout."""
    check_not_quantised(tensors.shapes, source=tensors.source)
    for prefix in layout_vae.VAE_PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            return layout_vae.to_diffusers(layout_sd.select(tensors, prefix))
    plan = {key: (key, None) for key in tensors if not is_ignorable(key)}
    part = layout_vae.to_diffusers(RenamedTensors(tensors, plan))
    if not layout_vae.level_count(part.shapes):
        raise ValueError(f"--vae {tensors.source} holds no VAE (keys: {', '.join(list(tensors)[:5])}).")
    return part


def _load_folder(folder: Path, spec: LoadSpec) -> SdModules:
    variant = _check_folder(folder, spec)
    text = layout_clip.normalize_hf(open_tensors(part_file(folder / "text_encoder", "text_encoder", variant)))
    text_config = read_config(folder / "text_encoder")
    overrides: dict[str, Any] = {k: text_config[k] for k in ("hidden_act", "num_attention_heads") if k in text_config}
    unet_tensors = _folder_unet(folder, variant)
    _require_version(_kind_of_folder(unet_tensors.shapes, text_config), spec)
    return SdModules(
        text_encoder=build_clip(
            text, activation="gelu" if spec.v2 else "quick_gelu", component="text encoder", dtype=spec.dtype,
            device=spec.device, overrides=overrides,
        ),
        vae=load_vae(spec.vae or folder, dtype=spec.vae_dtype, device=spec.device, variant=variant),
        unet=_build_unet(unet_tensors, spec, read_config(folder / "unet")),
        source=folder,
        is_single_file=False,
    )  # fmt: skip


def _check_folder(folder: Path, spec: LoadSpec) -> str | None:
    """The variant to look for. Raises FileNotFoundError if a component or every file of a wanted variant is missing."""
    parts = ("unet", "text_encoder") + (() if spec.vae else ("vae",))
    for name in parts:
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{spec.option} {spec.path}: there is no folder '{name}' in it; "
                "give a checkpoint file or a complete Diffusers folder."
            )
    if spec.variant is None:
        return "fp16" if spec.dtype == torch.float16 else None
    if not any(f".{spec.variant}." in part_file(folder / name, name, spec.variant).name for name in parts):
        raise FileNotFoundError(f"{spec.option} {spec.path}: no component has weights of the variant {spec.variant}.")
    return spec.variant


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
    shapes = _folder_unet(folder, _check_folder(folder, spec)).shapes
    kind = _kind_of_folder(shapes, read_config(folder / "text_encoder"))
    projections = (len(shape) for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    return FolderFacts(kind is ModelKind.SD2, next(projections, 4) == 2)


def recorded_prediction_type(source: Path) -> str | None:
    """"epsilon" or "v", where a file's metadata or a folder's scheduler says so."""
    if source.is_dir():
        name = read_config(source / "scheduler", "scheduler_config.json").get("prediction_type")
        return {"epsilon": "epsilon", "v_prediction": "v"}.get(name or "")
    return read_metadata(source).get("modelspec.prediction_type") if source.is_file() else None


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
    vae = None if modules.vae is None else modules.vae.state_dict()
    trained = layout_sd.to_single_file(modules.unet.state_dict(), modules.text_encoder.state_dict(), vae, v2=v2)
    tensors: dict[str, Tensor] = dict(trained)
    source = open_tensors(modules.source) if modules.is_single_file and modules.source.is_file() else None
    if source is not None:
        tensors.update(layout_sd.preserved_tensors(source, tensors))
    if v2 and f"{layout_sd.SD2_TEXT_PREFIX}text_projection" not in tensors:
        trained.update(layout_sd.sd2_tail(trained))
        tensors.update(trained)
    if not any(key.startswith(layout_sd.VAE_PREFIX) for key in tensors):
        raise ValueError(f"{path}: there is no VAE to write; name one with --vae.")
    plan = {k: (k, _to_dtype(dtype) if k.startswith(layout_sd.COMPONENT_PREFIXES) else None) for k in tensors}
    prepared = RenamedTensors(tensors, plan)
    if is_safetensors(path):
        save_tensors(path, prepared, metadata={"format": "pt", **(metadata or {})})
        return
    epoch, step = _counters_of(modules)
    state = {key: prepared[key].detach().cpu().contiguous().clone() for key in prepared}
    save_pickle(path, {"state_dict": state, "epoch": epoch + counters[0], "global_step": step + counters[1]})


def _to_dtype(dtype: torch.dtype | None) -> Operation:
    return lambda tensor: cast(tensor, dtype=dtype)


def _counters_of(modules: SdModules) -> tuple[int, int]:
    if not modules.is_single_file or is_safetensors(modules.source) or not modules.source.is_file():
        return 0, 0
    content = load_pickle(modules.source)
    return content.epoch or 0, content.global_step or 0


def scheduler_config(*, v_parameterization: bool) -> dict[str, Any]:
    """The scheduler_config.json that goes into a Diffusers folder."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v_parameterization else "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
    }


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

    `scheduler` is its scheduler_config.json, such as `scheduler_config` makes. Text-encoder keys carry the
    `text_model.` level, which older libraries need and newer ones accept.
    """
    folder = Path(folder)
    suffix = ".safetensors" if use_safetensors else ".bin"
    for part in ("unet", "vae"):
        module = getattr(modules, part)
        write_json(folder / part / "config.json", module_config(module))
        write_part(folder / part / f"{weight_stem(part)}{suffix}", module, dtype)
    text = modules.text_encoder
    config = {**text.config.to_diff_dict(), "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    config.pop("_name_or_path", None)
    config["dtype"] = str(dtype or text.dtype).removeprefix("torch.")
    write_json(folder / "text_encoder" / "config.json", config)
    name = "model.safetensors" if use_safetensors else "pytorch_model.bin"
    write_part(folder / "text_encoder" / name, text, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    else:
        logger.warning("%s: no tokenizer was at hand; put its files into the folder 'tokenizer'", folder)
    index = model_index(scheduler["_class_name"], with_tokenizer=tokenizer is not None)
    write_json(folder / "model_index.json", index)


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
