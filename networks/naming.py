"""How programs spell the keys of a network file: the parameter, the part of the model, and the layer's path in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_DOWN, _UP = "lora_down.weight", "lora_up.weight"


class Part(Enum):
    """The part of the model that a key belongs to."""

    DENOISER = "denoiser"
    CLIP = "clip"
    T5 = "t5"


@dataclass(frozen=True)
class NetworkKey:
    """A key, taken apart: `path` is the layer's inside its part, as written (with dots or underscores).

    `number` counts the text encoders of a model from 1, as the file does; 0 for the denoiser. `parameter` is ours
    (`lora_down.weight`, `alpha`, ...) where programs differ. `naming` says whose spelling it is.
    """

    part: Part
    number: int
    path: str
    parameter: str
    naming: str

    @property
    def layer(self) -> str:
        """The path with underscores only; layers of CLIP encoders stand below `text_model`."""
        flat = self.path.replace(".", "_")
        return f"text_model_{flat}" if self.part is Part.CLIP and flat.startswith("encoder_layers_") else flat


# --- parameters ------------------------------------------------------------------------------------------------
#: ending of a key -> our name of the parameter (None: as it is), whose spelling it is ("": everybody's)
_ENDINGS: tuple[tuple[re.Pattern[str], str | None, str], ...] = tuple(
    (re.compile(pattern), name, naming)
    for pattern, name, naming in (
        (r"\.lora_A(?:\.[^.]+)?\.weight$", _DOWN, "PEFT"),
        (r"\.lora_B(?:\.[^.]+)?\.weight$", _UP, "PEFT"),
        (r"\.lora_B(?:\.[^.]+)?\.bias$", "lora_up.bias", "PEFT"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$", "dora_scale", "PEFT"),
        (r"(?<=processor\.qkv_lora[12])\.down\.weight$|(?<=processor\.proj_lora[12])\.down\.weight$", _DOWN, "XLabs"),
        (r"(?<=processor\.qkv_lora[12])\.up\.weight$|(?<=processor\.proj_lora[12])\.up\.weight$", _UP, "XLabs"),
        (r"(?<=processor\.qkv_lora)\.down\.weight$|(?<=processor\.proj_lora)\.down\.weight$", _DOWN, "XLabs"),
        (r"(?<=processor\.qkv_lora)\.up\.weight$|(?<=processor\.proj_lora)\.up\.weight$", _UP, "XLabs"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight$", _DOWN, "diffusers"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight$", _UP, "diffusers"),
        (r"\.(?:lora_down|lora_up|lora_mid|[ab][12m]|[pq]_layer)\.weight$", None, ""),
        (r"\.(?:alpha|dora_scale|scalar|rescale|lambda_layer|on_input|diff|diff_b|[wb]_norm)$", None, ""),
        (r"\.(?:hada|lokr|oft|boft)_\w+(?:\.weight)?$", None, ""),
        (r"\.lora_up\.bias$", None, ""),
    )
)


def _parameter(key: str) -> tuple[str, str, str, str]:
    """(path with prefixes, our parameter name, whose spelling, the ending as written); "" for a key without any."""
    for pattern, name, naming in _ENDINGS:
        match = pattern.search(key)
        if match:
            ending = match.group()
            return key[: match.start()], name or ending.removeprefix("."), naming, ending
    path, _, parameter = key.partition(".") if key.startswith(("lora_", "oft_", "lllite_")) else key.rpartition(".")
    return path, parameter, "", ""


# --- parts -----------------------------------------------------------------------------------------------------
_WRAPPER = "base_model.model."
#: beginning of a path -> part, number of the text encoder, whose spelling it is ("": ours)
_BEGINNINGS: tuple[tuple[re.Pattern[str], Part, int, str], ...] = tuple(
    (re.compile(f"^(?:{pattern})"), part, number, naming)
    for pattern, part, number, naming in (
        (r"(?:lora|oft)_unet_", Part.DENOISER, 0, ""),
        (r"lora_unet\.", Part.DENOISER, 0, "dotted"),
        (r"lora_transformer[_.]", Part.DENOISER, 0, "OneTrainer"),
        (r"lora_te1?_", Part.CLIP, 1, ""),
        (r"lora_te2_", Part.CLIP, 2, ""),
        (r"lora_te3_", Part.CLIP, 3, ""),
        (r"lora_te1?\.", Part.CLIP, 1, "dotted"),
        (r"lora_te2\.", Part.CLIP, 2, "dotted"),
        (r"lora_te3\.", Part.CLIP, 3, "dotted"),
        (r"(?:model\.)?diffusion_model\.", Part.DENOISER, 0, "ComfyUI"),
        (r"unet\.|transformer\.(?!text_model\.|encoder\.)", Part.DENOISER, 0, "diffusers"),
        (r"(?:text_encoders\.)?clip_[lh]\.(?:transformer\.)?", Part.CLIP, 1, "ComfyUI"),
        (r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?", Part.CLIP, 2, "ComfyUI"),
        (r"(?:text_encoders\.)?t5(?:xxl)?\.(?:transformer\.)?", Part.T5, 3, "ComfyUI"),
        (r"cond_stage_model\.transformer\.|conditioner\.embedders\.0\.transformer\.", Part.CLIP, 1, "checkpoint"),
        (r"text_encoder\.", Part.CLIP, 1, "diffusers"),
        (r"text_encoder_2\.", Part.CLIP, 2, "diffusers"),
        (r"text_encoder_3\.", Part.CLIP, 3, "diffusers"),
        (r"lycoris_(?=text_model_|encoder_layers_|encoder_block_)", Part.CLIP, 1, "LyCORIS wrapper"),
        (r"lycoris_", Part.DENOISER, 0, "LyCORIS wrapper"),
        (r"(?=(?:text_model|encoder\.layers|encoder\.block)\.)", Part.CLIP, 1, "bare paths"),
        (r"(?=\w+\.)", Part.DENOISER, 0, "bare paths"),
    )
)
_T5_PATH = re.compile(r"^encoder[._]block[._]\d+[._]")
#: layers of attention processors (diffusers up to 0.21), by the part of the model
_OLD_DENOISER_LAYERS = {"to_out": "to_out.0"}
_OLD_ENCODER_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def take_apart(key: str) -> NetworkKey | None:
    """The key of a network file, taken apart; None for a key that no program writes into one."""
    path, parameter, spelling, ending = _parameter(key)
    if not path:
        return None
    is_wrapped = path.startswith(_WRAPPER)
    path = path.removeprefix(_WRAPPER)
    for pattern, part, number, naming in _BEGINNINGS:
        match = pattern.match(path)
        if match is None:
            continue
        path = path[match.end() :]
        if ending.startswith("_lora"):
            path = _modern_path(path, _OLD_DENOISER_LAYERS if part is Part.DENOISER else _OLD_ENCODER_LAYERS)
        if part is Part.CLIP and _T5_PATH.match(path):
            part = Part.T5
        if naming == "" and "." in path:
            naming = "dotted"
        if is_wrapped or naming == "bare paths":
            naming = spelling or naming
        return NetworkKey(part, number, path, parameter, naming or spelling or "kohya")
    return None


def _modern_path(path: str, layers: dict[str, str]) -> str:
    """`….attn1.to_out.0` for an attention processor's `….attn1.processor.to_out`."""
    parent, _, layer = path.removesuffix(".processor").replace(".processor.", ".").rpartition(".")
    return f"{parent}.{layers.get(layer, layer)}"
