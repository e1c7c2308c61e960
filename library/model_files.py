"""What U-Net models of all families do alike with files: finding them, their text encoders, single files, folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import layout_clip
from library.checkpoints.file_kind import holds_safetensors
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
from library.checkpoints.stored import weights_of
from library.checkpoints.tensors import (
    Operation,
    RenamedTensors,
    cast,
    is_safetensors,
    open_tensors,
    read_metadata,
    save_pickle,
    save_tensors,
)
from library.checkpoints.unpickle import load_pickle
from library.models.t5 import T5TextEncoder
from library.models.text_encoders import ClipTextEncoder, build_clip
from library.text.clip import ClipTokenizer
from library.text.t5 import T5Tokenizer

logger = logging.getLogger(__name__)


DENOISER, VAE, TEXT = "denoiser", "vae", "text encoders"
ALL_PARTS = frozenset({DENOISER, VAE, TEXT})
#: keys of empty tensors by which checkpoints say that they predict velocity, and that their noise ends pure
V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER = "v_pred", "ztsnr"


@dataclass(frozen=True)
class LoadSpec:
    """What to load and how; a dtype of None keeps the file's. `option` is what messages call the path."""

    path: str
    dtype: torch.dtype | None = None  # U-Net and text encoders
    vae_dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    vae: str | None = None
    option: str = "--pretrained_model_name_or_path"
    variant: str | None = None  # of a folder's weight files, e.g. "fp16"; at least one component must have it
    parts: frozenset[str] = ALL_PARTS  # the others are neither read nor needed: None stands in their place

    def part(self, name: str, build: Callable[[], Any]) -> Any:
        """What `build` makes if the part is wanted."""
        return build() if name in self.parts else None


# --- loading ---------------------------------------------------------------------------------------------------
def locate(spec: LoadSpec) -> Path:
    """The checkpoint file or the (downloaded) folder that a path or hub name means; links are followed."""
    path = Path(spec.path)
    return path.resolve() if path.exists() else hub_folder(spec.path, option=spec.option, variant=spec.variant)


def check_folder(folder: Path, spec: LoadSpec, parts: Sequence[str]) -> str | None:
    """The variant of weight files to look for in the sub-folders `parts` (and `vae`, unless `--vae` replaces it).

    Raises FileNotFoundError if a component or every file of a wanted variant is missing.
    """
    parts = (*parts, *(() if spec.vae else ("vae",)))
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


def clip_of_folder(
    folder: Path, part: str, spec: LoadSpec, *, activation: str, variant: str | None
) -> ClipTextEncoder:
    """The text encoder in the sub-folder `part`; its config.json says what shapes cannot tell."""
    config = read_config(folder / part)
    return build_clip(
        layout_clip.normalize_hf(open_tensors(part_file(folder / part, part, variant))), activation=activation,
        component=part.replace("_", " "), dtype=spec.dtype, device=spec.device,
        overrides={key: config[key] for key in ("hidden_act", "num_attention_heads") if key in config},
    )  # fmt: skip


@dataclass(frozen=True)
class RecordedNoise:
    """What a model says about the noise it was trained with: "epsilon" or "v" (None: nothing), zero terminal SNR."""

    prediction_type: str | None = None
    has_zero_terminal_snr: bool = False


def recorded_noise(source: Path) -> RecordedNoise:
    """From the markers among a file's keys, its metadata, or a folder's scheduler. Pickles are not opened."""
    if source.is_dir():
        config = read_config(source / "scheduler", "scheduler_config.json")
        kind, is_rescaled = config.get("prediction_type"), config.get("rescale_betas_zero_snr") is True
    elif source.is_file() and is_safetensors(source):
        keys, metadata = open_tensors(source), read_metadata(source)
        kind = "v" if V_PREDICTION_MARKER in keys else metadata.get("modelspec.prediction_type")
        is_rescaled = ZERO_TERMINAL_SNR_MARKER in keys or metadata.get("ss_zero_terminal_snr") == "True"
    else:
        return RecordedNoise()
    return RecordedNoise({"epsilon": "epsilon", "v": "v", "v_prediction": "v"}.get(str(kind)), is_rescaled)


def recorded_prediction_type(source: Path) -> str | None:
    """What a model says that it predicts: "epsilon", "v", or None."""
    return recorded_noise(source).prediction_type


# --- saving a single file --------------------------------------------------------------------------------------
def write_single_file(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    components: tuple[str, ...],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    counters: tuple[int, int],
) -> None:
    """Writes safetensors or a pickle by the extension, atomically; keys below `components` are cast to `dtype`.

    `counters` = (epochs, steps), which only pickles hold.
    """
    plan = {key: (key, _to_dtype(dtype) if key.startswith(components) else None) for key in tensors}
    prepared = RenamedTensors(tensors, plan)
    if is_safetensors(path):
        save_tensors(path, prepared, metadata={"format": "pt", **(metadata or {})})
        return
    state = {key: prepared[key].detach().cpu().contiguous().clone() for key in prepared}
    save_pickle(path, {"state_dict": state, "epoch": counters[0], "global_step": counters[1]})


def _to_dtype(dtype: torch.dtype | None) -> Operation:
    return lambda tensor: cast(tensor, dtype=dtype)


def total_counters(source: Path, counters: tuple[int, int]) -> tuple[int, int]:
    """(epochs, steps) of this run on top of those that a pickled source file holds."""
    if not source.is_file() or holds_safetensors(source):
        return counters
    content = load_pickle(source)
    return (content.epoch or 0) + counters[0], (content.global_step or 0) + counters[1]


# --- saving a folder -------------------------------------------------------------------------------------------
_SCHEDULER_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {"interpolation_type": "linear", "timestep_spacing": "leading"},
}


def scheduler_config(*, v_parameterization: bool, name: str = "DDIMScheduler") -> dict[str, Any]:
    """The scheduler_config.json that goes into a Diffusers folder; `name` is the scheduler's class."""
    config: dict[str, Any] = {
        "_class_name": name,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v_parameterization else "epsilon",
        "steps_offset": 1,
        "trained_betas": None,
    }
    return {**config, **_SCHEDULER_SETTINGS[name]}


class PipelineFolder:
    """A Diffusers folder being written, part by part and without a network; `finish` makes it a pipeline."""

    def __init__(self, folder: str | Path, *, dtype: torch.dtype | None, use_safetensors: bool) -> None:
        self.folder = Path(folder)
        self._dtype, self._use_safetensors = dtype, use_safetensors
        self._components: dict[str, tuple[str, str] | None] = {}

    def add_weights(self, part: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """A diffusers module: `config` is its config.json with its class name."""
        suffix = ".safetensors" if self._use_safetensors else ".bin"
        write_json(self.folder / part / "config.json", config)
        write_part(self.folder / part / f"{weight_stem(part)}{suffix}", tensors, self._dtype)
        self._components[part] = ("diffusers", config["_class_name"])

    def add_module(self, part: str, module: Any) -> None:
        """A diffusers module as it is."""
        self.add_weights(part, module_config(module), weights_of(module))

    def add_text_encoder(self, part: str, encoder: ClipTextEncoder | T5TextEncoder) -> None:
        """A CLIP or T5 encoder. CLIP keys carry the `text_model.` level, which older libraries need."""
        name, kind = "T5EncoderModel", "t5"
        if isinstance(encoder, ClipTextEncoder):
            name = "CLIPTextModel" if encoder.text_projection is None else "CLIPTextModelWithProjection"
            kind = "clip_text_model"
        config = {**encoder.config.to_diff_dict(), "architectures": [name], "model_type": kind}
        config.pop("_name_or_path", None)
        config["dtype"] = str(self._dtype or encoder.dtype).removeprefix("torch.")
        write_json(self.folder / part / "config.json", config)
        file = "model.safetensors" if self._use_safetensors else "pytorch_model.bin"
        write_part(self.folder / part / file, weights_of(encoder), self._dtype)
        self._components[part] = ("transformers", name)

    def add_scheduler(self, config: Mapping[str, Any]) -> None:
        """A scheduler_config.json, such as `scheduler_config` makes."""
        write_json(self.folder / "scheduler" / "scheduler_config.json", config)
        self._components["scheduler"] = ("diffusers", config["_class_name"])

    def add_tokenizer(self, part: str, tokenizer: ClipTokenizer | T5Tokenizer | None) -> None:
        """A tokenizer's files, or a warning that they are missing."""
        if tokenizer is None:
            logger.warning("%s: no tokenizer was at hand; put its files into the folder '%s'", self.folder, part)
            self.add_missing(part)
            return
        if isinstance(tokenizer, ClipTokenizer):
            tokenizer.save(self.folder / part, pads_as_used=True)
            self._components[part] = ("transformers", "CLIPTokenizer")
        else:
            tokenizer.save(self.folder / part)
            self._components[part] = ("transformers", "T5TokenizerFast")

    def add_missing(self, *parts: str) -> None:
        """Parts that the pipeline knows and this folder does not have."""
        self._components |= dict.fromkeys(parts)

    def finish(self, pipeline: str, settings: Mapping[str, Any]) -> None:
        """model_index.json: the pipeline's class, its own settings (or missing parts), and every part added."""
        write_json(self.folder / "model_index.json", {**model_index(pipeline, self._components), **settings})
