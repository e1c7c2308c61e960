"""Prompts of sample images: lines that cannot be drawn, told with their numbers before anything is loaded."""

from __future__ import annotations

from library.generation.training_samples import prompt_warnings
from library.preflight.subject import Subject


def warnings(subject: Subject) -> tuple[str, ...]:
    """What is ignored in the prompt file, and which of its prompts are skipped."""
    return prompt_warnings(subject.options, reads_weights=bool(subject.lineage and subject.lineage.reads_weights))
