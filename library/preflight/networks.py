"""Networks: module and files fit the kind of model, and the module knows its arguments."""

from __future__ import annotations

from collections.abc import Iterator

from library.checkpoints.headers import Header, peek
from library.checkpoints.lineages import is_network, kinds_of_network, lineage_of
from library.checkpoints.recognition import ModelKind, recognise
from library.preflight.subject import Subject, existing
from networks.known import OWN_MODULES, modules_for


# --- files -----------------------------------------------------------------------------------------------------
def file_problems(subject: Subject) -> Iterator[str]:
    """The module and the files of `--network_weights` and `--base_weights` belong to the script's kind of model."""
    if subject.lineage is None:
        return
    chosen = subject.options.network
    yield from _module(subject)
    files = [("--network_weights", chosen.network_weights)]
    files += [("--base_weights", path) for path in chosen.base_weights or ()]
    for option, name in files:
        path = existing(name)
        header = peek(path) if path is not None else None
        if header is not None:
            yield from _file(option, str(path), header, subject)


def _module(subject: Subject) -> Iterator[str]:
    name, lineage = subject.options.network.network_module, subject.lineage
    if lineage is None or name not in OWN_MODULES or lineage.name in OWN_MODULES[name]:
        return
    right = " or ".join(modules_for(lineage.name))
    yield f"--network_module {name} is not for {lineage.title}, which {subject.script} trains: use {right}."


def _file(option: str, path: str, header: Header, subject: Subject) -> Iterator[str]:
    lineage = subject.lineage
    if lineage is None:
        return
    if not is_network(header.shapes):
        kind = recognise(header.shapes)
        what = f"looks like {kind.value}" if kind is not ModelKind.UNKNOWN else "holds no network that is known here"
        yield f"{option} {path} {what}; a network file (LoRA or another) is expected."
        return
    kinds = kinds_of_network(header.shapes)
    if not kinds or kinds & subject.kinds:
        return
    right = lineage_of(kinds)
    if right is None or right is lineage:
        yield f"{option} {path} was trained for {_words(kinds)}: --v2 must fit it. Name another file."
        return
    script = right.script_like(subject.script)
    advice = f"Use {script}, or another file." if script else "Name another file."
    yield f"{option} {path} is a network for {right.title}, but {subject.script} trains {lineage.title}. {advice}"


def _words(kinds: frozenset[ModelKind]) -> str:
    return " or ".join(sorted(kind.value for kind in kinds))


# --- arguments -------------------------------------------------------------------------------------------------
def argument_problems(subject: Subject) -> Iterator[str]:
    """What one of our own modules says about `--network_args`; other programs' modules are not asked."""
    from networks import contract

    chosen = subject.options.network
    if chosen.network_module not in OWN_MODULES:
        return
    arguments = contract.parse_network_args(chosen.network_args)
    module = contract.import_network_module(chosen.network_module)
    yield from module.argument_problems(arguments, lineage=subject.lineage.name if subject.lineage else "")
