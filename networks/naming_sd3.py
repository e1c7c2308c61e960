"""Stable Diffusion 3 layers as diffusers (PEFT, ai-toolkit, OneTrainer, SimpleTuner) names them."""

from __future__ import annotations

import re

from networks.places import Place, queries_keys_values

_BLOCK = re.compile(r"^transformer_blocks_(\d+)_(.+)$")
_INNER: dict[str, Place] = {
    **queries_keys_values("x_block_attn_qkv", "attn_to_{}"),
    **queries_keys_values("context_block_attn_qkv", "attn_add_{}_proj"),
    **queries_keys_values("x_block_attn2_qkv", "attn2_to_{}"),
    "attn_to_out_0": Place("x_block_attn_proj"),
    "attn_to_add_out": Place("context_block_attn_proj"),
    "attn2_to_out_0": Place("x_block_attn2_proj"),
    "ff_net_0_proj": Place("x_block_mlp_fc1"),
    "ff_net_2": Place("x_block_mlp_fc2"),
    "ff_context_net_0_proj": Place("context_block_mlp_fc1"),
    "ff_context_net_2": Place("context_block_mlp_fc2"),
    "norm1_linear": Place("x_block_adaLN_modulation_1"),
    "norm1_context_linear": Place("context_block_adaLN_modulation_1", may_swap=True),
}
_ENDS: dict[str, Place] = {
    "pos_embed_proj": Place("x_embedder_proj"),
    "time_text_embed_timestep_embedder_linear_1": Place("t_embedder_mlp_0"),
    "time_text_embed_timestep_embedder_linear_2": Place("t_embedder_mlp_2"),
    "time_text_embed_text_embedder_linear_1": Place("y_embedder_mlp_0"),
    "time_text_embed_text_embedder_linear_2": Place("y_embedder_mlp_2"),
    "norm_out_linear": Place("final_layer_adaLN_modulation_1", may_swap=True),
    "proj_out": Place("final_layer_linear"),
}


def place_of(layer: str) -> Place | None:
    """Where a layer of another program's file belongs; None if its name is ours or unknown."""
    match = _BLOCK.match(layer)
    if match is None:
        return _ENDS.get(layer)
    place = _INNER.get(match[2])
    return Place(f"joint_blocks_{match[1]}_{place.layer}", place.rows, place.may_swap) if place else None
