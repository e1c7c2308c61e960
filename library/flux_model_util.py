"""FLUX.1 models: the transformer's file or folder, files of autoencoder and text encoders <-> modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from library.checkpoints import layout_clip, layout_flux, layout_t5
from library.checkpoints.folders import part_file, read_config
from library.checkpoints.recognition import ModelKind, check_not_quantised, recognise
from library.checkpoints.stored import weights_of
from library.checkpoints.tensors import LazyTensors, RenamedTensors, open_tensors, shapes_of
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
from library.models.flux import Flux, build_flux
from library.models.vae import build_vae, load_vae, require_channels, vae_part

LATENT_CHANNELS, SCALE, SHIFT = 16, 0.3611, 0.1159
_AE_SETTINGS = {"scaling_factor": SCALE, "shift_factor": SHIFT}
_TRANSFORMER = "transformer"
_KINDS = (ModelKind.FLUX, ModelKind.FLUX_SCHNELL, ModelKind.FLUX_DIFFUSERS)


def _without_projection(tensors: LazyTensors) -> LazyTensors:
    """CLIP-L as this family uses it: the pooled state is not projected."""
    is_openclip = layout_clip.is_openclip(tensors)
    part = layout_clip.openclip_to_hf(tensors) if is_openclip else layout_clip.normalize_hf(tensors)
    return RenamedTensors(part, {key: (key, None) for key in part if key != "text_projection.weight"})


CLIP_L = EncoderKind("clip_l", "text_encoder", _without_projection, activation="quick_gelu")
T5XXL = EncoderKind("t5xxl", "text_encoder_2", partial(layout_t5.encoder_tensors, option="--t5xxl"))
ENCODERS = (CLIP_L, T5XXL)
TOKENIZER_FOLDERS = {"clip_l": "tokenizer", "t5xxl": "tokenizer_2"}


@dataclass(frozen=True)
class FluxLoadSpec(LoadSpec):
    """`vae` is `--ae`; `clip_l` and `t5xxl` are files or folders of the text encoders."""

    clip_l: str | None = None
    t5xxl: str | None = None
    encoder_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # by name; the others get `dtype`

    def encoder(self, kind: EncoderKind) -> str | None:
        """The option of one text encoder."""
        return getattr(self, kind.name)


@dataclass(frozen=True)
class FluxFacts:
    """What names and shapes of a transformer say. Without a guidance input it is of the schnell type."""

    is_schnell: bool
    in_channels: int
    out_channels: int


@dataclass
class FluxModules:
    """A loaded model. `encoders` are by name; `encoder_sources` are where they came from."""

    transformer: Flux
    ae: Any  # diffusers AutoencoderKL
    encoders: dict[str, Any]
    encoder_sources: dict[str, EncoderSource]
    source: Path
    facts: FluxFacts


# --- looking ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """The transformer as it is stored, under original names; `whole` is the model file with all that is in it."""

    tensors: LazyTensors
    whole: LazyTensors | None
    axes_dims: list[int] | None


def _open(location: Path, option: str) -> _Source:
    """Raises FileNotFoundError without weights, ValueError if they are no FLUX transformer."""
    if location.is_file():
        tensors, config = open_tensors(location), {}
    else:
        folder = location / _TRANSFORMER if (location / _TRANSFORMER).is_dir() else location
        tensors, config = open_tensors(part_file(folder, _TRANSFORMER)), read_config(folder)
    check_not_quantised(tensors.shapes, source=f"{option} {location}")
    kind = recognise(tensors.shapes)
    if kind not in _KINDS:
        wanted = ModelKind.FLUX.value
        raise ValueError(f"{option} {location} looks like {kind.value}, but the command expects {wanted}.")
    whole = tensors if location.is_file() else None
    return _Source(layout_flux.transformer_tensors(tensors), whole, config.get("axes_dims_rope"))


def _facts(source: _Source) -> FluxFacts:
    config = layout_flux.transformer_config(shapes_of(source.tensors), axes_dims=source.axes_dims)
    return FluxFacts(not config["guidance"], config["in_channels"], config["out_channels"])


def inspect(spec: LoadSpec) -> FluxFacts:
    """What kind of FLUX a file, folder or hub name is; reads only names and shapes (a hub model is downloaded)."""
    return _facts(_open(locate(spec), spec.option))


def problems(spec: FluxLoadSpec) -> list[str]:
    """What is missing or cannot be used, one sentence each; looks at names and shapes only.

    A model that is not on this machine yet is not looked at.
    """
    found = []
    options = {"--ae": spec.vae, "--clip_l": spec.clip_l, "--t5xxl": spec.t5xxl}
    for option, given in options.items():
        if given and not Path(given).exists():
            found.append(f"{option} {given}: no such file or folder.")
    if found or not Path(spec.path).exists():
        return found
    try:
        location = locate(spec)
        source = _open(location, spec.option)
        wanted = ENCODERS if TEXT in spec.parts else ()
        encoders = {f"--{kind.name}": _find(kind, spec, location, source.whole) for kind in wanted}
        if spec.vae and Path(spec.vae).is_file():
            require_channels(vae_part(open_tensors(spec.vae), option="--ae"), LATENT_CHANNELS)
    except (ValueError, OSError) as error:
        return [str(error)]
    missing = [option for option, encoder in encoders.items() if encoder is None]
    if VAE in spec.parts and not spec.vae and not _has_autoencoder(location, source.whole):
        missing.insert(0, "--ae")
    if missing:
        found.append(f"{spec.option} {spec.path} holds the transformer alone: {', '.join(missing)} must be given.")
    return found


def _find(kind: EncoderKind, spec: FluxLoadSpec, location: Path, whole: LazyTensors | None) -> EncoderSource | None:
    return find_encoder(kind, spec.encoder(kind), location, whole)


def _has_autoencoder(location: Path, whole: LazyTensors | None) -> bool:
    return (location / "vae").is_dir() if whole is None else bool(layout_flux.autoencoder_tensors(whole))


# --- loading ---------------------------------------------------------------------------------------------------
def load_model(spec: FluxLoadSpec) -> FluxModules:
    """A transformer's file, a Diffusers folder or a hub name, with the files of the other parts -> modules.

    A part that has an option of its own wins over the one that comes with the model. Modules are in eval mode without
    gradients. Raises FileNotFoundError or ValueError that names the option, the file and the keys.
    """
    location = locate(spec)
    source = _open(location, spec.option)
    if source.whole is not None:
        layout_flux.warn_of_foreign_keys(source.whole)
    sources = {}
    for kind in ENCODERS if TEXT in spec.parts else ():
        encoder = _find(kind, spec, location, source.whole)
        if encoder is None:
            raise ValueError(f"{spec.option} {spec.path} holds no {kind.name}: name its file with --{kind.name}.")
        sources[kind.name] = encoder
    return FluxModules(
        transformer=spec.part(DENOISER, lambda: build_flux(
            source.tensors, dtype=spec.dtype, device=spec.device, axes_dims=source.axes_dims
        )),
        ae=spec.part(VAE, lambda: _load_autoencoder(spec, location, source.whole)),
        encoders={
            name: encoder.build(dtype=spec.encoder_dtypes.get(name, spec.dtype), device=spec.device)
            for name, encoder in sources.items()
        },
        encoder_sources=sources,
        source=location,
        facts=_facts(source),
    )  # fmt: skip


def _load_autoencoder(spec: FluxLoadSpec, location: Path, whole: LazyTensors | None) -> Any:
    if spec.vae or whole is None:
        option = "--ae" if spec.vae else spec.option
        return load_autoencoder(spec.vae or location, dtype=spec.vae_dtype, device=spec.device, option=option)
    part = layout_flux.autoencoder_tensors(whole)
    if not part:
        raise ValueError(f"{spec.option} {spec.path} holds no autoencoder: name its file with --ae.")
    return build_vae(
        part, dtype=spec.vae_dtype, device=spec.device, latent_channels=LATENT_CHANNELS, config=_AE_SETTINGS
    )


def load_autoencoder(path: str | Path, *, dtype: torch.dtype | None, device: torch.device | str, option: str) -> Any:
    """The autoencoder of a file or folder, which `option` names."""
    return load_vae(path, dtype, device=device, latent_channels=LATENT_CHANNELS, config=_AE_SETTINGS, option=option)


# --- saving ----------------------------------------------------------------------------------------------------
def save_transformer(
    path: Path,
    modules: FluxModules,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: tuple[int, int] = (0, 0),
) -> None:
    """The transformer under its original names, safetensors or pickle by the extension, cast to `dtype` if given.

    `counters` = (epochs, steps) of this run, added to those of a pickled source; only pickles hold them.
    """
    write_single_file(
        path, weights_of(modules.transformer), components=("",), dtype=dtype, metadata=metadata,
        counters=total_counters(modules.source, counters),
    )  # fmt: skip


def save_diffusers_folder(
    path: Path,
    modules: FluxModules,
    *,
    dtype: torch.dtype | None = None,
    use_safetensors: bool = True,
    tokenizers: Mapping[str, Any] | None = None,
) -> None:
    """A pipeline folder: transformer, VAE, scheduler, text encoders, and the tokenizers by name of encoder.

    An encoder that has been released is read again from where it came from.
    """
    folder = PipelineFolder(path, dtype=dtype, use_safetensors=use_safetensors)
    state, axes = weights_of(modules.transformer), modules.transformer.params.axes_dims
    config = layout_flux.diffusers_config(shapes_of(state), axes_dims=axes)
    folder.add_weights(_TRANSFORMER, config, layout_flux.to_diffusers(state))
    folder.add_module("vae", modules.ae)
    for kind in ENCODERS:
        encoder = modules.encoders.get(kind.name) or modules.encoder_sources[kind.name].build(dtype=None)
        folder.add_text_encoder(kind.folder, encoder)
        folder.add_tokenizer(TOKENIZER_FOLDERS[kind.name], (tokenizers or {}).get(kind.name))
    folder.add_scheduler(scheduler_config(is_schnell=modules.facts.is_schnell))
    folder.finish("FluxPipeline", {})


def scheduler_config(*, is_schnell: bool) -> dict[str, Any]:
    """The scheduler_config.json of a pipeline folder: dev's schedule depends on the size, schnell's does not."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 1.0 if is_schnell else 3.0,
        "use_dynamic_shifting": not is_schnell,
    }


def model_metadata(*, is_schnell: bool) -> dict[str, Any]:
    """What saved files say about such a model."""
    return {
        "ss_v2": False,
        "ss_base_model_version": "flux1",
        "architecture": "flux-1-schnell" if is_schnell else "flux-1-dev",
        "default_resolution": 1024,
        "prediction_type": None,
    }
