"""LoRA files in the naming of diffusers, PEFT and LyCORIS' wrapper: their keys and strengths, translated into ours."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: key of a safetensors file's metadata where diffusers keeps ranks and alphas (JSON)
SETTINGS_KEY = "lora_adapter_metadata"

_PARAMETERS: tuple[tuple[re.Pattern[str], Mapping[str, str]], ...] = tuple(
    (re.compile(pattern), names)
    for pattern, names in (
        (r"\.lora_(A|B)(?:\.[^.]+)?\.weight$", {"A": "lora_down.weight", "B": "lora_up.weight"}),
        (r"(?:_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$",
         {"down": "lora_down.weight", "up": "lora_up.weight"}),
        (r"\.(alpha)$", {"alpha": "alpha"}),
        (r"\.(lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?$", {"lora_magnitude_vector": "dora_scale"}),
        (r"\.lora_(B)(?:\.[^.]+)?\.bias$", {"B": "lora_up.bias"}),
    )
)  # fmt: skip
_MARKS = re.compile(r"^lycoris_|\.lora_[AB]\.|[._]lora\.(?:down|up)\.|\.lora_linear_layer\.")
_DENOISER_ROOTS = (
    "down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.",
)  # fmt: skip
_ENCODER_ROOTS = ("text_model.", "encoder.layers.")
#: layers of attention processors (diffusers up to 0.21), by the part of the model
_OLD_DENOISER_LAYERS = {"to_out": "to_out.0"}
_OLD_ENCODER_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


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


def has_other_names(keys: Iterable[str]) -> bool:
    """Whether keys are named as one of these programs does it."""
    return any(_MARKS.search(key) for key in keys)


def settings_in(metadata: Mapping[str, str]) -> dict[str, PeftSettings]:
    """Component ("unet", "text_encoder", ...) -> its settings, from the metadata that diffusers writes."""
    entries = json.loads(metadata.get(SETTINGS_KEY, "{}"))
    components: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, _, name = key.partition(".")
        components.setdefault(component, {})[name] = value
    return {component: PeftSettings.read(config) for component, config in components.items()}


def to_own_names(
    weights: Mapping[str, Tensor],
    encoder_prefixes: Sequence[str] = ("lora_te",),
    settings: Mapping[str, PeftSettings] | None = None,
) -> dict[str, Tensor]:
    """The same tensors as `lora_unet_….lora_down.weight` and so on; files in our naming stay as they are.

    `encoder_prefixes` are our prefixes of the model's text encoders. `settings` (component -> settings; "" stands
    for every component) give the strengths; a module about which they say nothing has alpha = rank, unless the file
    holds its alpha. Keys that cannot be translated keep their names.
    """
    if not has_other_names(weights):
        return dict(weights)
    settings = settings or {}
    renamed: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for key, value in weights.items():
        place = _place(key, encoder_prefixes)
        if place is None:
            renamed[_without_wrapper(key, encoder_prefixes)] = value
            continue
        component, path, name, parameter = place
        renamed[f"{name}.{parameter}"] = value
        chosen = settings.get(component) or settings.get("")
        if parameter == "lora_down.weight" and chosen is not None:
            alpha = chosen.alpha_of(path, value.shape[0])
            if alpha is not None:
                alphas[f"{name}.alpha"] = torch.tensor(float(alpha))
    return alphas | renamed


def _place(key: str, encoder_prefixes: Sequence[str]) -> tuple[str, str, str, str] | None:
    """(component, path in it, our module name, our parameter name) of a key; None if it is none of a LoRA."""
    found = _parameter(key)
    if found is None:
        return None
    module, parameter, is_processor = found
    component, path = _component(module.removeprefix("base_model.model."))
    if component == "unet":
        prefix, layers = "lora_unet", _OLD_DENOISER_LAYERS
    else:
        number = 0 if component == "text_encoder" else int(component.rpartition("_")[2] or 0) - 1
        if not 0 <= number < len(encoder_prefixes):
            return None
        prefix, layers = encoder_prefixes[number], _OLD_ENCODER_LAYERS
    if is_processor:
        path = _modern_path(path, layers)
    level = "text_model_" if component != "unet" and path.startswith("encoder.layers.") else ""
    return component, path, f"{prefix}_{level}{path.replace('.', '_')}", parameter


def _without_wrapper(key: str, encoder_prefixes: Sequence[str]) -> str:
    """Our name for a key of LyCORIS' wrapper around one part of a model; other keys stay."""
    name = key.removeprefix("lycoris_")
    if name == key:
        return key
    for start, level in (("text_model_", ""), ("encoder_layers_", "text_model_")):
        if name.startswith(start) and encoder_prefixes:
            return f"{encoder_prefixes[0]}_{level}{name}"
    return f"lora_unet_{name}"


def _parameter(key: str) -> tuple[str, str, bool] | None:
    """(path of the module, our parameter name, whether it is named as an attention processor's layer)."""
    for pattern, names in _PARAMETERS:
        match = pattern.search(key)
        if match:
            return key[: match.start()], names[match.group(1)], match.group().startswith("_lora")
    return None


def _component(path: str) -> tuple[str, str]:
    """(component, the rest) of a module's path; files of one component alone lack its name, unknown paths have none."""
    match = re.match(r"(unet|text_encoder(?:_[2-9])?)\.", path)
    if match:
        return match.group(1), path[match.end() :]
    if path.startswith(_DENOISER_ROOTS):
        return "unet", path
    return ("text_encoder" if path.startswith(_ENCODER_ROOTS) else ""), path


def _modern_path(path: str, layers: Mapping[str, str]) -> str:
    """`….attn1.to_out.0` for an attention processor's `….attn1.processor.to_out`."""
    parent, _, layer = path.removesuffix(".processor").replace(".processor.", ".").rpartition(".")
    return f"{parent}.{layers.get(layer, layer)}"
