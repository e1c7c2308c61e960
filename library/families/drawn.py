"""The family of a script that draws: a fixed one, or the one that the model file belongs to."""

from __future__ import annotations

from pathlib import Path

from library.checkpoints.file_kind import holds_safetensors
from library.checkpoints.folders import hub_folder, read_config
from library.checkpoints.recognition import ModelKind, check_not_quantised, recognise, require_kind
from library.checkpoints.tensors import open_tensors
from library.families.base import ModelFamily
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.options.generation import GenerationOptions

OPTION = "--ckpt"


def stable_diffusion(options: GenerationOptions) -> ModelFamily:
    """Stable Diffusion 1.x, or with `--v2` 2.x. Raises ValueError if the file is surely something else."""
    name = str(options.model.ckpt)
    if Path(name).is_file() and holds_safetensors(name):  # other kinds of files would have to be read as a whole
        expected = ModelKind.SD2 if options.model.v2 else ModelKind.SD1
        _require(model_kind(name), expected, name)
    return _stable_diffusion(options, v2=options.model.v2)


def of_model(options: GenerationOptions) -> ModelFamily:
    """What `--v1`, `--v2` or `--sdxl` says, else what the model's keys say. Raises ValueError for what cannot draw."""
    if options.family.v1 or options.model.v2:
        return stable_diffusion(options)
    if options.family.sdxl:
        return stable_diffusion_xl(options)
    name = str(options.model.ckpt)
    kind = model_kind(name)
    if kind is ModelKind.SDXL:
        return stable_diffusion_xl(options)
    if kind is not ModelKind.SD2:
        _require(kind, ModelKind.SD1, name)
    return _stable_diffusion(options, v2=kind is ModelKind.SD2)


def stable_diffusion_xl(options: GenerationOptions) -> ModelFamily:
    """SDXL. Raises ValueError if the file is surely something else."""
    name = str(options.model.ckpt)
    if Path(name).is_file() and holds_safetensors(name):
        _require(model_kind(name), ModelKind.SDXL, name)
    family = StableDiffusionXL(options.for_family(v2=False))
    family.model_option = OPTION
    family.follows_model = True
    return family


def _require(found: ModelKind, expected: ModelKind, name: str) -> None:
    hint = {
        (ModelKind.SD1, ModelKind.SD2): "Remove --v2.", (ModelKind.SD2, ModelKind.SD1): "Add --v2.",
    }.get((found, expected), "")  # fmt: skip
    if not hint and {found, expected} <= {ModelKind.SD1, ModelKind.SD2, ModelKind.SDXL}:
        hint = "gen_img.py draws with both, if no option says which it is."
    require_kind(found, expected, source=name, option=OPTION, hint=hint)


def _stable_diffusion(options: GenerationOptions, *, v2: bool) -> ModelFamily:
    family = StableDiffusion(options.for_family(v2=v2))
    family.model_option = OPTION
    family.follows_model = True
    return family


def model_kind(name: str) -> ModelKind:
    """What a checkpoint file, a Diffusers folder or a hub name is; hub models are downloaded."""
    path = Path(name)
    if path.is_file():
        shapes = open_tensors(path).shapes
        check_not_quantised(shapes, source=name)
        return recognise(shapes)
    folder = path if path.is_dir() else hub_folder(name, option=OPTION)
    if (folder / "text_encoder_2").is_dir():
        return ModelKind.SDXL
    activation = read_config(folder / "text_encoder").get("hidden_act")
    return ModelKind.SD2 if activation == "gelu" else ModelKind.SD1
