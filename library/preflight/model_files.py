"""Checkpoints by their headers: is it a model that the script can use, and what does it ask for?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from library.checkpoints.lineages import kind_of_model, lineage_of, prediction_options, text_layers
from library.checkpoints.recognition import ModelKind
from library.preflight.subject import Subject, existing

OPTION = "--pretrained_model_name_or_path"


def problems(subject: Subject) -> Iterator[str]:
    """The model is of another kind than the script's, or has fewer layers than `--clip_skip` counts."""
    path, lineage = existing(subject.options.model.pretrained_model_name_or_path), subject.lineage
    if path is None or lineage is None:
        return
    kind = kind_of_model(path)
    if kind is not None and kind not in lineage.kinds:
        trained = f"{subject.script} trains {lineage.title}"
        yield f"{OPTION} {path} looks like {kind.value}, but {trained}. {_advice(kind, subject)}"
    elif kind is not None and kind not in subject.kinds:
        yield f"{OPTION} {path} looks like {kind.value}: {'remove' if subject.options.model.v2 else 'add'} --v2."
    else:
        yield from _clip_skip(path, subject)


def _advice(kind: ModelKind, subject: Subject) -> str:
    """Which script is right for the file."""
    right = lineage_of({kind})
    script = right.script_like(subject.script) if right else None
    return f"Use {script}, or another file." if script else "Name another file."


def _clip_skip(path: Path, subject: Subject) -> Iterator[str]:
    wanted, layers = subject.options.model.clip_skip, text_layers(path)
    if wanted is not None and layers is not None and wanted > layers:
        yield f"--clip_skip {wanted}: the text encoder of {path} has only {layers} layers; give at most {layers}."


def damages(subject: Subject) -> Iterator[str]:
    """A model file that is not whole."""
    from library.checkpoints.tensors import is_safetensors, open_tensors

    path = existing(subject.options.model.pretrained_model_name_or_path)
    if path is not None and path.is_file() and is_safetensors(path):
        try:
            open_tensors(path)
        except (ValueError, OSError) as error:
            yield f"{OPTION}: {error}"


def warnings(subject: Subject) -> Iterator[str]:
    """Options that the model's own markers ask for."""
    path = existing(subject.options.model.pretrained_model_name_or_path)
    if path is None or not subject.option_names >= {"v_parameterization", "zero_terminal_snr"}:
        return
    given = {
        "--v_parameterization": subject.options.model.v_parameterization,
        "--zero_terminal_snr": subject.options.noise.zero_terminal_snr,
    }
    missing = [option for option in prediction_options(path) if not given[option]]
    if missing:
        yield (
            f"{OPTION} {path} was trained with v-prediction, as markers among its keys say: add {' '.join(missing)}, "
            "or the result will be noise."
        )
