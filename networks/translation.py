"""LoRA files of other programs: their keys, their divided layers and their strengths, translated into ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from networks import naming_flux, naming_sd3, naming_unet
from networks.naming import NetworkKey, Part, take_apart
from networks.places import Place

#: key of a safetensors file's metadata where diffusers keeps ranks and alphas (JSON)
SETTINGS_KEY = "lora_adapter_metadata"
T5_PREFIX = "lora_te3"
DOWN, UP, MIDDLE, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"


@dataclass(frozen=True)
class OwnNames:
    """How we name the layers of a family: the prefixes of its text encoders, and where others' layers belong."""

    encoder_prefixes: tuple[str, ...]
    place_of: Callable[[str], Place | None]

    def prefix(self, key: NetworkKey) -> str:
        """The prefix of the part that a key belongs to; T5 has one, whatever number the file gives it."""
        if key.part is Part.DENOISER:
            return "lora_unet"
        if key.part is Part.T5:
            return T5_PREFIX
        clips = [prefix for prefix in self.encoder_prefixes if prefix != T5_PREFIX]
        return clips[key.number - 1] if key.number <= len(clips) else f"lora_te{key.number}"


OWN_NAMES: Mapping[str, OwnNames] = {
    "sd": OwnNames(("lora_te",), naming_unet.place_in_diffusers),
    "sdxl": OwnNames(("lora_te1", "lora_te2"), naming_unet.place_in_original),
    "sd3": OwnNames(("lora_te1", "lora_te2", T5_PREFIX), naming_sd3.place_of),
    "flux": OwnNames(("lora_te1", T5_PREFIX), naming_flux.place_of),
}


@dataclass(frozen=True)
class PeftSettings:
    """What a PEFT configuration says about strengths; the scale of a module is alpha / rank, or alpha / sqrt(rank)."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)  # pattern of a module's path -> its alpha
    is_rank_stabilised: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PeftSettings:
        """From the fields of a `LoraConfig`."""
        return cls(config.get("lora_alpha"), config.get("alpha_pattern") or {}, bool(config.get("use_rslora")))

    def alpha_of(self, path: str, rank: int) -> float | None:
        """The alpha that gives a module the same scale with our rule (alpha / rank); None if nothing is said."""
        matching = (alpha for pattern, alpha in self.alphas.items() if re.match(rf"(.*\.)?({pattern})$", path))
        alpha = next(matching, self.alpha)
        if alpha is None or not self.is_rank_stabilised:
            return alpha
        return alpha * math.sqrt(rank)


def settings_in(metadata: Mapping[str, str]) -> dict[str, PeftSettings]:
    """Component ("unet", "text_encoder", ...) -> its settings, from the metadata that diffusers writes."""
    entries = json.loads(metadata.get(SETTINGS_KEY, "{}"))
    components: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, _, name = key.partition(".")
        components.setdefault(component, {})[name] = value
    return {component: PeftSettings.read(config) for component, config in components.items()}


def _settings_of(key: NetworkKey, settings: Mapping[str, PeftSettings]) -> PeftSettings | None:
    """The settings of the component that a key belongs to; "" stands for every component."""
    names = ["unet", "transformer"] if key.part is Part.DENOISER else [f"text_encoder_{key.number}"]
    if key.number == 1:
        names.append("text_encoder")
    return next((settings[name] for name in (*names, "") if name in settings), None)


# --- modules ---------------------------------------------------------------------------------------------------
@dataclass
class _Module:
    """The tensors of one layer in a file, and where they belong."""

    name: str
    place: Place
    path: str
    settings: PeftSettings | None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def with_strength(self) -> dict[str, Tensor]:
        """Its tensors; its alpha is the file's, else what the settings say, else absent (which means the rank)."""
        if ALPHA not in self.tensors and self.settings is not None and DOWN in self.tensors:
            alpha = self.settings.alpha_of(self.path, self.tensors[DOWN].shape[0])
            if alpha is not None:
                return {ALPHA: torch.tensor(float(alpha)), **self.tensors}
        return self.tensors


def to_own_names(
    weights: Mapping[str, Tensor],
    family: str | None,
    settings: Mapping[str, PeftSettings] | None = None,
    *,
    encoder_prefixes: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The same network as `lora_unet_….lora_down.weight` and so on, as models of `family` name their layers.

    Files in our naming stay as they are. Layers that other programs divide are put together again, which is exact:
    factors are stacked, and the rank is the sum of ranks unless the parts share a factor. `settings` (component ->
    settings) give the strengths where the file holds no alpha. `encoder_prefixes` replaces the family's. Keys that
    belong to no network keep their names. Raises ValueError if two keys mean the same tensor.
    """
    own = OWN_NAMES.get(family or "", OwnNames(("lora_te",), lambda layer: None))
    if encoder_prefixes is not None:
        own = OwnNames(tuple(encoder_prefixes), own.place_of)
    result: dict[str, Tensor] = {}
    modules: dict[str, _Module] = {}
    for key, value in weights.items():
        place = take_apart(key)
        if place is None or key.startswith("oft_"):
            result[key] = value
            continue
        prefix = own.prefix(place)
        module = modules.get(name := f"{prefix}_{place.layer}")
        if module is None:
            target = (own.place_of(place.layer) if place.part is Part.DENOISER else None) or Place(place.layer)
            module = _Module(f"{prefix}_{target.layer}", target, place.path, _settings_of(place, settings or {}))
            modules[name] = module
        if place.parameter in module.tensors:
            raise ValueError(f"two keys of the file mean {name}.{place.parameter}; one of them is {key}.")
        module.tensors[place.parameter] = value
    return result | _named(list(modules.values()))


def _named(modules: Sequence[_Module]) -> dict[str, Tensor]:
    """The tensors of all modules under our names."""
    by_name: dict[str, list[_Module]] = {}
    for module in modules:
        by_name.setdefault(module.name, []).append(module)
    result: dict[str, Tensor] = {}
    for name, parts in by_name.items():
        if len(parts) > 1 and any(part.place.rows is None for part in parts):
            raise ValueError(f"the file has {name} twice, under different names.")
        tensors = parts[0].with_strength() if parts[0].place.rows is None else _together(name, parts)
        if parts[0].place.may_swap:
            tensors = _in_our_order(tensors)
        result |= {f"{name}.{parameter}": value for parameter, value in tensors.items()}
    return result


def _in_our_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shift before scale, where a modulation gives nothing else."""
    if UP not in tensors or DOWN not in tensors or tensors[UP].shape[0] != 2 * tensors[DOWN].shape[1]:
        return dict(tensors)
    return {**tensors, UP: torch.cat(tensors[UP].chunk(2)[::-1])}


# --- divided layers --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Rows:
    """The change of some rows of a layer: scale * up x down."""

    begin: int
    up: Tensor  # [rows, r]
    down: Tensor  # [r, in]
    scale: float


def _together(name: str, modules: Sequence[_Module]) -> dict[str, Tensor]:
    """One change for the rows that several hold; rows that nobody holds do not change."""
    parts, heights = [], set()
    for module in modules:
        tensors = module.with_strength()
        if not {UP, DOWN} <= tensors.keys() or not tensors.keys() <= {UP, DOWN, ALPHA} or module.place.rows is None:
            raise ValueError(f"{module.path} is a part of {name}, but no complete LoRA ({', '.join(tensors)}).")
        begin, end, whole = module.place.rows
        up, down = tensors[UP].flatten(1), tensors[DOWN].flatten(1)
        unit, rest = divmod(up.shape[0], end - begin)
        if rest or up.shape[1] != down.shape[0]:
            raise ValueError(f"{module.path}: its factors {list(up.shape)} and {list(down.shape)} do not fit {name}.")
        heights.add((unit * whole, down.shape[1]))
        alpha = float(tensors[ALPHA].float()) if ALPHA in tensors else 0.0
        parts.append(_Rows(begin * unit, up, down, (alpha or down.shape[0]) / down.shape[0]))
    if len(heights) > 1:
        raise ValueError(f"the parts of {name} have different sizes: {sorted(heights)}.")
    return _stacked(parts, heights.pop()[0])


def _stacked(parts: Sequence[_Rows], height: int) -> dict[str, Tensor]:
    """down is stacked, up block-diagonal; parts with one `down` and one strength keep their rank."""
    first = parts[0]
    shares = all(torch.equal(part.down, first.down) and part.scale == first.scale for part in parts)
    rank = first.down.shape[0] if shares else sum(part.down.shape[0] for part in parts)
    up = first.up.new_zeros((height, rank))
    column = 0
    for part in parts:
        rows = slice(part.begin, part.begin + part.up.shape[0])
        factor = part.up if part.scale == first.scale else part.up.float() * (part.scale / first.scale)
        up[rows, column : column + part.up.shape[1]] = factor.to(up)
        column += 0 if shares else part.up.shape[1]
    down = first.down if shares else torch.cat([part.down.to(first.down) for part in parts])
    return {ALPHA: torch.tensor(first.scale * rank), DOWN: down, UP: up}


# --- Tucker ----------------------------------------------------------------------------------------------------
def without_cores(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network without `lora_mid` (Tucker decomposition of convolutions): the core becomes part of `down`.

    up [out, r, 1, 1], mid [r, r, kh, kw], down [r, in, 1, 1] -> up, down [r, in, kh, kw]; exact, in our names.
    """
    result = dict(weights)
    for key in [key for key in weights if key.endswith(f".{MIDDLE}")]:
        module = key.removesuffix(f".{MIDDLE}")
        down = result.get(f"{module}.{DOWN}")
        middle = result.pop(key)
        if down is None or middle.dim() != 4 or middle.shape[1] != down.shape[0]:
            raise ValueError(f"{module}: a Tucker core (lora_mid) without a lora_down that fits it.")
        whole = torch.einsum("rsij,sc->rcij", middle.float(), down.float().flatten(1))
        result[f"{module}.{DOWN}"] = whole.to(down.dtype)
    return result
