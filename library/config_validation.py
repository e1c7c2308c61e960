"""Check a dataset configuration against the table of keys; every problem is collected, none stops the reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from library.config_schema import (
    COMMAND_LINE_ONLY,
    KEYS,
    KIND_NAMES,
    LEVEL_NAMES,
    OPTION_NAMES,
    SUBSET_KEYS,
    Kind,
    Level,
    SupportedKinds,
    expected,
    shown,
    shown_key,
)
from library.options import Options

NOT_ALLOWED = "extra keys not allowed"
REQUIRED = "required key not provided"
Values = dict[str, Any]  # checked values of one level, without the absent and the null ones


@dataclass(frozen=True)
class CheckedDataset:
    """One entry of `datasets`; `kind` is None where the subsets contradict each other."""

    values: Values
    subsets: tuple[Values, ...]
    kind: Kind | None


@dataclass
class Validator:
    """Reads raw tables of one source; what is wrong is appended to `problems`."""

    source: str
    supported: SupportedKinds
    problems: list[str] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)  # names of the keys that had an unusable value somewhere

    def report(self, path: str, problem: str) -> None:
        """One line: source, key path, problem."""
        self.problems.append(f"{self.source}: {path}: {problem}" if path else f"{self.source}: {problem}")

    def read(self, raw: Mapping[str, Any]) -> tuple[Values, list[CheckedDataset]]:
        """The checked values of `[general]`, and the datasets."""
        for name in raw:
            if name not in ("general", "datasets"):
                self.report(shown_key(name), f"{NOT_ALLOWED}{self._explain(name, None, None)}")
        general: Values = {}
        if raw.get("general") is not None and self._is_table(raw["general"], "general"):
            general = self._read_level(raw["general"], "general", "general", None)
        entries = self._list_of_tables(raw.get("datasets"), "datasets")
        if not entries and raw.get("datasets") in (None, []):
            self.report("datasets", f"{REQUIRED}: there must be at least one [[datasets]] with [[datasets.subsets]]")
        return general, [self._read_dataset(entry, f"datasets[{index}]") for index, entry in entries]

    def command_line(self, values: Mapping[str, Any]) -> Values:
        """The layer below the file: option values by their key, checked like the file's."""
        checked: Values = {}
        for name, value in values.items():
            key = KEYS[name]
            if value is None or (key.is_caption_dropout and not self.supported.caption_dropout):
                continue
            checked[name], problem = key.check(value)
            if problem:
                self.problems.append(f"--{key.option}: {problem}, got {shown(value)}")
                self.invalid.add(name)
        return checked

    def _read_dataset(self, raw: Mapping[str, Any], path: str) -> CheckedDataset:
        entries = self._list_of_tables(raw.get("subsets"), f"{path}.subsets")
        if not entries and raw.get("subsets") in (None, []):
            self.report(path, "the dataset has no subsets; add [[datasets.subsets]]")
        kind = self._recognise([entry for _, entry in entries], path)
        own = {name: value for name, value in raw.items() if name != "subsets"}
        values = self._read_level(own, path, "dataset", kind)
        subsets = []
        for index, entry in entries:
            subset_path = f"{path}.subsets[{index}]"
            subsets.append(self._read_level(entry, subset_path, "subset", kind))
            for name, key in SUBSET_KEYS.items():
                if kind in key.required_for and entry.get(name) is None:
                    self.report(f"{subset_path}.{name}", f"{REQUIRED} ({KIND_NAMES[kind]} dataset)")
        return CheckedDataset(values, tuple(subsets), kind)

    def _recognise(self, subsets: list[Mapping[str, Any]], path: str) -> Kind | None:
        kinds = self.supported.kinds()
        if len(kinds) == 1 or not subsets:
            return kinds[0] if len(kinds) == 1 else None
        marks: tuple[tuple[Kind, str], ...] = (
            ("controlnet", "conditioning_data_dir"),
            ("fine_tuning", "metadata_file"),
        )
        for kind, name in marks:
            count = sum(subset.get(name) is not None for subset in subsets)
            if kind not in kinds or count == 0:
                continue
            if count == len(subsets):
                return kind
            self.report(
                path, f"some subsets have {name} and some do not; put them into separate [[datasets]]"
            )
            return None
        return kinds[-1]

    def _read_level(self, raw: Mapping[str, Any], path: str, level: Level, kind: Kind | None) -> Values:
        values: Values = {}
        for name, value in raw.items():
            if not self._is_allowed(name, level, kind):
                self.report(f"{path}.{shown_key(name)}", f"{NOT_ALLOWED}{self._explain(name, level, kind)}")
            elif value is not None:
                checked, problem = KEYS[name].check(value)
                if problem:
                    self.report(f"{path}.{name}", f"{problem}, got {shown(value)}")
                    self.invalid.add(name)
                else:
                    values[name] = checked
        return values

    def _is_allowed(self, name: str, level: Level, kind: Kind | None) -> bool:
        key = KEYS.get(name)
        if key is None or level not in key.levels or (key.is_caption_dropout and not self.supported.caption_dropout):
            return False
        if kind is None or level == "general":
            return any(supported in key.kinds for supported in self.supported.kinds())
        return kind in key.kinds

    def _explain(self, name: str, level: Level | None, kind: Kind | None) -> str:
        """Why a key is not allowed where it stands, and what would be right."""
        if name in COMMAND_LINE_ONLY:
            return f"; it can only be given on the command line, as --{name}"
        if name in OPTION_NAMES:
            return f"; in a dataset file this is {_with_levels(OPTION_NAMES[name])}"
        key = KEYS.get(name)
        if key is None:
            known = ["general", "datasets"] if level is None else [*KEYS, "subsets"]
            is_option = name in Options.specs()
            near = [] if is_option else get_close_matches(name[:60].lower().replace("-", "_"), known, n=1)
            if near:
                return f"; did you mean {_with_levels(near[0])}?"
            if level is None:
                return "; a dataset file has only [general] and [[datasets]]"
            allowed = [key for key in KEYS if self._is_allowed(key, level, kind)]
            place = "; it is an option of the command line and of --config_file" if is_option else ""
            return f"{place}; allowed in {LEVEL_NAMES[level]}: {', '.join(allowed)}"
        if key.is_caption_dropout and not self.supported.caption_dropout:
            return "; this script has no caption dropout"
        if not any(supported in key.kinds for supported in self.supported.kinds()):
            if name == "conditioning_data_dir":
                return "; conditioning_data_dir needs --masked_loss"
            return f"; only for {_names(key.kinds)} datasets, which this script does not train"
        if kind is not None and kind not in key.kinds:
            return f"; this is a {KIND_NAMES[kind]} dataset, and the key is only for {_names(key.kinds)}"
        return f"; it is valid only in {_levels_of(name)}"

    def _is_table(self, value: Any, path: str) -> bool:
        if isinstance(value, Mapping):
            return True
        self.report(path, f"{expected('table')}, got {shown(value)}")
        return False

    def _list_of_tables(self, value: Any, path: str) -> list[tuple[int, Mapping[str, Any]]]:
        if value is None:
            return []
        if not isinstance(value, list):
            self.report(path, f"{expected('list')}; in TOML, a list of tables has double brackets: [[...]]")
            return []
        return [(index, entry) for index, entry in enumerate(value) if self._is_table(entry, f"{path}[{index}]")]


def _levels_of(name: str) -> str:
    """The levels of a known key, in words."""
    levels = [LEVEL_NAMES[level] for level in KEYS[name].levels]
    return " and ".join([", ".join(levels[:-1]), levels[-1]] if len(levels) > 1 else levels)


def _with_levels(name: str) -> str:
    if name in KEYS:
        return f"{name} (valid in {_levels_of(name)})"
    return {"general": "[general]", "datasets": "[[datasets]]"}.get(name, "[[datasets.subsets]]")


def _names(kinds: tuple[Kind, ...]) -> str:
    return " and ".join(KIND_NAMES[kind] for kind in kinds)
