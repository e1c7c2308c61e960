"""Options for the validation loss."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True)
class ValidationOptions:
    validation_seed: int | None = option("seed for choosing validation images and their noise", type="int")
    validation_split: float = option("fraction of the images that is held back for validation", 0.0, type="float")
    validate_every_n_steps: int | None = option("validate every n steps", type="int")
    validate_every_n_epochs: int | None = option("validate every n epochs (default: every epoch)", type="int")
    max_validation_steps: int | None = option("most batches per validation (default: all)", type="int")
