"""Everything that can be wrong with a run and be said before data and models are read, in one report.

A check is light, or it imports torch; the latter are made only if the options that they are about are given, or if
nothing else is wrong (the run needs torch next). So a typing error is answered at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.options import non_default
from library.preflight.subject import Subject, resolve

if TYPE_CHECKING:
    from library.launch import Script

_MISTAKES = (ValueError, ImportError, OSError)
_OPTION = re.compile(r"--[A-Za-z]\w*")


@dataclass(frozen=True)
class Check:
    """`function` is the dotted path of `Subject -> sentences`; scripts that have the option `option` make it.

    `about`: the options for which a heavy check is worth its imports; None marks a light one.
    """

    option: str
    function: str
    about: frozenset[str] | None = None

    @property
    def is_heavy(self) -> bool:
        return self.about is not None


def _heavy(option: str, function: str, *about: str) -> Check:
    return Check(option, function, frozenset((option, *about)))


_NETWORK_TRAINING = "dim_from_weights"  # an option that only scripts which train networks have
#: options that families and methods look at, each for itself
_OF_ROOMS = (
    "xformers", "cache_text_encoder_outputs", "mixed_precision", "save_model_as", "model_prediction_type",
    "timestep_sampling", "weighting_scheme", "clip_l", "clip_g", "t5xxl", "ae", "block_lr", "cond_emb_dim", "weights",
)  # fmt: skip

PROBLEMS: tuple[Check, ...] = (
    Check("huber_c", "library.preflight.numbers:loss"),
    Check("network_dropout", "library.preflight.numbers:network"),
    Check("pretrained_model_name_or_path", "library.preflight.model_files:problems"),
    Check(_NETWORK_TRAINING, "library.preflight.networks:file_problems"),
    Check("output_dir", "library.preflight.outputs:training_problems"),
    Check("cache_latents_to_disk", "library.preflight.outputs:cache_problems"),
    Check("outdir", "library.preflight.outputs:drawing_problems"),
    _heavy(
        "optimizer_type", "library.preflight.optimizer:problems", "optimizer_args", "use_8bit_adam",
        "use_lion_optimizer",
    ),
    _heavy("lr_scheduler", "library.preflight.schedule:problems", "lr_scheduler_type", "lr_scheduler_args"),
    _heavy(_NETWORK_TRAINING, "library.preflight.networks:argument_problems", "network_args"),
    _heavy("sample_prompts", "library.preflight.rooms:problems", *_OF_ROOMS),
    Check("pretrained_model_name_or_path", "library.preflight.model_files:damages", frozenset()),
)  # fmt: skip
WARNINGS: tuple[Check, ...] = (
    Check("pretrained_model_name_or_path", "library.preflight.model_files:warnings"),
    Check("cache_latents_to_disk", "library.preflight.outputs:cache_warnings"),
)


def problems(options: Any, script: Script, found: Sequence[str] = ()) -> list[str]:
    """What is wrong, one sentence each; `found` is what is known to be wrong already.

    Where several checks complain about one option, the first counts.
    """
    subject = _subject(options, script)
    checks = [check for check in PROBLEMS if check.option in subject.option_names]
    texts: list[str] = []
    for check in checks:
        if not check.is_heavy:
            texts += _new(_sentences(check, subject), [*found, *texts])
    given = set(non_default(options))
    asked = [check for check in checks if check.is_heavy and given & (check.about or frozenset())]
    for check in asked:
        texts += _new(_sentences(check, subject), [*found, *texts])
    for check in checks:
        if check.is_heavy and check not in asked and not found and not texts:
            texts += _sentences(check, subject)
    return texts


def warnings(options: Any, script: Script) -> list[str]:
    """What the user of a run without mistakes should know before it begins, one sentence each."""
    subject = _subject(options, script)
    checks = [check for check in WARNINGS if check.option in subject.option_names]
    return [text for check in checks for text in _sentences(check, subject)]


def _subject(options: Any, script: Script) -> Subject:
    return Subject(options, script.options, script.name, script.family, script.method, script.run)


def _sentences(check: Check, subject: Subject) -> list[str]:
    """What a check says. It runs silently: the run itself gives the messages of what is used here."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return list(resolve(check.function)(subject))
    except _MISTAKES as error:
        return str(error).splitlines() or [type(error).__name__]
    finally:
        logging.disable(level)


def _new(texts: Iterable[str], known: Iterable[str]) -> list[str]:
    """The sentences about options that no known sentence begins with."""
    options = {_first_option(text) for text in known} - {None}
    return [text for text in texts if _first_option(text) not in options]


def _first_option(text: str) -> str | None:
    found = _OPTION.search(text)
    return found.group() if found else None
