"""SDXL single files: which key belongs to which component, the way back, and the U-Net's dimensions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoints import layout_clip, layout_unet, layout_vae
from library.checkpoints.extras import warn_of_extras
from library.checkpoints.layout_unet import UnetStructure
from library.checkpoints.recognition import UNET_PREFIX, ModelKind, check_kind, is_ignorable, preserved
from library.checkpoints.tensors import LazyTensors, RenamedTensors, Shapes, dtypes_of, select, shapes_of

logger = logging.getLogger(__name__)

VAE_PREFIX = "first_stage_model."
TEXT1_PREFIX = "conditioner.embedders.0.transformer."  # CLIP-L under Hugging Face names
TEXT2_PREFIX = "conditioner.embedders.1.model."  # OpenCLIP bigG under its own names
COMPONENT_PREFIXES = (UNET_PREFIX, VAE_PREFIX, TEXT1_PREFIX, TEXT2_PREFIX)
LOGIT_SCALE = f"{TEXT2_PREFIX}logit_scale"
NORM_GROUPS = 32


@dataclass(frozen=True)
class SdxlUnetConfig:
    """Every dimension of an SDXL U-Net; levels go from full resolution down."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]  # per level
    heads: tuple[int, ...]  # attention heads per level
    structure: UnetStructure  # resnets and attention depths
    context_width: int  # of the text states
    vector_width: int  # of the pooled text and sizes
    time_width: int  # of the embedding that every resnet gets


# --- a file's parts --------------------------------------------------------------------------------------------
def check_file(tensors: LazyTensors, *, option: str) -> None:
    """Raises ValueError that says what the file is unless it is an SDXL base checkpoint with float weights."""
    check_kind(tensors.shapes, ModelKind.SDXL, source=tensors.source, option=option)


def normalize(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The whole file with `text_model.` where its first text encoder lacks it, without keys that mean nothing.

    Keys that neither belong to a component nor are known to be harmless stay, so that `warn_of_foreign_keys` sees them.
    """
    plan = {}
    for key in tensors:
        name = _normal_name(key)
        if name is not None:
            plan[name] = (key, None)
    return RenamedTensors(tensors, plan)


def _normal_name(key: str) -> str | None:
    if is_ignorable(key):
        return None
    if not key.startswith(TEXT1_PREFIX):
        return key
    inner = layout_clip.normalize_hf_name(key.removeprefix(TEXT1_PREFIX))
    return None if inner is None else TEXT1_PREFIX + inner


def warn_of_foreign_keys(tensors: LazyTensors) -> None:
    """One warning about the keys of a (normalised) file that belong to no component; bare U-Nets are not looked at."""
    if any(key.startswith(UNET_PREFIX) for key in tensors):
        warn_of_extras([key for key in tensors if not key.startswith(COMPONENT_PREFIXES)], source=tensors.source)


def unet_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The U-Net of a (normalised) file under its original names, with linear `proj_in`/`proj_out`.

    A file without prefixes is a U-Net as a whole; empty if there is none.
    """
    prefix = "" if "input_blocks.0.0.weight" in tensors else UNET_PREFIX
    plan = {
        key.removeprefix(prefix): (key, layout_unet.projection_operation(key, shape, linear=True))
        for key, shape in shapes_of(tensors).items()
        if key.startswith(prefix)
    }
    return RenamedTensors(tensors, plan)


def vae_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The VAE of a (normalised) file in diffusers layout; empty if the file has none."""
    return layout_vae.to_diffusers(select(tensors, VAE_PREFIX))


def text1_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The first text encoder (CLIP-L) of a (normalised) file under `text_model.…` names; empty if there is none."""
    return layout_clip.normalize_hf(select(tensors, TEXT1_PREFIX))


def text2_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The second text encoder (OpenCLIP) under `text_model.…` names with `text_projection.weight`; empty if none.

    OpenCLIP's `text_projection` is transposed, as a Linear's weight needs it.
    Raises ValueError if the encoder has no projection: the pooled text could not be computed.
    """
    part = layout_clip.openclip_to_hf(select(tensors, TEXT2_PREFIX), projection=True)
    if part and "text_projection.weight" not in part:
        raise ValueError(f"{part.source}: {TEXT2_PREFIX}text_projection is missing, the pooled text needs it.")
    return part


# --- the way back ----------------------------------------------------------------------------------------------
def to_single_file(
    unet: Mapping[str, Tensor],
    text_encoder1: Mapping[str, Tensor],
    text_encoder2: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    *,
    logit_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Module state dicts (original U-Net names, `text_model.…` names, diffusers VAE) -> the keys of a single file.

    The second encoder's `text_projection.weight` is transposed back. `logit_scale` is the source file's; without one
    it is ln 100, which strict readers want to find.
    """
    text2 = layout_clip.hf_to_openclip(text_encoder2)
    if "text_projection" not in text2:
        raise ValueError("The second text encoder has no text_projection.weight; SDXL files need it.")
    result = {UNET_PREFIX + key: value for key, value in unet.items()}
    result.update({TEXT1_PREFIX + key: value for key, value in text_encoder1.items()})
    result.update({TEXT2_PREFIX + key: value for key, value in text2.items()})
    if logit_scale is None:
        dtype = dtypes_of(text_encoder2)["text_projection.weight"]
        logit_scale = torch.tensor(math.log(100), dtype=dtype)
    result[LOGIT_SCALE] = logit_scale
    if vae is not None:
        compvis = layout_vae.to_compvis(vae)
        result.update({VAE_PREFIX + key: compvis[key] for key in compvis})
    return result


def preserved_tensors(source: LazyTensors, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file that training started from which nothing written replaces.

    EMA copies and position ids are left out (stale after training); markers such as `v_pred`, schedules and, where no
    VAE is written, the VAE keep their bits.
    """
    projection = f"{TEXT2_PREFIX}text_projection.weight"
    return preserved(source, lambda key: (_normal_name(key) or key) in written or key == projection)


# --- dimensions ------------------------------------------------------------------------------------------------
def unet_config(shapes: Shapes, *, heads: int | Sequence[int] | None = None) -> SdxlUnetConfig:
    """The dimensions of a U-Net in original layout (no prefix).

    `heads`: heads per level (or one for all) where a folder's config.json says so; otherwise 64 channels per head, or
    the next power of two below that divides a level's width.
    Raises ValueError if it is no SDXL U-Net or its parts do not fit together.
    """
    if "label_emb.0.0.weight" not in shapes:
        raise ValueError("The U-Net has no label_emb (sizes and pooled text): it is not SDXL's.")
    structure = layout_unet.structure_of_original(shapes)
    layout_unet.check_levels(structure)
    channels = tuple(layout_unet.level_channels(shapes, structure))
    wrong = [width for width in channels if width % NORM_GROUPS]
    if wrong:
        raise ValueError(f"The U-Net has levels of {wrong} channels; widths must be multiples of {NORM_GROUPS}.")
    time_width, vector_width = shapes["label_emb.0.0.weight"]
    return SdxlUnetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        channels=channels,
        heads=_heads(channels, heads),
        structure=structure,
        context_width=layout_unet.context_width(shapes),
        vector_width=vector_width,
        time_width=time_width,
    )


def _heads(channels: tuple[int, ...], heads: int | Sequence[int] | None) -> tuple[int, ...]:
    if heads is None:
        found = tuple(c // next(width for width in (64, 32) if c % width == 0) for c in channels)
        if any(c % 64 for c in channels):
            logger.info("U-Net channels %s: using %s attention heads", list(channels), found)
        return found
    given = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    if len(given) != len(channels) or any(h < 1 or c % h for c, h in zip(channels, given, strict=False)):
        raise ValueError(f"config.json gives {list(given)} attention heads for levels of {list(channels)} channels.")
    return given
