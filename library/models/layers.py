"""Small things that several denoisers need: a time embedding with a name of its own, and the choice of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def rename_time_embedding(unet: nn.Module) -> None:
    """Makes `unet.time_embedding` an instance of a subclass called `TimeEmbedding`.

    LyCORIS replaces `TimestepEmbedding` modules by class name and, separately, the U-Net's `time_embedding` by path;
    with the library's own class both rules match and its names collide.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    class TimeEmbedding(TimestepEmbedding):
        pass

    unet.time_embedding.__class__ = TimeEmbedding


def xformers_problem(device: torch.device | str) -> str | None:
    """Why xformers' attention cannot be used on `device` (found by one real call), or None."""
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 16, 1, 32, device=device, dtype=torch.float32)
        memory_efficient_attention(query, query, query)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no further message'}"
    return None


def set_attention(unet: Any, vae: Any, kind: str | None) -> None:
    """Chooses how diffusers modules compute attention; either may be None.

    kind: None or "sdpa" = torch's scaled_dot_product_attention (the default of this program), "mem_eff_attn" = the
    same in slices of the batch-and-heads axis, "xformers" = xformers, after one real call.
    Raises ValueError if xformers is asked for and does not work here, or for an unknown kind.
    """
    if kind not in (None, "sdpa", "mem_eff_attn", "xformers"):
        raise ValueError(f"attention {kind!r} is unknown; allowed: sdpa, mem_eff_attn, xformers.")
    models = [model for model in (unet, vae) if model is not None]
    if kind == "xformers":
        for model in models:
            problem = xformers_problem(model.device)
            if problem:
                raise ValueError(
                    f"--xformers: xformers cannot be used here ({problem}). Leave the option out: --sdpa is the default "
                    "and as fast, or install an xformers build that matches the installed torch."
                )
            model.enable_xformers_memory_efficient_attention()
        return
    from diffusers.models.attention_processor import AttnProcessor2_0

    processor = MemoryEfficientProcessor() if kind == "mem_eff_attn" else AttnProcessor2_0()
    for model in models:
        model.set_attn_processor(processor)
