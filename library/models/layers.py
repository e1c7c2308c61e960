"""Small things that several denoisers need: a time embedding with a name of its own, and the choice of attention."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.logs import warn_once
from library.models.attention import KINDS

logger = logging.getLogger(__name__)


class TimeEmbedding(TimestepEmbedding):
    """diffusers' time embedding under a name of its own.

    LyCORIS replaces `TimestepEmbedding` modules by class name and the U-Net's plain layers by path; with the library's
    class name both rules match and its names collide.
    """


def rename_time_embedding(unet: nn.Module) -> None:
    """Makes `unet.time_embedding` a `TimeEmbedding`."""
    unet.time_embedding.__class__ = TimeEmbedding


class GroupNorm(nn.GroupNorm):
    """As torch's, also where a group has a single value (its deviation from its mean is 0: the bias is left)."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


def accept_single_values(model: nn.Module) -> None:
    """Lets groups of one channel shrink to one pixel: small pictures in the narrowest models."""
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.num_channels == module.num_groups:
            module.__class__ = GroupNorm


class MemoryEfficientProcessor(AttnProcessor2_0):
    """Attention that never holds the matrix of all scores on a GPU (torch's memory-efficient kernel)."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        if not hidden_states.is_cuda:
            return super().__call__(attn, hidden_states, *args, **options)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return super().__call__(attn, hidden_states, *args, **options)


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
    """Chooses how denoiser and VAE compute attention; either may be None.

    kind: None or "sdpa" = torch's scaled_dot_product_attention (the default of this program), "mem_eff_attn" = its
    memory-efficient kernel only, "xformers" = xformers, after one real call; where that fails torch's attention,
    which gives the same pictures, with one warning. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r} is unknown; allowed: sdpa, mem_eff_attn, xformers.")
    if kind == "xformers":
        problem = xformers_problem("cuda" if torch.cuda.is_available() else "cpu")
        if problem:
            warn_once(logger, f"--xformers cannot be used here ({problem}): PyTorch's own attention is used instead.")
            kind = None
    own = [model for model in (unet, vae) if hasattr(model, "set_attention")]
    models = [model for model in (unet, vae) if model is not None and model not in own]
    for model in own:
        model.set_attention(KINDS[kind])
    if kind == "xformers":
        for model in models:
            model.enable_xformers_memory_efficient_attention()
        return
    processor = MemoryEfficientProcessor() if kind == "mem_eff_attn" else AttnProcessor2_0()
    for model in models:
        model.set_attn_processor(processor)
