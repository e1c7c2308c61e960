"""Says what a network file is by its keys and shapes alone: the model family, the naming, the algorithm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from networks.naming import NetworkKey, Part, take_apart

PLAIN_LORA = "LoRA"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class NetworkFamily:
    """How messages call the models of a family, and what trains and draws with its networks."""

    label: str
    module: str
    scripts: tuple[str, str]


FAMILIES: Mapping[str, NetworkFamily] = {
    "sd": NetworkFamily("Stable Diffusion 1.x or 2.x", "networks.lora", ("train_network.py", "gen_img.py")),
    "sdxl": NetworkFamily("SDXL", "networks.lora", ("sdxl_train_network.py", "sdxl_gen_img.py")),
    "sd3": NetworkFamily(
        "Stable Diffusion 3 or 3.5", "networks.lora_sd3", ("sd3_train_network.py", "sd3_minimal_inference.py")
    ),
    "flux": NetworkFamily("FLUX.1", "networks.lora_flux", ("flux_train_network.py", "flux_minimal_inference.py")),
}


@dataclass(frozen=True)
class NetworkKind:
    """What a network file is.

    `family`: `sd`, `sdxl`, `sd3`, `flux`, or None if the keys do not tell. `naming`: whose spelling most keys have
    (`kohya`: ours). `algorithm`: `LoRA` (plain, with or without convolutions and Tucker cores), `LoHa`, `LoKr`,
    `DoRA`, ...; `unknown` if no key belongs to a network. `has_denoiser`: whether any key is for the denoiser.
    `context_width`: the size of the text vectors that it was made for, where one family has several.
    """

    family: str | None
    naming: str
    algorithm: str
    has_denoiser: bool = True
    context_width: int | None = None

    @property
    def is_network(self) -> bool:
        """Whether it is a network file at all."""
        return self.algorithm != UNKNOWN

    @property
    def is_plain_lora(self) -> bool:
        """Whether LoRA modules can hold all of it."""
        return self.algorithm == PLAIN_LORA

    @property
    def label(self) -> str:
        """For messages: "a LoRA for SDXL"."""
        article = "a" if self.algorithm[:1] not in "AEIO(" else "an"
        known = FAMILIES.get(self.family or "")
        return f"{article} {self.algorithm} for {known.label}" if known else f"{article} {self.algorithm}"

    @property
    def advice(self) -> str:
        """What to use the file with; empty if the family is unknown."""
        known = FAMILIES.get(self.family or "")
        if known is None:
            return ""
        train, draw = known.scripts
        return f"Use it with {train} or {draw} (--network_module {known.module})."


def describe(keys: Iterable[str], shapes: Mapping[str, Sequence[int]] | None = None) -> NetworkKind:
    """What the keys (and shapes, where known) of a file say it is. Nothing is read, torch is not needed."""
    keys, shapes = list(keys), shapes or {}
    if any(key.startswith("lllite_") for key in keys):
        return NetworkKind("sdxl", "kohya", "ControlNet-LLLite")
    taken = {key: place for key in keys if (place := take_apart(key)) is not None}
    algorithm = algorithm_of(taken, shapes)
    if algorithm == UNKNOWN:
        return NetworkKind(None, UNKNOWN, UNKNOWN, has_denoiser=False)
    places = list(taken.values())
    naming = Counter(place.naming for place in places).most_common(1)[0][0]
    has_denoiser = any(place.part is Part.DENOISER for place in places)
    return NetworkKind(_family(taken, shapes), naming, algorithm, has_denoiser, _context_width(taken, shapes))


def family_in(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's metadata names, for files whose keys do not tell (text encoders alone)."""
    texts = [metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")]
    for pattern, family in _SAID:
        if any(re.match(pattern, text) for text in texts):
            return family
    return None


def check_kind(kind: NetworkKind, family: str | None, *, source: str) -> None:
    """Raises ValueError unless a file is a plain LoRA, and for models of `family` if both are known."""
    if not kind.is_network:
        raise ValueError(f"{source} is no network file: none of its keys belongs to a LoRA.")
    if kind.family and family and kind.family != family:
        here = FAMILIES[family].label
        raise ValueError(f"{source} is {kind.label}; the model here is {here}. {kind.advice}")
    if not kind.is_plain_lora:
        raise ValueError(f"{source} is {kind.label}, which cannot be used as a plain LoRA. {_other_module(kind)}")


def _other_module(kind: NetworkKind) -> str:
    if kind.naming != "kohya":
        return "Use a plain LoRA, or merge it into the model with the program that wrote it."
    if kind.algorithm == "ControlNet-LLLite":
        return "It is a control network, not a LoRA."
    return "Use it with --network_module lycoris.kohya (pip install lycoris-lora)."


#: how `modelspec.architecture` and `ss_base_model_version` begin
_SAID = (
    (r"stable-diffusion-xl|sdxl", "sdxl"), (r"stable-diffusion-3|sd3|medium$|5-medium$|5-large$", "sd3"),
    (r"flux", "flux"), (r"stable-diffusion-v[12]|sd_v[12]|sd_1", "sd"),
)  # fmt: skip


# --- algorithm -------------------------------------------------------------------------------------------------
#: what the name of a parameter says; the first that is found anywhere counts
_SIGNS = (
    (re.compile(r"^hada_"), "LoHa"),
    (re.compile(r"^lokr_"), "LoKr"),
    (re.compile(r"^b?oft_"), "OFT"),
    (re.compile(r"^[ab][12m]\.weight$"), "GLoRA"),
    (re.compile(r"^(lambda_layer|[pq]_layer\.weight)$"), "T-LoRA"),
    (re.compile(r"^on_input$"), "(IA)^3"),
    (re.compile(r"^diff(_b)?$"), "file of full differences"),
    (re.compile(r"^dora_scale$"), "DoRA"),
    (re.compile(r"^[wb]_norm$"), "LoRA with norm layers"),
    (re.compile(r"^lora_up\.bias$"), "LoRA with biases"),
    (re.compile(r"^lora_(down|up|mid)\.weight$"), PLAIN_LORA),
)


def algorithm_of(taken: Mapping[str, NetworkKey], shapes: Mapping[str, Sequence[int]]) -> str:
    """The algorithm of a file by its keys, taken apart."""
    parameters = {place.parameter: key for key, place in taken.items()}
    for sign, algorithm in _SIGNS:
        found = [key for parameter, key in parameters.items() if sign.match(parameter)]
        if found:
            return "BOFT" if algorithm == "OFT" and len(shapes.get(found[0], ())) == 4 else algorithm
    return UNKNOWN


# --- family ----------------------------------------------------------------------------------------------------
_FLUX = re.compile(r"^(double_blocks|single_blocks|single_transformer_blocks)_\d+_")
_SD3 = re.compile(r"^joint_blocks_\d+_")
_DIFFUSERS_BLOCK = re.compile(r"^transformer_blocks_(\d+)_(.+)$")
_FLUX_DOUBLE_BLOCKS = 19
_FLUX_WIDTHS, _SD3_WIDTHS = {3072}, {1536, 2432}
_INSIDE_BLOCKS = re.compile(
    r"^(attn2?_to_(q|k|v|out_0)|attn_add_[qkv]_proj|attn_to_add_out|ff(_context)?_net_(0_proj|2)|norm1(_context)?_linear)$"
)
#: layers that only one U-Net has: attention at the first level, a fourth level; deep transformers, three levels
_SD_UNET = re.compile(
    r"^(down_blocks_0_attentions|up_blocks_3_|down_blocks_3_|up_blocks_2_attentions|input_blocks_(1|2)_1_(?!op)"
    r"|input_blocks_(9|10|11)_|output_blocks_(9|10|11)_)"
)
_SDXL_UNET = re.compile(
    r"^(up_blocks_0_attentions|output_blocks_[012]_1_(proj|norm|transformer)|add_embedding_|label_emb_)"
    r"|_transformer_blocks_[1-9]"
)
_UNET = re.compile(r"^(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)_")
_CONTEXT = re.compile(r"_attn2_to_[kv]$")
_CONTEXT_WIDTHS = {768: "sd", 1024: "sd", 2048: "sdxl"}


def _family(taken: Mapping[str, NetworkKey], shapes: Mapping[str, Sequence[int]]) -> str | None:
    layers = {place.layer for place in taken.values() if place.part is Part.DENOISER}
    if any(_FLUX.match(layer) for layer in layers):
        return "flux"
    if any(_SD3.match(layer) for layer in layers):
        return "sd3"
    blocks = {layer: match for layer in layers if (match := _DIFFUSERS_BLOCK.match(layer))}
    if blocks:
        return _diffusers_transformer(taken, blocks, shapes)
    if any(_UNET.match(layer) for layer in layers):
        return _unet(taken, layers, shapes)
    return _text_encoders_only(taken) if not layers else None


def _diffusers_transformer(
    taken: Mapping[str, NetworkKey], blocks: Mapping[str, re.Match[str]], shapes: Mapping[str, Sequence[int]]
) -> str | None:
    """The two families name these blocks alike; what tells them apart are numbers, encoders and widths."""
    if not all(_INSIDE_BLOCKS.match(match[2]) for match in blocks.values()):
        return None
    if any(match[2].startswith("attn2_") or int(match[1]) >= _FLUX_DOUBLE_BLOCKS for match in blocks.values()):
        return "sd3"
    if any(place.part is Part.CLIP and place.number == 2 for place in taken.values()):
        return "sd3"
    for key, place in taken.items():
        if place.layer in blocks and place.parameter == "lora_down.weight" and len(shapes.get(key, ())) == 2:
            width = shapes[key][1]
            if width in _FLUX_WIDTHS | _SD3_WIDTHS:
                return "flux" if width in _FLUX_WIDTHS else "sd3"
    return None


def _unet(taken: Mapping[str, NetworkKey], layers: set[str], shapes: Mapping[str, Sequence[int]]) -> str | None:
    is_sd, is_sdxl = (any(pattern.search(layer) for layer in layers) for pattern in (_SD_UNET, _SDXL_UNET))
    if is_sd != is_sdxl:
        return "sd" if is_sd else "sdxl"
    family = _CONTEXT_WIDTHS.get(_context_width(taken, shapes) or 0)
    if family:
        return family
    return "sdxl" if any(place.part is Part.CLIP and place.number == 2 for place in taken.values()) else None


def _context_width(taken: Mapping[str, NetworkKey], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The one width that all of a file's factors for text vectors have."""
    widths = {
        shapes[key][1]
        for key, place in taken.items()
        if _CONTEXT.search(place.layer) and place.parameter == "lora_down.weight" and len(shapes.get(key, ())) >= 2
    }
    return widths.pop() if len(widths) == 1 else None


def _text_encoders_only(taken: Mapping[str, NetworkKey]) -> str | None:
    return "sd" if all(key.startswith("lora_te_") for key in taken) else None
