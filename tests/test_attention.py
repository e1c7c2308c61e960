"""How the transformers compute attention: every block uses what was chosen, and all choices give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models import attention
from library.models.flux import Flux
from library.models.layers import set_attention
from tests.flux_tiny import flux_family
from tests.sd3_tiny import tiny_family


def blocks_of(denoiser: nn.Module) -> int:
    """How many attentions one forward pass has."""
    if isinstance(denoiser, Flux):
        return len(denoiser.double_blocks) + len(denoiser.single_blocks)
    return len(denoiser.joint_blocks) + len(denoiser.params.dual_blocks)


@torch.no_grad()
def prediction(family: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    conditioning, _ = family.encode_prompts(["a cat"], [""])
    return family.predict(torch.randn(1, 16, 8, 6, generator=generator), torch.tensor([400.0]), conditioning)


@pytest.mark.parametrize("make", [flux_family, tiny_family])
def test_every_block_attends_as_it_is_told(make):
    family, calls = make(apply_t5_attn_mask=True), []
    wanted = prediction(family)

    def counting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(mask is not None)
        return attention.fused(query, key, value, mask)

    family.denoiser.set_attention(counting)
    assert torch.equal(prediction(family), wanted)
    assert len(calls) == blocks_of(family.denoiser)
    assert set(calls) == {isinstance(family.denoiser, Flux)}  # only this model gets a mask
    family.denoiser.set_attention(lambda query, key, value, mask: value)
    assert not torch.allclose(prediction(family), wanted, atol=1e-3)
    for kind in ("mem_eff_attn", "sdpa", None):
        set_attention(family.denoiser, family.vae, kind)
        assert torch.allclose(prediction(family), wanted, atol=1e-5), kind


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("compute", [attention.fused, attention.memory_efficient])
def test_attention_is_softmax_of_scaled_products(compute, is_masked):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    mask = torch.tensor([True, True, False, True, False])[None, None, None] if is_masked else None
    scores = query @ key.transpose(-1, -2) / 8**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wanted = F.softmax(scores, dim=-1) @ value
    found = compute(query, key, value, mask)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(attention.as_tokens(found)[1, 4, 8:16], found[1, 1, 4])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="attention 'flash' is unknown"):
        set_attention(nn.Identity(), None, "flash")
