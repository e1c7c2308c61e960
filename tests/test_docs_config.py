"""`docs/config.md` says what the table of keys says, and its examples load."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from library.config_schema import (
    INTERPOLATIONS,
    KEYS,
    LONGEST_SIDE,
    DatasetConfig,
    Kind,
    Level,
    SubsetConfig,
    SupportedKinds,
)
from library.config_util import load_data_config
from library.data.custom_group import load_dataset_class
from library.data.metadata_file import read_metadata_file
from library.data.records import BatchRequest, LatentSpec
from library.options import make_options

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
KIND_WORDS: dict[Kind, str] = {
    "dreambooth": "DreamBooth", "fine_tuning": "fine-tuning", "controlnet": "ControlNet/mask"
}  # fmt: skip
LEVEL_WORDS: dict[str, Level] = {"[general]": "general", "[[datasets]]": "dataset", "[[datasets.subsets]]": "subset"}


def sections() -> dict[str, str]:
    """Heading -> the text below it."""
    parts = re.split(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[dict[str, str]]:
    """The rows of the first table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def documented() -> dict[str, tuple[tuple[Level, ...], dict[str, str]]]:
    """Key -> the levels of its section, its row."""
    found: dict[str, tuple[tuple[Level, ...], dict[str, str]]] = {}
    for heading, text in sections().items():
        if re.match(r"Of (a|any) \w+: ", heading):
            levels = tuple(LEVEL_WORDS[name] for name in re.findall(r"`([^`]+)`", heading))
            for row in rows(text):
                name = row["key"].strip("`")
                assert name not in found, f"{name} is documented twice"
                found[name] = levels, row
    return found


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_key_is_documented_at_its_levels() -> None:
    assert {name: levels for name, (levels, _) in documented().items()} == {
        name: key.levels for name, key in KEYS.items()
    }


@pytest.mark.parametrize("name", KEYS)
def test_kinds_options_and_defaults_are_those_of_the_table(name: str) -> None:
    key, row = KEYS[name], documented()[name][1]
    kinds = row.get("kinds", "all")
    assert kinds == "all" and len(key.kinds) == 3 or set(kinds.split(", ")) == {KIND_WORDS[k] for k in key.kinds}
    assert row["option"] == (f"`--{key.option}`" if key.option else "none")
    assert row["meaning"]
    if row["default"].startswith("required"):
        assert key.required_for or name == "resolution"
        return
    defaults = {field.name: field.default for field in (*fields(SubsetConfig), *fields(DatasetConfig))}
    default = "empty" if name == "custom_attributes" else defaults[name]
    written = "none" if default is None else str(default)
    if isinstance(default, bool):
        written = str(default).lower()
    assert row["default"].strip("`") == written


@pytest.mark.parametrize("name", KEYS)
def test_what_a_value_may_be_is_what_the_check_accepts(name: str) -> None:
    allowed, check = documented()[name][1]["value"], KEYS[name].check

    def accepts(value: Any) -> bool:
        return check(value)[1] == ""

    assert accepts(True) == (allowed == "bool")
    assert accepts({}) == (allowed == "table")
    assert accepts(3) == bool(re.match(r"int|float(?!, 0 … 1)", allowed))
    assert accepts(0.5) == bool(re.search(r"(^|or )float", allowed))
    assert accepts(0) == bool(re.match(r"int$|int ≥ 0|(int or )?float", allowed))
    assert accepts("a") == bool(re.match(r"text|path", allowed))
    assert accepts("") == (allowed == "text")
    assert accepts([64, 64]) == ("[" in allowed)
    assert accepts([2.5, 1.0]) is False
    assert accepts(-1) == (allowed in ("int", "float"))
    assert accepts(LONGEST_SIDE + 1) == bool(re.match(r"int$|int ≥|int or float|float$", allowed))
    if name == "resize_interpolation":
        assert tuple(allowed.split(", ")) == INTERPOLATIONS


def test_every_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = set()
    for suffix in ("toml", "json"):
        for number, text in enumerate(examples(suffix)):
            content = tomllib.loads(text) if suffix == "toml" else json.loads(text)
            path = tmp_path / f"example{number}.{suffix}"
            path.write_text(text, encoding="utf-8")
            if "datasets" not in content:
                assert len(read_metadata_file(str(path))) == len(content)
                continue
            for subset in (subset for dataset in content["datasets"] for subset in dataset["subsets"]):
                for name in ("image_dir", "conditioning_data_dir"):
                    Path(subset.get(name, ".")).mkdir(parents=True, exist_ok=True)
                if "metadata_file" in subset:
                    Path(subset["metadata_file"]).write_text("{}", encoding="utf-8")
            options = make_options(dataset_config=str(path)).dataset
            config = load_data_config(options, SupportedKinds(controlnet=True), bucket_step=64)
            loaded |= {dataset.kind for dataset in config.datasets}
    assert loaded == {"dreambooth", "fine_tuning", "controlnet"}


def test_the_example_class_gives_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = examples("python")
    (tmp_path / "documented_stripes.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    group = load_dataset_class(
        make_options(dataset_class="documented_stripes.Stripes", resolution="64,128"),
        spec=LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd.npz"),
        tokenize=lambda captions: {"input_ids": torch.zeros(len(captions), 1, 77, dtype=torch.int64)}, seed=0,
        bucket_step=64, caption_replacements={},
    )  # fmt: skip
    batch = group[BatchRequest(epoch=1, index=99, step=0)]
    assert len(group) == 100
    assert batch.images.shape == (2, 3, 128, 64)
