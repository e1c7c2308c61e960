"""LoRA for Stable Diffusion 3 and 3.5: the MMDiT's joint blocks, CLIP-L, CLIP-G, and on request T5.

`--network_module networks.lora_sd3 --network_dim 16 --network_alpha 8 --network_args train_t5xxl=True`
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from networks.transformer_network import T5_PREFIX, TransformerNetwork

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights"]


class LoRANetwork(TransformerNetwork):
    """LoRA modules for an MMDiT, its two CLIP encoders and its T5 encoder."""

    module_name = "networks.lora_sd3"
    denoiser_classes = ("SingleDiTBlock",)  # the text side and the image side of every joint block
    encoder_prefixes = ("lora_te1", "lora_te2", T5_PREFIX)
    unsupported_arguments = (
        "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim", "x_mod_dim", "emb_dims",
        "train_block_indices", "split_qkv", "verbose",
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

    `text_encoder` is [CLIP-L, CLIP-G, T5]; any may be None. Raises ValueError for arguments that cannot be used.
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
