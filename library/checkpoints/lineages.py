"""Which scripts belong to which kinds of model, and what a model file or folder is; without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.headers import peek, read_json
from library.checkpoints.recognition import ModelKind, recognise

ROOT = Path(__file__).resolve().parent.parent.parent

_SD3 = frozenset({ModelKind.SD3, ModelKind.SD35_MEDIUM, ModelKind.SD35_LARGE, ModelKind.SD3_DIFFUSERS})
_FLUX = frozenset({ModelKind.FLUX, ModelKind.FLUX_SCHNELL, ModelKind.FLUX_DIFFUSERS})


@dataclass(frozen=True)
class Lineage:
    """One kind of model: the family that knows it, what its files are, how its scripts' names begin."""

    name: str  # what tables of network modules call it
    title: str
    family: str  # dotted path, as scripts have it
    kinds: frozenset[ModelKind]
    prefix: str

    def kinds_for(self, *, v2: bool | None) -> frozenset[ModelKind]:
        """`kinds`, or the one of a version where `--v2` tells two of them apart (None: the script has no `--v2`)."""
        if v2 is None or ModelKind.SD2 not in self.kinds:
            return self.kinds
        return frozenset({ModelKind.SD2 if v2 else ModelKind.SD1})

    def script_like(self, script: str) -> str | None:
        """The script that does for this kind of model what `script` does for another; None if there is none."""
        stem = re.sub(r"^(?:sdxl|sd3|flux)_", "", script)
        names = [f"{self.prefix}{stem}", *(f"{self.prefix}{other}" for other in _NAMES.get(stem, ()))]
        return next((name for name in names if (ROOT / name).is_file()), None)


#: names that scripts for the same task have where the prefix is not the only difference
_NAMES: Mapping[str, tuple[str, ...]] = {
    "train_db.py": ("train.py",), "fine_tune.py": ("train.py",), "train.py": ("fine_tune.py",),
    "train_controlnet.py": ("train_control_net.py",),
}  # fmt: skip

LINEAGES = (
    Lineage(
        "sd", "Stable Diffusion 1.x and 2.x", "library.families.sd:StableDiffusion",
        frozenset({ModelKind.SD1, ModelKind.SD2}), "",
    ),
    Lineage(
        "sdxl", "SDXL", "library.families.sdxl:StableDiffusionXL", frozenset({ModelKind.SDXL}), "sdxl_",
    ),
    Lineage("sd3", "Stable Diffusion 3 and 3.5", "library.families.sd3:StableDiffusion3", _SD3, "sd3_"),
    Lineage("flux", "FLUX.1", "library.families.flux:Flux", _FLUX, "flux_"),
)  # fmt: skip

#: width of text vectors -> the version, of a lineage that has several
VERSIONS: Mapping[int, ModelKind] = {768: ModelKind.SD1, 1024: ModelKind.SD2}


def lineage_of_family(path: str) -> Lineage | None:
    """The lineage of a script's family; None for families that are not here."""
    return next((lineage for lineage in LINEAGES if lineage.family == path), None)


def lineage_of(kinds: Iterable[ModelKind]) -> Lineage | None:
    """The lineage that knows one of these kinds."""
    wanted = frozenset(kinds)
    return next((lineage for lineage in LINEAGES if lineage.kinds & wanted), None)


# --- models ----------------------------------------------------------------------------------------------------
_PIPELINES: Mapping[str, ModelKind] = {
    "StableDiffusionXLPipeline": ModelKind.SDXL, "StableDiffusion3Pipeline": ModelKind.SD3,
    "FluxPipeline": ModelKind.FLUX,
}  # fmt: skip
_TEXT_LAYER = re.compile(
    r"^cond_stage_model\.(?:transformer\.(?:text_model\.)?encoder\.layers|model\.transformer\.resblocks)\.(\d+)\."
)


def kind_of_model(path: str | Path) -> ModelKind | None:
    """What a checkpoint file or a Diffusers folder is; None where that cannot be said without reading it as a whole."""
    path = Path(path)
    if path.is_dir():
        return _kind_of_folder(path)
    header = peek(path)
    return None if header is None else recognise(header.shapes)


def _kind_of_folder(folder: Path) -> ModelKind | None:
    name = read_json(folder / "model_index.json").get("_class_name")
    if name != "StableDiffusionPipeline":
        return _PIPELINES.get(str(name))
    activation = read_json(folder / "text_encoder" / "config.json").get("hidden_act")
    return {"quick_gelu": ModelKind.SD1, "gelu": ModelKind.SD2}.get(str(activation))


def text_layers(path: str | Path) -> int | None:
    """How many layers the one text encoder of a model has that `--clip_skip` can choose from; None if unknown."""
    path = Path(path)
    if path.is_dir():
        if (path / "text_encoder_2").is_dir():
            return None
        count = read_json(path / "text_encoder" / "config.json").get("num_hidden_layers")
        return count if isinstance(count, int) else None
    header = peek(path)
    numbers = {match[1] for key in (header.shapes if header else ()) if (match := _TEXT_LAYER.match(key))}
    if not numbers or header is None:
        return None
    is_complete_tower = len(numbers) == 24 or any(key.endswith(".text_projection") for key in header.shapes)
    leaves_last_out = is_complete_tower and any(".resblocks." in key for key in header.shapes)  # never used
    return len(numbers) - leaves_last_out


def prediction_options(path: str | Path) -> list[str]:
    """The options that the markers in a checkpoint's keys ask for."""
    header = peek(path)
    markers = {"v_pred": "--v_parameterization", "ztsnr": "--zero_terminal_snr"}
    return [option for key, option in markers.items() if header is not None and key in header.shapes]
