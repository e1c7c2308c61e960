"""SD3 and SD3.5 models: single files with or without encoders, files of encoders, Diffusers folders <-> modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from library.checkpoints import layout_sd3, layout_t5
from library.checkpoints.file_kind import holds_safetensors
from library.checkpoints.folders import part_file
from library.checkpoints.stored import weights_of
from library.checkpoints.tensors import LazyTensors, open_tensors, save_tensors, shapes_of
from library.encoder_files import EncoderKind, EncoderSource, find_encoder
from library.model_files import (
    DENOISER,
    TEXT,
    VAE,
    LoadSpec,
    PipelineFolder,
    locate,
    total_counters,
    write_single_file,
)
from library.models.mmdit import MMDiT, build_mmdit
from library.models.vae import build_vae, load_vae

logger = logging.getLogger(__name__)

LATENT_CHANNELS, SCALE, SHIFT = 16, 1.5305, 0.0609
SAMPLING_SHIFT = 3.0
CLIP_L = EncoderKind("clip_l", "text_encoder", partial(layout_sd3.clip_tensors, encoder="clip_l"), "quick_gelu")
CLIP_G = EncoderKind("clip_g", "text_encoder_2", partial(layout_sd3.clip_tensors, encoder="clip_g"), "gelu")
T5XXL = EncoderKind("t5xxl", "text_encoder_3", partial(layout_t5.encoder_tensors, option="--t5xxl"))
ENCODERS = (CLIP_L, CLIP_G, T5XXL)
TOKENIZER_FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
_VAE_SETTINGS = {"scaling_factor": SCALE, "shift_factor": SHIFT}


@dataclass(frozen=True)
class Sd3LoadSpec(LoadSpec):
    """`encoders` holds the files or folders of text encoders that have an option of their own, by name."""

    encoders: Mapping[str, str | None] = field(default_factory=dict)


@dataclass
class Sd3Modules:
    """A loaded model. `encoders` may lack the T5; `encoder_sources` are where the encoders came from."""

    mmdit: MMDiT
    vae: Any  # diffusers AutoencoderKL
    encoders: dict[str, Any]
    encoder_sources: dict[str, EncoderSource]
    source: Path
    model_type: str  # medium, 5-large, 5-medium
    context_size: int  # width of the text that the transformer takes


# --- loading ---------------------------------------------------------------------------------------------------
def load_model(spec: Sd3LoadSpec) -> Sd3Modules:
    """A checkpoint file, a Diffusers folder or a hub name -> modules in eval mode without gradients.

    A component that has an option of its own wins over the one that comes with the model. Raises FileNotFoundError or
    ValueError that names the file, the component and the keys, also when a CLIP encoder or the VAE is nowhere.
    """
    location = _locate(spec)
    tensors = _open(location)
    whole = tensors if location.is_file() else None
    kind = layout_sd3.model_type(tensors.shapes, source=str(location), option=spec.option)
    layout_sd3.warn_of_foreign_keys(tensors)
    sources = encoder_sources(spec, location, whole) if TEXT in spec.parts else {}
    for name in (CLIP_L.name, CLIP_G.name):
        if name not in sources and TEXT in spec.parts:
            raise ValueError(
                f"{spec.option} {spec.path} holds no {name}: name its file with --{name}, or give a model that has it."
            )
    if T5XXL.name not in sources and TEXT in spec.parts:
        logger.warning("there is no T5 text encoder (--t5xxl); the model sees zeros in its place")
    return Sd3Modules(
        mmdit=spec.part(DENOISER, lambda: build_mmdit(
            layout_sd3.transformer_tensors(tensors), dtype=spec.dtype, device=spec.device
        )),
        vae=spec.part(VAE, lambda: _load_vae(spec, location, whole)),
        encoders={name: source.build(dtype=spec.dtype, device=spec.device) for name, source in sources.items()},
        encoder_sources=sources,
        source=location,
        model_type=kind,
        context_size=layout_sd3.transformer_tensors(tensors).shapes["context_embedder.weight"][1],
    )  # fmt: skip


def _locate(spec: Sd3LoadSpec) -> Path:
    location = locate(spec)
    if location.is_dir() and not (location / "transformer").is_dir():
        raise FileNotFoundError(
            f"{spec.option} {spec.path}: there is no folder 'transformer' in it; "
            "give a checkpoint file or a complete Diffusers folder."
        )
    return location


def _open(location: Path) -> LazyTensors:
    """The model file, or the transformer of a folder."""
    return open_tensors(location if location.is_file() else part_file(location / "transformer", "transformer"))


def _load_vae(spec: Sd3LoadSpec, location: Path, tensors: LazyTensors | None) -> Any:
    arguments: dict[str, Any] = {
        "dtype": spec.vae_dtype, "device": spec.device, "latent_channels": LATENT_CHANNELS, "config": _VAE_SETTINGS
    }  # fmt: skip
    if spec.vae or tensors is None:
        return load_vae(spec.vae or location, **arguments)
    part = layout_sd3.vae_tensors(tensors)
    if not part:
        raise ValueError(f"{spec.option} {spec.path} holds no VAE: name one with --vae.")
    return build_vae(part, **arguments)


def encoder_sources(spec: Sd3LoadSpec, location: Path, tensors: LazyTensors | None) -> dict[str, EncoderSource]:
    """Where each text encoder comes from, without reading its weights; names of those that are nowhere are missing.

    `location` is the model's file or folder, `tensors` the opened file. Raises FileNotFoundError or ValueError for an
    option that names no such encoder.
    """
    found = {kind.name: find_encoder(kind, spec.encoders.get(kind.name), location, tensors) for kind in ENCODERS}
    return {name: source for name, source in found.items() if source is not None}


def problems_with_files(spec: Sd3LoadSpec) -> list[str]:
    """What is missing or cannot be used, one sentence each; looks at names and shapes only.

    A model that is not on this machine yet is not looked at, nor a pickle, which would have to be read as a whole.
    """
    options = {"--vae": spec.vae if spec.vae and not _may_be_hub_name(spec.vae) else None}
    options |= {f"--{name}": given for name, given in spec.encoders.items()}
    found = [
        f"{option} {given}: no such file or folder."
        for option, given in options.items()
        if given and not Path(given).exists()
    ]
    path = Path(spec.path)
    if found or not path.exists():
        return found
    try:
        if path.is_file() and not holds_safetensors(path):
            return found
        location = _locate(spec)
        tensors = _open(location)
        layout_sd3.model_type(tensors.shapes, source=str(location), option=spec.option)
        whole = tensors if location.is_file() else None
        sources = encoder_sources(spec, location, whole)
    except (ValueError, OSError) as error:
        return [str(error)]
    missing = [f"--{name}" for name in (CLIP_L.name, CLIP_G.name) if name not in sources and TEXT in spec.parts]
    has_vae = (location / "vae").is_dir() if whole is None else bool(layout_sd3.vae_tensors(whole))
    missing += [] if spec.vae or has_vae or VAE not in spec.parts else ["--vae"]
    return [f"{spec.option} {spec.path} does not hold everything: {', '.join(missing)} must be given."] * bool(missing)


def _may_be_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/"))


def has_t5(spec: Sd3LoadSpec) -> bool:
    """Whether the model will have a T5 encoder; looks at names only (a hub model is downloaded)."""
    if spec.encoders.get(T5XXL.name):
        return True
    location = _locate(spec)
    return find_encoder(T5XXL, None, location, open_tensors(location) if location.is_file() else None) is not None


# --- saving ----------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: Path,
    modules: Sd3Modules,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: tuple[int, int] = (0, 0),
    with_encoders: Sequence[str] = (),
) -> None:
    """Transformer and VAE as one file, safetensors or pickle by its extension; floating tensors cast to `dtype`.

    The text encoders `with_encoders` are written beside it as `<stem>_<name>.safetensors`. `counters` = (epochs,
    steps) of this run, added to those of a pickled source; only pickles hold them.
    """
    for name in with_encoders:
        state = weights_of(modules.encoders[name])
        save_tensors(companion(path, name), state, metadata={"format": "pt"}, dtype=dtype)
    write_single_file(
        path, layout_sd3.to_single_file(weights_of(modules.mmdit), weights_of(modules.vae)), components=("",),
        dtype=dtype, metadata=metadata, counters=total_counters(modules.source, counters),
    )  # fmt: skip


def companion(path: Path, name: str) -> Path:
    """The file of text encoder `name` beside the model file `path`."""
    return path.with_name(f"{path.stem}_{name}.safetensors")


def save_diffusers_folder(
    path: Path,
    modules: Sd3Modules,
    *,
    dtype: torch.dtype | None = None,
    use_safetensors: bool = True,
    tokenizers: Mapping[str, Any] | None = None,
) -> None:
    """A pipeline folder: transformer, VAE, scheduler, the text encoders, and the tokenizers by name of encoder.

    An encoder that has been released is read again from where it came from.
    """
    folder = PipelineFolder(path, dtype=dtype, use_safetensors=use_safetensors)
    state = weights_of(modules.mmdit)
    folder.add_weights("transformer", layout_sd3.diffusers_config(shapes_of(state)), layout_sd3.to_diffusers(state))
    folder.add_module("vae", modules.vae)
    for kind in ENCODERS:
        source, tokenizer_folder = modules.encoder_sources.get(kind.name), TOKENIZER_FOLDERS[kind.name]
        if source is None:
            folder.add_missing(kind.folder, tokenizer_folder)
            continue
        folder.add_text_encoder(kind.folder, modules.encoders.get(kind.name) or source.build(dtype=None))
        folder.add_tokenizer(tokenizer_folder, (tokenizers or {}).get(kind.name))
    folder.add_scheduler(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SAMPLING_SHIFT}
    )
    folder.finish("StableDiffusion3Pipeline", {})


def model_metadata(model_type: str) -> dict[str, Any]:
    """What saved files say about a model of type `medium`, `5-large` or `5-medium`."""
    return {
        "ss_v2": False,
        "ss_base_model_version": model_type,
        "architecture": f"stable-diffusion-3-{model_type}",
        "default_resolution": 1024,
        "prediction_type": "epsilon",
    }
