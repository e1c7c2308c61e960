"""One text context per cross-attention of a U-Net, in place of one for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn


def cross_attentions(blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Name -> module of every cross-attention (`attn2`) of a denoiser, given its blocks in forward order."""
    return {
        f"{block_name}.{name}": module
        for block_name, block in blocks
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == "attn2"
    }


def give_own_contexts(blocks: Sequence[tuple[str, nn.Module]], layers: Sequence[str]) -> None:
    """From now on a context [B,L,S,d] reaches cross-attention i of L as [B,S,d], number i of the second dimension.

    A context [B,S,d] reaches all of them as ever. Nothing is kept between calls, so recomputed activations are right.
    `blocks` are the denoiser's in forward order. Raises ValueError unless it has one cross-attention per layer name.
    """
    attentions = cross_attentions(blocks)
    if len(attentions) != len(layers):
        raise ValueError(
            f"XTI has embeddings for {len(layers)} cross-attentions ({', '.join(layers)}), but this model has "
            f"{len(attentions)}: use Textual Inversion without layers."
        )
    for index, attention in enumerate(attentions.values()):
        attention.register_forward_pre_hook(partial(_choose_context, index), with_kwargs=True)


def _choose_context(
    index: int, _module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    context = options.get("encoder_hidden_states")
    if context is None or context.ndim != 4:
        return None
    return arguments, {**options, "encoder_hidden_states": context[:, index]}
