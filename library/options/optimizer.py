"""Options for the optimizer and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class OptimizerOptions:
    """`lr_warmup_steps` and `lr_decay_steps` are steps when int, and a fraction of all steps when float."""

    optimizer_type: str = option("AdamW (default), AdamW8bit, Lion, Prodigy, ... or a dotted path to a class", "")
    use_8bit_adam: bool = flag("old form of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = flag("old form of --optimizer_type Lion")
    learning_rate: float = option("learning rate", 2.0e-6, type="float")
    max_grad_norm: float = option("clip gradients to this norm; 0 = no clipping", 1.0, type="float")
    optimizer_args: tuple[str, ...] | None = option("further key=value arguments of the optimizer", nargs="*")
    lr_scheduler_type: str = option("schedule class of your own: name in torch.optim.lr_scheduler or dotted path", "")
    lr_scheduler_args: tuple[str, ...] | None = option("further key=value arguments of the schedule", nargs="*")
    lr_scheduler: str = option("learning-rate schedule, e.g. constant, cosine, linear", "constant")
    lr_warmup_steps: int | float = option(
        "steps until the full learning rate is reached; below 1 or with %: a fraction of all steps",
        0,
        type="int_or_float",
    )
    lr_decay_steps: int | float = option(
        "steps of the final decay (warmup_stable_decay); below 1 or with %: a fraction of all steps",
        0,
        type="int_or_float",
    )
    lr_scheduler_num_cycles: int = option("number of restarts of cosine_with_restarts", 1, type="int")
    lr_scheduler_power: float = option("power of the polynomial schedule", 1, type="float")
    lr_scheduler_timescale: int | None = option("time scale of inverse_sqrt (default: the warm-up steps)", type="int")
    lr_scheduler_min_lr_ratio: float | None = option("lowest learning rate relative to the highest", type="float")
    fused_backward_pass: bool = flag("step the optimizer during the backward pass: less memory (Adafactor only)")
