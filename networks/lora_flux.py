"""LoRA for FLUX.1: every Linear layer of the transformer's blocks, CLIP-L, and on request T5.

`--network_module networks.lora_flux --network_dim 16 --network_alpha 8 --network_args train_t5xxl=True`
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from networks.transformer_network import T5_PREFIX, TransformerNetwork

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights"]


class LoRANetwork(TransformerNetwork):
    """LoRA modules for a FLUX transformer, its CLIP-L and its T5 encoder."""

    module_name = "networks.lora_flux"
    denoiser_classes = ("DoubleStreamBlock", "SingleStreamBlock")
    encoder_prefixes = ("lora_te1", T5_PREFIX)
    unsupported_arguments = (
        "train_blocks", "train_double_block_indices", "train_single_block_indices", "img_attn_dim", "txt_attn_dim",
        "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim", "single_mod_dim", "in_dims",
        "split_qkv", "network_reg_dims", "network_reg_lrs", "ggpo_sigma", "ggpo_beta", "verbose",
    )  # fmt: skip


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoRANetwork:
    """A fresh network: rank `network_dim` (None: 4), alpha `network_alpha` (None: 1); `kwargs` are `--network_args`.

    `text_encoder` is [CLIP-L, T5]; either may be None. Raises ValueError for arguments that cannot be used.
    """
    return LoRANetwork.for_training(
        multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
    )


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: nn.Module | None,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: dict[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """(network with exactly the modules, ranks and alphas of a file, the file's tensors); nothing is loaded into it.

    `weights_sd` replaces the file. `kwargs` are `--network_args`; those that choose ranks have no effect here.
    """
    return LoRANetwork.from_file(
        multiplier, file, text_encoder, unet, weights_sd, kwargs, for_inference=for_inference
    )
