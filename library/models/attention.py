"""How transformers of our own compute attention: torch's fused kernels, its memory-efficient one, or xformers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (query, key, value [B,heads,L,head size], mask that broadcasts to [B,heads,L,L] or None) -> [B,heads,L,head size]
Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention with the kernel that torch chooses."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def memory_efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Never holds the matrix of all scores on a GPU (torch's memory-efficient kernel)."""
    if not query.is_cuda:
        return fused(query, key, value, mask)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return fused(query, key, value, mask)


def of_xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """xformers' attention; with a mask torch's, which takes masks of every length."""
    if mask is not None:
        return fused(query, key, value, mask)
    from xformers.ops import memory_efficient_attention

    swapped = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    return memory_efficient_attention(*swapped).transpose(1, 2)


#: `library.models.layers.set_attention`'s kinds
KINDS: dict[str | None, Attention] = {
    None: fused, "sdpa": fused, "mem_eff_attn": memory_efficient, "xformers": of_xformers
}  # fmt: skip


def as_tokens(attended: Tensor) -> Tensor:
    """[B,heads,L,head size] -> [B,L,hidden]."""
    return attended.transpose(1, 2).flatten(2)
