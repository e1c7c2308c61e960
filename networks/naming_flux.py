"""FLUX.1 layers as diffusers (PEFT, ai-toolkit, OneTrainer, SimpleTuner) and XLabs name them."""

from __future__ import annotations

import re

from networks.places import Place, joined, queries_keys_values

_BLOCK = re.compile(r"^(transformer_blocks|single_transformer_blocks|double_blocks|single_blocks)_(\d+)_(.+)$")
#: the inner width of a single block is four times the width of its attention
_ATTENTION, _MLP = (0, 3), (3, 7)

_DOUBLE: dict[str, Place] = {
    **queries_keys_values("img_attn_qkv", "attn_to_{}"),
    **queries_keys_values("txt_attn_qkv", "attn_add_{}_proj"),
    "attn_to_out_0": Place("img_attn_proj"),
    "attn_to_add_out": Place("txt_attn_proj"),
    "ff_net_0_proj": Place("img_mlp_0"),
    "ff_net_2": Place("img_mlp_2"),
    "ff_context_net_0_proj": Place("txt_mlp_0"),
    "ff_context_net_2": Place("txt_mlp_2"),
    "norm1_linear": Place("img_mod_lin"),
    "norm1_context_linear": Place("txt_mod_lin"),
}
_SINGLE: dict[str, Place] = {
    **joined("linear1", {"attn_to_q": (0, 1), "attn_to_k": (1, 2), "attn_to_v": (2, 3), "proj_mlp": _MLP}),
    "proj_out": Place("linear2"),
    "norm_linear": Place("modulation_lin"),
}
_XLABS_DOUBLE: dict[str, Place] = {
    "processor_qkv_lora1": Place("img_attn_qkv"),
    "processor_proj_lora1": Place("img_attn_proj"),
    "processor_qkv_lora2": Place("txt_attn_qkv"),
    "processor_proj_lora2": Place("txt_attn_proj"),
}
_XLABS_SINGLE: dict[str, Place] = {
    "processor_qkv_lora": Place("linear1", (*_ATTENTION, _MLP[1])),
    "processor_proj_lora": Place("linear2"),
}
#: block group -> (our group, its layers)
_GROUPS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
    "double_blocks": ("double_blocks", _XLABS_DOUBLE),
    "single_blocks": ("single_blocks", _XLABS_SINGLE),
}
_ENDS: dict[str, Place] = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "time_text_embed_timestep_embedder_linear_1": Place("time_in_in_layer"),
    "time_text_embed_timestep_embedder_linear_2": Place("time_in_out_layer"),
    "time_text_embed_text_embedder_linear_1": Place("vector_in_in_layer"),
    "time_text_embed_text_embedder_linear_2": Place("vector_in_out_layer"),
    "time_text_embed_guidance_embedder_linear_1": Place("guidance_in_in_layer"),
    "time_text_embed_guidance_embedder_linear_2": Place("guidance_in_out_layer"),
    "norm_out_linear": Place("final_layer_adaLN_modulation_1", may_swap=True),
    "proj_out": Place("final_layer_linear"),
}


def place_of(layer: str) -> Place | None:
    """Where a layer of another program's file belongs; None if its name is ours or unknown."""
    match = _BLOCK.match(layer)
    if match is None:
        return _ENDS.get(layer)
    group, number, inner = match.groups()
    ours, places = _GROUPS[group]
    place = places.get(inner)
    return Place(f"{ours}_{number}_{place.layer}", place.rows, place.may_swap) if place else None
