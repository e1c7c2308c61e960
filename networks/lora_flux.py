"""LoRA for FLUX.1: every Linear layer of the transformer's blocks, CLIP-L, and on request T5.

`--network_module networks.lora_flux --network_dim 16 --network_alpha 8 --network_args train_t5xxl=True`
"""

from __future__ import annotations

from networks.transformer_network import TransformerNetwork, entry_points
from networks.translation import T5_PREFIX

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights"]


class LoRANetwork(TransformerNetwork):
    """LoRA modules for a FLUX transformer, its CLIP-L and its T5 encoder."""

    family = "flux"
    module_name = "networks.lora_flux"
    denoiser_classes = ("DoubleStreamBlock", "SingleStreamBlock")
    encoder_prefixes = ("lora_te1", T5_PREFIX)
    unsupported_arguments = (
        "train_blocks", "train_double_block_indices", "train_single_block_indices", "img_attn_dim", "txt_attn_dim",
        "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim", "single_mod_dim", "in_dims",
        "split_qkv", "network_reg_dims", "network_reg_lrs", "ggpo_sigma", "ggpo_beta", "verbose",
    )  # fmt: skip


create_network, create_network_from_weights = entry_points(LoRANetwork)
known_arguments, argument_problems = LoRANetwork.known_arguments, LoRANetwork.argument_problems
