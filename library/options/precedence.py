"""Pairs of options of which one silently wins: one line says which counts, only when both are given."""

from __future__ import annotations

from collections.abc import Iterator

from library.options import Options, non_default

#: (option that counts, option that then has no effect); both must differ from their defaults
PAIRS = (
    ("max_train_epochs", "max_train_steps"),
    ("save_n_epoch_ratio", "save_every_n_epochs"),
    ("sample_every_n_epochs", "sample_every_n_steps"),
    ("initial_step", "initial_epoch"),
    ("caption_extention", "caption_extension"),
    ("controlnet_model_path", "controlnet_model_name_or_path"),
    ("xformers", "mem_eff_attn"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("dim_from_weights", "network_dim"),
    ("dim_from_weights", "network_alpha"),
    ("network_train_unet_only", "text_encoder_lr"),
    ("network_train_text_encoder_only", "unet_lr"),
    ("resume", "network_weights"),
    ("resume", "weights"),
    ("console_log_file", "console_log_simple"),
)


def losers(options: Options) -> Iterator[str]:
    """One sentence for every option that is given together with one that wins over it."""
    given = {name for name, value in non_default(options).items() if value not in (None, False, 0, "", [])}
    for winner, loser in PAIRS:
        if winner in given and loser in given:
            yield f"--{loser} has no effect together with --{winner}, which counts."
