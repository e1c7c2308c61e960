"""ControlNet-LLLite for SDXL: small modules in front of attention projections that read a hint picture.

Module names in files: `lllite_unet_<path of the layer with underscores>`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints.finite import check_finite
from library.checkpoints.tensors import (
    cast,
    check_keys,
    is_safetensors,
    load_tensors,
    save_pickle,
    save_tensors,
    shapes_of,
)
from networks.arguments import checked_probability
from networks.targets import UNET_TRANSFORMER_CLASSES, Target, find_targets

logger = logging.getLogger(__name__)

__all__ = ["ControlNetLLLite", "LLLiteModule", "check_sizes", "sizes_in_file"]

PREFIX = "lllite_unet"
_LATENT_SCALE = 8  # pixels per latent
_DEEPEST = 3
_PROJECTION = re.compile(r"\.(attn1\.to_[qkv]|attn2\.to_q)$")
_ENCODER = re.compile(r"^(?:input_blocks\.(\d+)|middle_block)\.")


class LLLiteModule(nn.Module):
    """Changes the input of one Linear layer by what the hint shows at each token's place.

    `depth` says how much coarser than the latents the layer's tokens are: 1 equally fine, 2 half, 3 a quarter.
    A new module changes nothing.
    """

    def __init__(self, host: Any, depth: int, cond_emb_dim: int, mlp_dim: int, dropout: float | None = None) -> None:
        super().__init__()
        if not 1 <= depth <= _DEEPEST:
            raise ValueError(f"ControlNet-LLLite has depths from 1 to {_DEEPEST}, not {depth}.")
        self._host = (host,)  # in a tuple: not a part of this module
        self.depth = depth
        self.dropout = dropout
        self.multiplier = 1.0
        self.embedded: Tensor | None = None  # of the current hint, [B,tokens,cond_emb_dim]
        self.org_forward = host.forward
        half = cond_emb_dim // 2
        layers: list[nn.Module] = [nn.Conv2d(3, half, 4, stride=4), nn.ReLU()]
        if depth == _DEEPEST:
            layers += [nn.Conv2d(half, half, 4, stride=4), nn.ReLU()]
        size = 4 if depth == 2 else 2
        layers.append(nn.Conv2d(half, cond_emb_dim, size, stride=size))
        self.conditioning1 = nn.Sequential(*layers)
        width = host.in_features
        self.down = nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), nn.ReLU())
        last = nn.Linear(mlp_dim, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.up = nn.Sequential(last)

    def apply_to(self) -> None:
        """Stand in front of the layer's current forward."""
        [host] = self._host
        self.org_forward = host.forward
        host.forward = self.forward

    def embed(self, hint: Tensor | None) -> None:
        """Read the hint [B,3,H,W] in [-1,1] for all following calls; None switches the module off."""
        if hint is None:
            self.embedded = None
            return
        step = _LATENT_SCALE << (self.depth - 1)
        bottom, right = (-hint.shape[-2] % step, -hint.shape[-1] % step)
        if bottom or right:  # a layer that halves an odd size rounds up
            hint = F.pad(hint, (0, right, 0, bottom), mode="replicate")
        like = next(self.conditioning1.parameters())
        self.embedded = self.conditioning1(hint.to(like.device, like.dtype)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for tokens [rB,tokens,width]; rows repeat the hints' batch as a whole."""
        if self.embedded is None or not self.multiplier:
            return self.org_forward(x)
        embedded = self.embedded.repeat(x.shape[0] // self.embedded.shape[0], 1, 1)
        hidden = self.down(x.to(next(self.down.parameters()).dtype))
        hidden = self.mid(torch.cat([embedded.to(hidden.dtype), hidden], dim=-1))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return self.org_forward(x + (self.up(hidden) * self.multiplier).to(x.dtype))


class ControlNetLLLite(nn.Module):
    """All modules of one U-Net. `apply_to` hooks them in; `set_cond_image` gives them a hint.

    Raises ValueError for a model without the layers of SDXL's U-Net.
    """

    def __init__(
        self, unet: nn.Module, cond_emb_dim: int = 16, mlp_dim: int = 16, dropout: float | None = None,
        varbose: bool | None = False, multiplier: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(cond_emb_dim, mlp_dim, dropout)
        levels = _levels(unet)
        for target in _targets(unet):
            match = _ENCODER.match(target.path)
            block = int(match[1]) if match and match[1] else len(levels) - 1
            if varbose:
                logger.info("%s: depth %d", target.name, levels[block] + 1)
            self.add_module(target.name, LLLiteModule(target.layer, levels[block] + 1, cond_emb_dim, mlp_dim, dropout))
        self.set_multiplier(multiplier)

    @property
    def lllite_modules(self) -> list[LLLiteModule]:
        """In the order of the U-Net's layers."""
        return [module for module in self.children() if isinstance(module, LLLiteModule)]

    def apply_to(self) -> None:
        """Hook every module in."""
        for module in self.lllite_modules:
            module.apply_to()

    def set_cond_image(self, cond_image: Tensor | None) -> None:
        """The hints [B,3,H,W] in [-1,1] of the following calls, as large as the pictures; None: none.

        A call may have several times B rows (guidance): all hints in order, then all again.
        """
        for module in self.lllite_modules:
            module.embed(cond_image)

    def set_multiplier(self, multiplier: float) -> None:
        """How strongly hints count; 0 is off."""
        self.multiplier = multiplier
        for module in self.lllite_modules:
            module.multiplier = multiplier

    # --- files ---------------------------------------------------------------------------------------------
    def load_weights(self, file: str | Path) -> None:
        """Read a file of modules with the same sizes. Raises ValueError that lists what does not fit."""
        tensors = load_tensors(file)
        expected = shapes_of(self.state_dict())
        check_keys(expected, shapes_of(tensors), component="ControlNet-LLLite of this model", source=str(file))
        check_finite(str(file), tensors)
        self.load_state_dict(tensors)

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write all modules atomically, cast to `dtype` if given; pickles get no metadata."""
        tensors = self.state_dict()
        if is_safetensors(file):
            save_tensors(file, tensors, metadata={"format": "pt", **(metadata or {})}, dtype=dtype)
        else:
            save_pickle(file, {key: cast(value, dtype=dtype, device="cpu").clone() for key, value in tensors.items()})

    def is_mergeable(self) -> bool:
        """Hints cannot be merged into weights."""
        return False

    def merge_to(self, *args: Any, **options: Any) -> None:
        """Raises ValueError."""
        raise ValueError("ControlNet-LLLite cannot be merged into a model: what it does depends on the hint.")


def check_sizes(cond_emb_dim: int, mlp_dim: int, dropout: float | None) -> None:
    """Raises ValueError for sizes that no module can have."""
    checked_probability(dropout, "--network_dropout")
    if cond_emb_dim < 2 or cond_emb_dim % 2:
        raise ValueError(f"--cond_emb_dim {cond_emb_dim}: it must be an even number of at least 2.")
    if mlp_dim < 1:
        raise ValueError(f"--network_dim {mlp_dim}: it must be at least 1.")


def sizes_in_file(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(cond_emb_dim, mlp_dim) of a file's modules. Raises ValueError if it holds none."""
    shapes = shapes_of(tensors)
    embedding = next((2 * shape[0] for key, shape in shapes.items() if key.endswith("conditioning1.0.weight")), None)
    width = next((shape[0] for key, shape in shapes.items() if key.endswith("down.0.weight")), None)
    if embedding is None or width is None:
        found = ", ".join(list(shapes)[:5]) or "nothing"
        raise ValueError(f"This is no ControlNet-LLLite file: conditioning1 or down is missing (keys: {found}).")
    return embedding, width


def _targets(unet: nn.Module) -> list[Target]:
    """The projections of queries, keys and values on the way down and in the middle."""
    found = find_targets(unet, PREFIX, UNET_TRANSFORMER_CLASSES)
    return [target for target in found if _ENCODER.match(target.path) and _PROJECTION.search(target.path)]


def _levels(unet: Any) -> list[int]:
    """For every input block how often the latents have been halved before it."""
    if not hasattr(unet, "input_blocks"):
        raise ValueError(f"ControlNet-LLLite works with SDXL's U-Net only, not with {type(unet).__name__}.")
    levels, level = [], 0
    for block in unet.input_blocks:
        levels.append(level)
        level += any(type(layer).__name__ == "Downsample2D" for layer in block)
    return levels
