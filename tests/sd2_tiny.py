"""A tiny SD 2 made from the tiny SD 1 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from library.checkpoints import layout_clip, layout_sd


def sd2_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tiny model with linear projections and an OpenCLIP text tower of three blocks, as in an SD 2 file."""
    old = layout_sd.SD1_TEXT_PREFIX
    text = {key.removeprefix(old): value for key, value in stored.items() if key.startswith(old)}
    tensors = {k: v for k, v in stored.items() if not k.startswith("cond_stage_model.")}
    for key in [k for k in tensors if k.endswith((".proj_in.weight", ".proj_out.weight")) and "diffusion_model" in k]:
        tensors[key] = tensors[key][:, :, 0, 0].clone()
    tensors |= {layout_sd.SD2_TEXT_PREFIX + k: v for k, v in layout_clip.hf_to_openclip(text).items()}
    tensors.update(layout_sd.sd2_tail(tensors))
    return tensors
