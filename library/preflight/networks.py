"""Networks: module and files fit the kind of model, and the module knows its arguments."""

from __future__ import annotations

from collections.abc import Iterator

from library.checkpoints.headers import peek
from library.checkpoints.lineages import VERSIONS
from library.checkpoints.recognition import ModelKind, recognise
from library.checkpoints.safetensors_header import Header
from library.preflight.subject import Subject, existing
from networks.known import OWN_MODULES, modules_for
from networks.recognition import NetworkKind, check_kind, describe


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
    kind = describe(header.shapes, header.shapes)
    if not kind.is_network and recognise(header.shapes) is not ModelKind.UNKNOWN:
        what = recognise(header.shapes).value
        yield f"{option} {path} looks like {what}; a network file (LoRA or another) is expected."
    elif subject.options.network.network_module in OWN_MODULES or kind.family not in (None, lineage.name):
        yield from _unfit(kind, lineage.name, source=f"{option} {path}")
    version = VERSIONS.get(kind.context_width or 0)
    if kind.family == lineage.name and version in lineage.kinds - subject.kinds:
        yield f"{option} {path} was trained for {version.value}: --v2 must fit it. Name another file."


def _unfit(kind: NetworkKind, family: str, *, source: str) -> Iterator[str]:
    try:
        check_kind(kind, family, source=source)
    except ValueError as error:
        yield str(error)


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
