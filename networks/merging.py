"""Adding LoRA files up: pure functions from the tensors of several files to those of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from library.checkpoints.finite import check_finite
from networks.adapter import full_precision
from networks.weights_file import with_alphas

_SUPPORTED = ("lora_down.weight", "lora_up.weight", "alpha")
_PROJECTIONS = ("_proj_in", "_proj_out")


@dataclass(frozen=True)
class LoraModule:
    """One layer's change: alpha / r * up x down.

    Linear: down [r, in], up [out, r]. Convolution: down [r, in, kh, kw], up [out, r, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def scaled(self, factor: float) -> LoraModule:
        """The same with a change that is `factor` times as large: both factors take the root, `down` the sign."""
        root = math.sqrt(abs(factor))
        return LoraModule(self.down * math.copysign(root, factor), self.up * root, self.alpha)

    def with_alpha(self, alpha: float) -> LoraModule:
        """The same change with another alpha."""
        scaled = self if alpha == self.alpha else self.scaled(self.alpha / alpha)
        return LoraModule(scaled.down, scaled.up, alpha)

    def change(self) -> Tensor:
        """What it adds to the layer's weight, as a matrix [out, in * kh * kw]."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1))


@dataclass(frozen=True)
class WeightedLora:
    """A file that takes part in a sum: its change counts `ratio` times."""

    source: str
    modules: Mapping[str, LoraModule]
    ratio: float


def lora_modules(weights: Mapping[str, Tensor], *, source: str) -> dict[str, LoraModule]:
    """Module name -> factors (float32 or better) of a file in our naming; alpha is the rank where it is 0 or missing.

    Raises ValueError that names the file and a key if it holds anything but plain LoRA (LoHa, LoKr, DoRA, OFT, ...),
    or if a module is incomplete.
    """
    foreign = [key for key in weights if key.partition(".")[2] not in _SUPPORTED]
    if foreign:
        raise ValueError(
            f"{source}: {len(foreign)} of its {len(weights)} tensors do not belong to a plain LoRA, for example "
            f"{foreign[0]}; other kinds of networks (LoHa, LoKr, DoRA, OFT) cannot be merged."
        )
    names = dict.fromkeys(key.partition(".")[0] for key in weights)
    complete = with_alphas(weights)
    missing = [f"{name}.{part}" for name in names for part in _SUPPORTED[:2] if f"{name}.{part}" not in weights]
    if missing or not names:
        raise ValueError(f"{source}: incomplete LoRA; missing: {', '.join(missing[:5]) or 'everything, it is empty'}.")
    check_finite(source, weights)
    modules = {}
    for name in names:
        down, up = (full_precision(weights[f"{name}.{part}"]) for part in _SUPPORTED[:2])
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"{source}: the factors of {name} have ranks {up.shape[1]} and {down.shape[0]}.")
        alpha = float(complete[f"{name}.alpha"].float())
        modules[name] = LoraModule(down, up, alpha or float(down.shape[0]))
    return modules


# --- sums ----------------------------------------------------------------------------------------------------
def merge_loras(
    loras: Sequence[WeightedLora], *, concat: bool, shuffle: bool = False, generator: Generator | None = None
) -> dict[str, LoraModule]:
    """One LoRA for several.

    With `concat` exact: the change is the sum of ratio * change, the rank the sum of ranks. Otherwise factors of equal
    rank are added up element by element, which keeps the rank and is an approximation (cross terms). `shuffle` puts
    the ranks of every module into a random order, which changes nothing but the numbers' places.
    All modules get one alpha, the most common one. Raises ValueError for files that do not fit together.
    """
    if not concat:
        _check_equal_ranks(loras)
    names = dict.fromkeys(name for lora in loras for name in lora.modules)
    add = concatenated if concat else summed
    merged = {}
    for name in names:
        parts = [lora for lora in loras if name in lora.modules]
        module = add(_in_one_form(name, parts), [lora.ratio for lora in parts])
        merged[name] = shuffled(module, generator) if shuffle else module
    # diffusers (up to 0.42 at least) knows one alpha per part of the model only, in attention layers
    [(alpha, _)] = Counter(module.alpha for module in merged.values()).most_common(1)
    return {name: module.with_alpha(alpha) for name, module in merged.items()}


def concatenated(modules: Sequence[LoraModule], ratios: Sequence[float]) -> LoraModule:
    """Exactly the sum of ratio * change: rank r = sum of ranks, alpha = r, all strengths inside the factors."""
    scaled = [module.scaled(ratio * module.scale) for module, ratio in zip(modules, ratios, strict=True)]
    down = torch.cat([module.down for module in scaled], dim=0)
    up = torch.cat([module.up for module in scaled], dim=1)
    return LoraModule(down, up, float(down.shape[0]))


def summed(modules: Sequence[LoraModule], ratios: Sequence[float]) -> LoraModule:
    """Factors added element by element, each with the root of its strength; alpha is the first module's."""
    first = modules[0]
    scaled = [
        module.scaled(ratio * module.scale / first.scale) for module, ratio in zip(modules, ratios, strict=True)
    ]
    down = torch.stack([module.down for module in scaled]).sum(0)
    up = torch.stack([module.up for module in scaled]).sum(0)
    return LoraModule(down, up, first.alpha)


def shuffled(module: LoraModule, generator: Generator | None = None) -> LoraModule:
    """The same change with its ranks in a random order."""
    order = torch.randperm(module.rank, generator=generator)
    return LoraModule(module.down[order], module.up[:, order], module.alpha)


def _in_one_form(name: str, loras: Sequence[WeightedLora]) -> list[LoraModule]:
    """The module of every file in the first one's form (matrices or 1x1 convolutions).

    Raises ValueError if they do not belong to layers of the same size.
    """
    modules = [lora.modules[name] for lora in loras]
    first = modules[0]
    alike = [module if module.down.dim() == first.down.dim() else _other_form(module) for module in modules]
    for lora, module in zip(loras, alike, strict=True):
        if module.down.shape[1:] != first.down.shape[1:] or module.up.shape[0] != first.up.shape[0]:
            raise ValueError(
                f"{name} is for layers of different size in {loras[0].source} (down {list(first.down.shape)}, up "
                f"{list(first.up.shape)}) and {lora.source} (down {list(module.down.shape)}, up "
                f"{list(module.up.shape)}): these files belong to different models."
            )
    return alike


def _other_form(module: LoraModule) -> LoraModule:
    """Matrices for 1x1 convolutions and the other way round; what has a larger kernel stays."""
    if module.down.dim() == 2:
        return LoraModule(module.down[:, :, None, None], module.up[:, :, None, None], module.alpha)
    if module.down.shape[2:] == (1, 1):
        return LoraModule(module.down.flatten(1), module.up.flatten(1), module.alpha)
    return module


def with_linear_projections(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """The same with matrices for the projections around attention, as SD 2 models have them."""
    return {
        name: _other_form(module) if name.endswith(_PROJECTIONS) and module.down.dim() == 4 else module
        for name, module in modules.items()
    }


def _check_equal_ranks(loras: Sequence[WeightedLora]) -> None:
    """Raises ValueError that names the first module whose rank differs between files."""
    found: dict[str, tuple[int, str]] = {}
    for lora in loras:
        for name, module in lora.modules.items():
            rank, source = found.setdefault(name, (module.rank, lora.source))
            if rank != module.rank:
                raise ValueError(
                    f"{name} has rank {rank} in {source} and rank {module.rank} in {lora.source}: factors can only be "
                    "added up with equal ranks. Use --concat, which is exact for any ranks."
                )


# --- what is written -----------------------------------------------------------------------------------------
def to_tensors(modules: Mapping[str, LoraModule], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file, rounded to `dtype`; what rounding does to alpha is made up for in the factors."""
    tensors = {}
    for name, module in modules.items():
        alpha = torch.tensor(module.alpha, dtype=dtype)
        module = module.with_alpha(float(alpha))
        tensors[f"{name}.lora_down.weight"] = module.down.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = module.up.to(dtype).contiguous()
        tensors[f"{name}.alpha"] = alpha
    return tensors


def common_rank(modules: Mapping[str, LoraModule]) -> str:
    """The value of `ss_network_dim`: the rank of all modules, or "Dynamic"."""
    return _common(modules, lambda module: str(module.rank))


def common_alpha(modules: Mapping[str, LoraModule]) -> str:
    """The value of `ss_network_alpha`: the alpha of all modules, or "Dynamic"."""
    return _common(modules, lambda module: str(module.alpha))


def _common(modules: Mapping[str, LoraModule], text: Callable[[LoraModule], str]) -> str:
    values = {text(module) for module in modules.values()}
    return values.pop() if len(values) == 1 else "Dynamic"
