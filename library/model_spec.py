"""The `modelspec.*` entries of saved files (Stability AI's model metadata standard)."""

from __future__ import annotations

import base64
import dataclasses
import functools
import logging
import mimetypes
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.options import Options

logger = logging.getLogger(__name__)

SPEC_VERSION = "1.0.1"
CHECKPOINT, LORA, TEXTUAL_INVERSION = "checkpoint", "lora", "textual-inversion"
_DEFAULT_TITLES = {CHECKPOINT: "Checkpoint", LORA: "LoRA", TEXTUAL_INVERSION: "TextualInversion"}

_FLUX = "https://github.com/black-forest-labs/flux"
_GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"
_DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class ModelSpec:
    """What the standard asks about one saved file; None leaves an entry out."""

    architecture: str  # of the base model, e.g. "stable-diffusion-v1"
    model_type: str  # CHECKPOINT, or what follows the architecture: "lora", "textual-inversion", "controlnet", ...
    resolution: tuple[int, int]  # width, height
    title: str | None = None  # None: a name from kind and time
    prediction_type: str | None = None
    timestep_range: tuple[int, int] | None = None
    encoder_layer: int | None = None  # clip skip
    further: Mapping[str, str] = field(default_factory=dict)  # author, license, thumbnail (path or data URL), ...

    def entries(self, created_at: float) -> dict[str, str]:
        """The metadata of a file that is saved at `created_at` (Unix time)."""
        is_checkpoint = self.model_type == CHECKPOINT
        values: dict[str, Any] = {
            "sai_model_spec": SPEC_VERSION,
            "architecture": self.architecture if is_checkpoint else f"{self.architecture}/{self.model_type}",
            "implementation": implementation(self.architecture, self.model_type),
            "implementation_version": f"sd-scripts/{program_revision() or 'unknown'}",
            "title": self.title or f"{_DEFAULT_TITLES.get(self.model_type, 'Checkpoint')}@{created_at}",
            "resolution": "{}x{}".format(*self.resolution),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(created_at)),
            "prediction_type": self.prediction_type,
            "encoder_layer": self.encoder_layer,
            **self.further,
        }
        if self.timestep_range is not None:
            values["timestep_range"] = "{},{}".format(*self.timestep_range)
        if values.get("thumbnail") is not None:
            values["thumbnail"] = thumbnail_data_url(values["thumbnail"])
        return {f"modelspec.{name}": str(value) for name, value in values.items() if value is not None}


def model_spec(
    options: Options, family_metadata: Mapping[str, Any], model_type: str, trained: tuple[int, int] | None = None
) -> ModelSpec:
    """The entries that options and model give.

    `family_metadata` is `ModelFamily.model_metadata()`: `architecture`, `default_resolution` (pixels, or width and
    height), `prediction_type` (None where the standard has no word for it). `trained` is the resolution (width, height)
    of the data; where it is not known, `--resolution` and then the family's default stand for it.
    """
    resolution = trained or options.dataset.resolution or family_metadata["default_resolution"]
    if isinstance(resolution, int):
        resolution = (resolution, resolution)
    low, high = options.noise.min_timestep, options.noise.max_timestep
    further = {
        item.name.removeprefix("metadata_"): getattr(options.model_spec, item.name)
        for item in dataclasses.fields(options.model_spec)
        if getattr(options.model_spec, item.name) is not None
    }
    return ModelSpec(
        architecture=family_metadata["architecture"],
        model_type=model_type,
        resolution=(resolution[0], resolution[1]),
        title=further.pop("title", None) or options.saving.output_name,
        prediction_type=family_metadata.get("prediction_type"),
        timestep_range=None if low is None and high is None else (low or 0, 1000 if high is None else high),
        encoder_layer=options.model.clip_skip,
        further=further,
    )


def implementation(architecture: str, model_type: str) -> str:
    """Whose code names the tensors of such a file."""
    if architecture.startswith("flux"):
        return _FLUX
    is_xl_lora = architecture.startswith("stable-diffusion-xl") and model_type == LORA
    if is_xl_lora or model_type in (TEXTUAL_INVERSION, CHECKPOINT):
        return _GENERATIVE_MODELS
    return _DIFFUSERS


def thumbnail_data_url(thumbnail: str) -> str | None:
    """A picture file as a base64 data URL; data URLs are kept; None, with a warning, for a missing file."""
    if thumbnail.startswith("data:"):
        return thumbnail
    try:
        content = Path(thumbnail).read_bytes()
    except OSError as error:
        logger.warning("--metadata_thumbnail %s cannot be read and is left out: %s", thumbnail, error.strerror)
        return None
    kind = mimetypes.guess_type(thumbnail)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@functools.cache
def program_revision() -> str | None:
    """The commit that this program's checkout is at; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
