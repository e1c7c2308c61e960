"""Checks that only some scripts make; their rows in `script` and `family_scripts` name them."""

from __future__ import annotations

from collections.abc import Iterator

from library.options import Options
from library.options.checks import is_missing_module


# --- networks --------------------------------------------------------------------------------------------------
def network(options: Options) -> Iterator[str]:
    chosen = options.network
    if not chosen.network_module and not options.dataset.debug_dataset:
        yield "--network_module is missing: name what to train, e.g. --network_module networks.lora."
    elif chosen.network_module and is_missing_module(chosen.network_module):
        yield f"--network_module {chosen.network_module}: there is no such Python module; LoRA is networks.lora."
    if chosen.dim_from_weights and not chosen.network_weights:
        yield "--dim_from_weights needs --network_weights FILE."
    if chosen.network_train_unet_only and chosen.network_train_text_encoder_only:
        yield "--network_train_unet_only and --network_train_text_encoder_only together train nothing: remove one."
    if len(chosen.base_weights_multiplier or ()) > len(chosen.base_weights or ()):
        yield "--base_weights_multiplier has more values than --base_weights."


def cached_text_is_frozen(options: Options) -> Iterator[str]:
    if options.cache.cache_text_encoder_outputs and not options.network.network_train_unet_only:
        yield "--cache_text_encoder_outputs needs --network_train_unet_only: cached text encoders cannot be trained."


# --- whole models ----------------------------------------------------------------------------------------------
def checkpoint_format(options: Options) -> Iterator[str]:
    saving = options.saving
    if saving.use_safetensors and saving.save_model_as == "ckpt":
        yield "--use_safetensors cannot be combined with --save_model_as ckpt: remove one of them."


def cached_text_or_training(options: Options) -> Iterator[str]:
    chosen = options.full
    if options.cache.cache_text_encoder_outputs and chosen.train_text_encoder and not chosen.use_t5xxl_cache_only:
        yield (
            "--cache_text_encoder_outputs cannot be combined with --train_text_encoder: the output of text encoders "
            "that are trained changes."
        )


def cached_text_or_weights(options: Options) -> Iterator[str]:
    if options.cache.cache_text_encoder_outputs and options.dataset.weighted_captions:
        yield "--cache_text_encoder_outputs cannot be combined with --weighted_captions: remove one of them."


def t5_training(options: Options) -> Iterator[str]:
    if not options.full.train_t5xxl:
        return
    if not options.full.train_text_encoder:
        yield "--train_t5xxl needs --train_text_encoder: T5-XXL is trained together with the CLIP text encoders."
    caching = [
        name
        for name, is_set in (
            ("use_t5xxl_cache_only", options.full.use_t5xxl_cache_only),
            ("cache_text_encoder_outputs", options.cache.cache_text_encoder_outputs),
        )
        if is_set
    ]
    if caching:
        yield f"--train_t5xxl cannot be combined with --{caching[0]}: the output of T5-XXL changes while it is trained."


def rates_of_frozen_text_encoders(options: Options) -> Iterator[str]:
    chosen = options.full
    for name in ("learning_rate_te", "learning_rate_te1", "learning_rate_te2"):
        if getattr(chosen, name) and not chosen.train_text_encoder:
            yield f"--{name} has no effect without --train_text_encoder."
    if chosen.learning_rate_te3 and not chosen.train_t5xxl:
        yield "--learning_rate_te3 has no effect without --train_t5xxl."


def groups_are_blocks(options: Options) -> Iterator[str]:
    if options.memory.fused_optimizer_groups is not None:
        yield "--fused_optimizer_groups does not work with this model: use --blockwise_fused_optimizers."


# --- embeddings ------------------------------------------------------------------------------------------------
def new_word(options: Options) -> Iterator[str]:
    chosen = options.textual_inversion
    if not chosen.token_string:
        yield "--token_string is missing: name the new word whose embedding is trained."
    if chosen.use_object_template and chosen.use_style_template:
        yield "--use_object_template and --use_style_template cannot be combined: remove one of them."


# --- ControlNet ------------------------------------------------------------------------------------------------
def mask_is_the_hint(options: Options) -> Iterator[str]:
    if options.dataset.masked_loss:
        yield "--masked_loss cannot be combined with ControlNet training: the mask would be the control image."


def control_net_is_not_used(options: Options) -> Iterator[str]:
    if options.control_net.controlnet_model_name_or_path is not None:
        yield "--controlnet_model_name_or_path has no effect: this script trains without a ControlNet."


# --- models ----------------------------------------------------------------------------------------------------
def one_kind_of_text_encoders(options: Options) -> Iterator[str]:
    if options.model.v2:
        yield "--v2 is for Stable Diffusion 2.x models, which this script does not train: leave it out."


def no_weighted_captions(options: Options) -> Iterator[str]:
    if options.dataset.weighted_captions:
        yield "--weighted_captions does not work with this model, whose captions have no weights: leave it out."


def huber_without_snr(options: Options) -> Iterator[str]:
    loss = options.loss
    if loss.loss_type in ("huber", "smooth_l1") and loss.huber_schedule == "snr":
        yield (
            f"--loss_type {loss.loss_type} needs --huber_schedule constant or exponential: this model's noise has no "
            "signal-to-noise schedule for --huber_schedule snr."
        )
