"""What family and method say about the options, each for itself."""

from __future__ import annotations

from library.caching import text_option_problems
from library.families.base import ModelFamily
from library.generation.training_samples import sampling_problems
from library.methods.base import TrainingMethod
from library.options import Options
from library.preflight.subject import Subject, resolve

TRAINING = "library.training_loop:train"


def problems(subject: Subject) -> list[str]:
    """What `library.training_loop.train` would refuse."""
    if subject.run != TRAINING or subject.method is None:
        return []
    family = resolve(subject.family)(subject.options)
    return room_problems(subject.options, family, resolve(subject.method)(subject.options, family))


def room_problems(options: Options, family: ModelFamily, method: TrainingMethod) -> list[str]:
    """Problems with the options that concern family, method and sample images; nothing is loaded."""
    found = family.check_options() + method.check_options() + sampling_problems(options)
    return found or text_option_problems(options, family, method)
