"""Samples and their texts become one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.records import Batch, ImageRecord
from library.data.samples import Sample


def collate(
    records: Sequence[ImageRecord], samples: Sequence[Sample], captions: Sequence[str],
    subsets: Sequence[SubsetConfig], *, network_multiplier: float, prior_loss_weight: float,
    tokens: dict[str, Tensor] | None, text_outputs: Sequence[Mapping[str, Any] | None],
) -> Batch:
    """The batch of `samples`, one record, caption and subset each. Raises ValueError where they do not fit together.

    `text_outputs`: the cached text-encoder outputs of each record.
    """
    return Batch(
        captions=list(captions),
        loss_weights=torch.tensor([prior_loss_weight if r.is_reg else 1.0 for r in records], dtype=torch.float32),
        original_sizes_hw=_pairs([sample.original_size_hw for sample in samples]),
        crop_top_lefts=_pairs([sample.crop_top_left for sample in samples]),
        target_sizes_hw=_pairs([sample.target_size_hw for sample in samples]),
        network_multipliers=torch.full((len(samples),), network_multiplier, dtype=torch.float32),
        image_keys=[record.key for record in records],
        flippeds=[sample.is_flipped for sample in samples],
        custom_attributes=[dict(subset.custom_attributes) for subset in subsets],
        images=_stack([sample.image for sample in samples], records, "an image"),
        latents=_stack([sample.latents for sample in samples], records, "cached latents"),
        tokens=tokens,
        text_outputs=stack_text_outputs(records, text_outputs),
        alpha_masks=_stack_masks(samples),
        conditioning_images=_stack([sample.conditioning_image for sample in samples], records, "a conditioning image"),
    )


def stack_text_outputs(
    records: Sequence[ImageRecord], outputs: Sequence[Mapping[str, Any] | None]
) -> dict[str, Tensor] | None:
    """Cached text-encoder outputs, name -> [B,...] in float32; shorter ones are padded with zeros at their end.

    None when no record has any. Raises ValueError naming the images when only some have them.
    """
    present = [arrays for arrays in outputs if arrays is not None]
    if not present:
        return None
    names = list(present[0])
    lacking = [r.key for r, arrays in zip(records, outputs, strict=True) if set(arrays or ()) != set(names)]
    if lacking:
        raise ValueError(f"cached text-encoder outputs are missing or incomplete for: {', '.join(lacking)}")
    return {name: _pad_and_stack([_as_tensor(arrays[name]) for arrays in present]) for name in names}


def _as_tensor(value: Any) -> Tensor:
    return value.float() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value)).float()


def _pad_and_stack(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].dim() == 0:
        return torch.stack(list(tensors))
    longest = max(tensor.shape[0] for tensor in tensors)
    padded = [torch.cat([t, t.new_zeros((longest - t.shape[0], *t.shape[1:]))]) for t in tensors]
    return torch.stack(padded)


def _pairs(values: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).reshape(len(values), 2)


def _stack(tensors: Sequence[Tensor | None], records: Sequence[ImageRecord], what: str) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    if len(present) < len(tensors):
        lacking = [record.key for record, tensor in zip(records, tensors, strict=True) if tensor is None]
        raise ValueError(f"some images of a batch have {what} and others have none: {', '.join(lacking)}")
    return torch.stack(present)


def _stack_masks(samples: Sequence[Sample]) -> Tensor | None:
    if all(sample.alpha_mask is None for sample in samples):
        return None
    return torch.stack(
        [torch.ones(s.target_size_hw, dtype=torch.float32) if s.alpha_mask is None else s.alpha_mask for s in samples]
    )
