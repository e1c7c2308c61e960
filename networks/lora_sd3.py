"""LoRA for Stable Diffusion 3 and 3.5: the MMDiT's joint blocks, CLIP-L, CLIP-G, and on request T5.

`--network_module networks.lora_sd3 --network_dim 16 --network_alpha 8 --network_args train_t5xxl=True`
"""

from __future__ import annotations

from networks.transformer_network import TransformerNetwork, entry_points
from networks.translation import T5_PREFIX

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights"]


class LoRANetwork(TransformerNetwork):
    """LoRA modules for an MMDiT, its two CLIP encoders and its T5 encoder."""

    family = "sd3"
    module_name = "networks.lora_sd3"
    denoiser_classes = ("SingleDiTBlock",)  # the text side and the image side of every joint block
    encoder_prefixes = ("lora_te1", "lora_te2", T5_PREFIX)
    unsupported_arguments = (
        "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim", "x_mod_dim", "emb_dims",
        "train_block_indices", "split_qkv", "verbose",
    )  # fmt: skip


create_network, create_network_from_weights = entry_points(LoRANetwork)
known_arguments, argument_problems = LoRANetwork.known_arguments, LoRANetwork.argument_problems
