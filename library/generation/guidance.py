"""Classifier-free guidance: which rows are predicted, and how their predictions combine (Ho & Salimans 2022)."""

from __future__ import annotations

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """e_u + s (e_c - e_u); all [B,C,h,w]."""
    return unconditional + scale * (conditional - unconditional)


def negative_scale_guidance(
    negative: Tensor, conditional: Tensor, empty: Tensor, scale: float, negative_scale: float
) -> Tensor:
    """e_0 + s (e_c - e_0) - n (e_n - e_0), where e_0 comes from the empty prompt; all [B,C,h,w]."""
    return empty + scale * (conditional - empty) - negative_scale * (negative - empty)


def combine(predictions: Tensor, scale: float, negative_scale: float | None) -> Tensor:
    """The guided prediction [B,C,h,w] of stacked rows.

    [B] rows: conditional only. [2B]: unconditional, conditional. [3B]: negative, conditional, empty prompt.
    """
    if scale <= 1.0:
        return predictions
    if negative_scale is None:
        unconditional, conditional = predictions.chunk(2)
        return classifier_free_guidance(unconditional, conditional, scale)
    negative, conditional, empty = predictions.chunk(3)
    return negative_scale_guidance(negative, conditional, empty, scale, negative_scale)
