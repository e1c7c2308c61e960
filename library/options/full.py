"""Options for training a whole model."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option
from library.options.values import read_block_rates


@dataclass(frozen=True)
class FullTrainingOptions:
    """`block_lr` holds 23 learning rates; `stop_text_encoder_training` is a step, -1 means that it never trains."""

    train_text_encoder: bool = flag("train the CLIP text encoders too")
    train_t5xxl: bool = flag("train T5-XXL too (with --train_text_encoder)")
    use_t5xxl_cache_only: bool = flag("cache the output of T5-XXL alone; the CLIP text encoders run in every step")
    learning_rate_te: float | None = option(
        "learning rate of the text encoder (default: --learning_rate)", type="float"
    )
    learning_rate_te1: float | None = option(
        "learning rate of the first text encoder, CLIP-L; 0 = frozen (default: --learning_rate)", type="float"
    )
    learning_rate_te2: float | None = option(
        "learning rate of the second text encoder, CLIP-G; 0 = frozen (default: --learning_rate)", type="float"
    )
    learning_rate_te3: float | None = option(
        "learning rate of the third text encoder, T5-XXL; 0 = frozen (default: --learning_rate)", type="float"
    )
    stop_text_encoder_training: int | None = option(
        "step after which the text encoder stays as it is; -1 = never train it (default: train it to the end)",
        type="int",
    )
    no_token_padding: bool = flag("do not fill captions up to the longest possible number of tokens")
    block_lr: tuple[float, ...] | None = option(
        "23 learning rates of the U-Net's blocks, separated by commas; 0 = not trained", convert=read_block_rates
    )
    num_last_block_to_freeze: int | None = option("keep the last n blocks as they are", type="int")
    diffusers_xformers: bool = flag("use xformers in the VAE")
