"""Options for training a network module (LoRA and relatives)."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class NetworkOptions:
    network_module: str | None = option("Python module that makes the network, e.g. networks.lora")
    network_weights: str | None = option("network file to start from")
    network_dim: int | None = option("rank of the network (default: the module's, 4 for LoRA)", type="int")
    network_alpha: float = option("alpha: the network's output is scaled by alpha / rank", 1, type="float")
    network_dropout: float | None = option("chance that a value inside the network is dropped", type="float")
    network_args: tuple[str, ...] | None = option("further key=value arguments of the network module", nargs="*")
    network_train_unet_only: bool = flag("train only the denoiser's part of the network")
    network_train_text_encoder_only: bool = flag("train only the text encoders' part of the network")
    dim_from_weights: bool = flag("take ranks from --network_weights")
    scale_weight_norms: float | None = option("limit the norm of each trained weight, e.g. 1", type="float")
    base_weights: tuple[str, ...] | None = option("network files merged into the model before training", nargs="*")
    base_weights_multiplier: tuple[float, ...] | None = option(
        "strength of each of --base_weights (default: 1)", type="float", nargs="*"
    )
    unet_lr: float | None = option("learning rate of the denoiser (default: --learning_rate)", type="float")
    text_encoder_lr: tuple[float, ...] | None = option(
        "learning rate of the text encoders, one or one each (default: --learning_rate)", type="float", nargs="*"
    )
