"""SD 1.x/2.x single files: which key belongs to which component, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from library.checkpoints import layout_clip, layout_unet, layout_vae
from library.checkpoints.extras import warn_of_extras
from library.checkpoints.recognition import UNET_PREFIX, is_ignorable, preserved
from library.checkpoints.tensors import LazyTensors, RenamedTensors, Shapes, select, shapes_of

VAE_PREFIX = "first_stage_model."
SD1_TEXT_PREFIX = "cond_stage_model.transformer."
SD2_TEXT_PREFIX = "cond_stage_model.model."
COMPONENT_PREFIXES = (UNET_PREFIX, VAE_PREFIX, SD1_TEXT_PREFIX, SD2_TEXT_PREFIX)
_SD1_TEXT_ROOTS = ("embeddings.", "encoder.", "final_layer_norm.")


def normalize(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The whole file with `text_model.` inserted where an SD1 file lacks it, and without keys that mean nothing.

    Keys that neither belong to a component nor are known to be harmless stay, so that `warn_of_foreign_keys` sees them.
    """
    plan = {}
    for key in tensors:
        if is_ignorable(key):
            continue
        name = key
        if key.startswith(SD1_TEXT_PREFIX):
            rest = key.removeprefix(SD1_TEXT_PREFIX)
            if rest.startswith(_SD1_TEXT_ROOTS):
                name = f"{SD1_TEXT_PREFIX}text_model.{rest}"
        plan[name] = (key, None)
    return RenamedTensors(tensors, plan)


def unet_tensors(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The U-Net of a (normalised) file under its original names; a file without prefixes is a U-Net as a whole."""
    part = select(tensors, UNET_PREFIX)
    if not part and "input_blocks.0.0.weight" in tensors:
        part = RenamedTensors(tensors, {key: (key, None) for key in tensors})
    return part


def vae_tensors(tensors: Mapping[str, Tensor]) -> RenamedTensors:
    """The VAE of a (normalised) file in diffusers layout; empty if the file has none."""
    return layout_vae.to_diffusers(select(tensors, VAE_PREFIX))


def text_tensors(tensors: Mapping[str, Tensor], *, v2: bool) -> RenamedTensors:
    """The text encoder of a (normalised) file under `text_model.…` names; empty if the file has none."""
    if not v2:
        return layout_clip.normalize_hf(select(tensors, SD1_TEXT_PREFIX))
    part = select(tensors, SD2_TEXT_PREFIX)
    return layout_clip.openclip_to_hf(part, layers=sd2_layers(shapes_of(part)))


def sd2_layers(shapes: Shapes) -> int:
    """How many OpenCLIP blocks the SD2 text encoder uses: all but the last of a complete tower.

    The U-Net was trained on the penultimate layer. 24 blocks: 23; 23: all; other counts: one less if the file also
    holds a `text_projection`, which belongs to complete towers.
    """
    count = layout_clip.openclip_layer_count(shapes)
    if count == 24:
        return 23
    if count == 23:
        return 23
    return count - 1 if "text_projection" in shapes else count


def warn_of_foreign_keys(tensors: LazyTensors, *, v2: bool) -> None:
    """One warning about the keys of a (normalised) file that belong to no component; bare U-Nets are not looked at."""
    known = (UNET_PREFIX, VAE_PREFIX, SD2_TEXT_PREFIX if v2 else SD1_TEXT_PREFIX)
    if any(key.startswith(UNET_PREFIX) for key in tensors):
        warn_of_extras([key for key in tensors if not key.startswith(known)], source=tensors.source)


# --- the way back ----------------------------------------------------------------------------------------------
def to_single_file(
    unet: Mapping[str, Tensor], text_encoder: Mapping[str, Tensor], vae: Mapping[str, Tensor] | None, *, v2: bool
) -> dict[str, Tensor]:
    """Module state dicts (diffusers and `text_model.…` names) -> the keys of a single file."""
    result: dict[str, Tensor] = {}
    original = layout_unet.to_original(unet, linear_projection=v2)
    result.update({UNET_PREFIX + key: original[key] for key in original})
    if v2:
        text = layout_clip.hf_to_openclip(
            {key: value for key, value in text_encoder.items() if key != "text_projection.weight"}
        )
        result.update({SD2_TEXT_PREFIX + key: value for key, value in text.items()})
    else:
        result.update({SD1_TEXT_PREFIX + key: value for key, value in text_encoder.items()})
    if vae is not None:
        compvis = layout_vae.to_compvis(vae)
        result.update({VAE_PREFIX + key: compvis[key] for key in compvis})
    return result


def sd2_tail(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What readers of SD2 files expect but the model does not have: a last block, a projection, a logit scale.

    `tensors` is the single file without them. The last block is a copy of the one before it; the projection is all
    ones, the scale ln 100.
    """
    part = {key.removeprefix(SD2_TEXT_PREFIX): tensors[key] for key in tensors if key.startswith(SD2_TEXT_PREFIX)}
    count = layout_clip.openclip_layer_count(shapes_of(part))
    last = f"transformer.resblocks.{count - 1}."
    tail = {
        f"transformer.resblocks.{count}.{key.removeprefix(last)}": value.clone()
        for key, value in part.items()
        if key.startswith(last)
    }
    bias = part["ln_final.bias"]
    tail["text_projection"] = torch.ones(bias.shape[0], bias.shape[0], dtype=bias.dtype)
    tail["logit_scale"] = torch.tensor(4.6052, dtype=bias.dtype)
    return {SD2_TEXT_PREFIX + key: value for key, value in tail.items()}


def preserved_tensors(source: LazyTensors, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file that training started from which nothing written replaces.

    EMA copies and position ids are left out (stale after training); everything else keeps its bits.
    """
    canonical = normalize(source).origins()
    return preserved(source, lambda key: canonical.get(key, key) in written)
