"""Values that are allowed to be typed and that no run can use."""

from __future__ import annotations

from collections.abc import Iterator

from library.preflight.subject import Subject


def loss(subject: Subject) -> Iterator[str]:
    """Huber losses divide by their parameter."""
    chosen = subject.options.loss
    if chosen.loss_type not in ("huber", "smooth_l1"):
        return
    for name in ("huber_c", "huber_scale"):
        value = getattr(chosen, name)
        if not value > 0:
            yield f"--{name} {value} is not allowed with --loss_type {chosen.loss_type}: it must be above 0."


def network(subject: Subject) -> Iterator[str]:
    """Dropping everything at every step trains nothing."""
    value = subject.options.network.network_dropout
    if value == 1:
        yield "--network_dropout 1 drops everything at every step, so nothing would be trained: it must be below 1."
