"""Thousands of damaged dataset files: each loads to a valid configuration or ends in an error that says where."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.config_schema import DATASET_KEYS, KEYS, SUBSET_KEYS, ConfigError, SupportedKinds
from library.config_util import DataConfig, describe, load_data_config
from library.data.dataset import build_group
from library.data.discovery import Surroundings, discover_all
from library.data.records import LatentSpec
from library.options import make_options
from library.options.errors import UserError

CASES = 2200
SPEC = LatentSpec(channels=4, downsample=8, bucket_step=8, scale=1.0, shift=0.0, cache_suffix="_sd.npz")
KINDS = (
    SupportedKinds(), SupportedKinds(controlnet=True), SupportedKinds(fine_tuning=False, controlnet=True),
    SupportedKinds(dreambooth=False), SupportedKinds(dreambooth=False, fine_tuning=False, controlnet=True),
    SupportedKinds(caption_dropout=False),
)  # fmt: skip
#: what a message must have beside the file: a key path, an option, a line, or a repeated key
PLACE = re.compile(
    r"datasets|general|line \d+|--\w+|repeated key: \S|: '?[^ ]+'?: extra keys not allowed|save it as UTF-8"
)
ODD_TEXTS = (
    "", " ", "a", "\0", "a\0b", "\ud800", "🐈‍⬛", "é" * 3, "ｒｅｓｏｌｕｔｉｏｎ", "\u202egnp.a", "a\nb", "x" * 5000,
    "../..", "C:\\x", "%s{0}", "true", "512", "lanczos", "[[datasets]]", "\ufeff", "\U0010ffff",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, -1, 2, 3, 63, 512, 1.0, 0.5, -0.5, 1e308, 1e-320, math.inf, -math.inf, math.nan, 2**31, 2**63, -(2**70),
    10**30, 10**400, 1 << 20000,
)  # fmt: skip
Table = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures, masks and a metadata file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "masks"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (96, 64 + 32 * number)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "meta.json").write_text('{"a/0.png": {"caption": "x"}, "a/1": {"tags": "y"}}', encoding="utf-8")
    return tmp_path


def sound_file(rng: random.Random) -> Table:
    """A correct file: one to three datasets of the kinds there are, with some of the keys of each level."""
    values = {
        "resolution": rng.choice([128, [192, 128]]), "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64,
        "max_bucket_reso": 256, "bucket_no_upscale": True, "network_multiplier": 1, "validation_split": 0.5,
        "shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "a cat,", "flip_aug": True, "num_repeats": 3,
        "custom_attributes": {"x": [1, {"y": "z"}]}, "resize_interpolation": "box", "caption_separator": ";",
        "token_warmup_step": 0.5, "caption_tag_dropout_rate": 0.1, "cache_info": False,
    }  # fmt: skip

    def some(keys: dict[str, Any], level: str) -> Table:
        fitting = [key for key in values if key in keys and level in KEYS[key].levels and key != "cache_info"]
        return {key: values[key] for key in fitting if rng.random() < 0.3}

    subsets = {
        "dreambooth": {"image_dir": "a", "class_tokens": "cat"},
        "fine_tuning": {"metadata_file": "meta.json", "image_dir": "."},
        "controlnet": {"image_dir": "a", "conditioning_data_dir": "masks"},
    }  # fmt: skip
    datasets = []
    for _ in range(rng.randint(1, 3)):
        entries = [subsets[rng.choice(list(subsets))]]
        if rng.random() < 0.5:
            entries.append(entries[0] | ({"image_dir": "b"} if entries[0]["image_dir"] == "a" else {}))
        entries = [entry | some(SUBSET_KEYS, "subset") for entry in entries]
        datasets.append({"resolution": 128} | some(DATASET_KEYS, "dataset") | {"subsets": entries})
    return {"general": some(KEYS, "general"), "datasets": datasets}


# --- damage to the content ------------------------------------------------------------------------------------


def tables(content: Table) -> Iterator[Table]:
    """Every table of the file: the whole, `[general]`, the datasets, their subsets."""
    yield content
    if isinstance(content.get("general"), dict):
        yield content["general"]
    for dataset in content["datasets"] if isinstance(content.get("datasets"), list) else []:
        if isinstance(dataset, dict):
            yield dataset
            yield from (s for s in dataset.get("subsets") or [] if isinstance(s, dict))


def odd_value(rng: random.Random) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: None, lambda: rng.choice([True, False]), lambda: rng.choice(ODD_NUMBERS),
        lambda: rng.choice(ODD_TEXTS), lambda: [rng.choice(ODD_NUMBERS) for _ in range(rng.randint(0, 3))],
        lambda: {rng.choice(ODD_TEXTS): rng.choice(ODD_NUMBERS)}, lambda: [[], {}], lambda: [odd_value(rng)],
    ]  # fmt: skip
    return rng.choice(choices)()


def misspelt(name: str, rng: random.Random) -> str:
    place = rng.randrange(len(name))
    letter = rng.choice("abcxyz_é-. ")
    return rng.choice(
        [name[:place] + name[place + 1 :], name[:place] + letter + name[place:], name.upper(), name.replace("_", "-"),
         name[:place] + letter + name[place + 1 :], name + "s", name.title()]
    )  # fmt: skip


def wrong_value(content: Table, rng: random.Random) -> str:
    table = rng.choice([table for table in tables(content) if table])
    name = rng.choice(list(table))
    table[name] = odd_value(rng)
    return name


def any_key_anywhere(content: Table, rng: random.Random) -> str:
    name = rng.choice(list(KEYS))
    rng.choice(list(tables(content)))[name] = odd_value(rng)
    return name


def wrong_name(content: Table, rng: random.Random) -> str:
    table = rng.choice([table for table in tables(content) if table])
    name = rng.choice(list(table))
    table[misspelt(name, rng)] = table.pop(name)
    return ""


def unknown_name(content: Table, rng: random.Random) -> str:
    name = rng.choice([*ODD_TEXTS, "learning_rate", "train_data_dir", "prior_loss_weight", "datasets", "subsets"])
    rng.choice(list(tables(content)))[name] = odd_value(rng)
    return ""


def moved(content: Table, rng: random.Random) -> str:
    everywhere = list(tables(content))
    source, target = rng.choice([table for table in everywhere if table]), rng.choice(everywhere)
    name = rng.choice(list(source))
    target[name] = copy.deepcopy(source.pop(name))
    return ""


def lost(content: Table, rng: random.Random) -> str:
    table = rng.choice([table for table in tables(content) if table])
    table.pop(rng.choice(list(table)))
    return ""


def missing_place(content: Table, rng: random.Random) -> str:
    subsets = [table for table in tables(content) if "image_dir" in table or "metadata_file" in table]
    name = rng.choice(["image_dir", "metadata_file", "conditioning_data_dir"])
    rng.choice(subsets)[name] = rng.choice(["gone", "meta.json/x", "a/0.png", *ODD_TEXTS])
    return name


def doubled(content: Table, rng: random.Random) -> str:
    entries = rng.choice([content["datasets"], *(dataset["subsets"] for dataset in content["datasets"])])
    entries.append(copy.deepcopy(rng.choice(entries)))
    return ""


def other_structure(content: Table, rng: random.Random) -> str:
    dataset = rng.choice(content["datasets"])
    name, value = rng.choice([
        ("subsets", dataset["subsets"][0]), ("subsets", [dataset["subsets"]]), ("subsets", []), ("subsets", None),
        ("subsets", {}), ("subsets", [None]), ("subsets", "a"), ("datasets", content["datasets"]),
    ])  # fmt: skip
    dataset[name] = copy.deepcopy(value)
    return name


DAMAGE = (
    wrong_value, any_key_anywhere, wrong_name, unknown_name, moved, lost, missing_place, doubled, other_structure,
)  # fmt: skip


# --- damage to the text ---------------------------------------------------------------------------------------


def as_toml(content: Table) -> str:
    """TOML of a file's content, by hand: nulls are left out, what is no list of tables is written inline."""
    lines = []

    def write(table: Any, header: str) -> None:
        for name, value in table.items():
            is_list = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
            if not is_list and not (isinstance(value, dict) and not header) and value is not None:
                lines.append(f"{json.dumps(name)} = {inline(value)}")
        for name, value in table.items():
            path = f"{header}.{json.dumps(name)}".lstrip(".")
            if isinstance(value, dict) and not header:
                lines.append(f"[{path}]")
                write(value, path)
            elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
                for entry in value:
                    lines.append(f"[[{path}]]")
                    write(entry, path)

    write(content, "")
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(inline(entry) for entry in value if entry is not None) + "]"
    if isinstance(value, float):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan" if math.isnan(value) else repr(value))
    return hex(value) if isinstance(value, int) and value > 2**64 else json.dumps(value)


def as_json(content: Table) -> str:
    def default(value: Any) -> Any:
        raise TypeError(value)

    try:
        return json.dumps(content, default=default)
    except ValueError:  # a number of more digits than Python prints
        return as_toml(content).replace(" = ", ": ")


def broken_text(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        place = rng.randrange(len(content) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del content[place : place + rng.choice([1, 1, 3, 20])]
        elif kind == 1:
            content[place:place] = rng.choice([
                b"[", b"]", b"{", b"}", b'"', b"'", b"=", b",", b"\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"#", b"[[",
                b"[" * 3000, b"\xed\xa0\x80", b"9" * 5000, b"1979-05-27T07:32:00Z", b"null", b"NaN", b"\\u0000",
            ])  # fmt: skip
        elif kind == 2:
            del content[place:]
        elif kind == 3 and place < len(content):
            content[place] = rng.randrange(256)
        elif kind == 4:
            lines = content.split(b"\n")
            rng.shuffle(lines)
            content = bytearray(b"\n".join(lines))
        else:
            content += content[place:]
    return bytes(content)


# --- the test -------------------------------------------------------------------------------------------------


def assert_valid(config: DataConfig, *, with_images: bool) -> None:
    """Every value is one that its key allows, and the images can be found and placed (or a clear error says why)."""
    assert config.datasets
    for dataset in config.datasets:
        assert dataset.subsets
        for keys, record in [(DATASET_KEYS, dataset), *((SUBSET_KEYS, subset) for subset in dataset.subsets)]:
            for name, key in keys.items():
                value = getattr(record, name)
                assert value is None or key.check(value) == (value, ""), (name, value)
    describe(config, [[] for _ in config.datasets])
    if not with_images or sum(s.num_repeats for d in config.datasets for s in d.subsets) > 1000:
        return
    try:
        found = discover_all(config, Surroundings(SPEC))
        build_group(config, [parts.training for parts in found], spec=SPEC, tokenize=None, seed=0)
    except UserError as error:
        assert str(error)


def make_case(rng: random.Random, kinds: SupportedKinds) -> tuple[str, bytes, str]:
    """(file ending, content, name of the key whose damage is all that is wrong, or nothing)."""
    content, named = sound_file(rng), ""
    sound = as_json(content).encode()
    rounds = rng.choice([0, 1, 1, 1, 1, 2, 3])
    for number in range(rounds):
        try:
            named = rng.choice(DAMAGE)(content, rng)
        except (KeyError, IndexError, TypeError, AttributeError):  # an earlier round took away what this one damages
            named = ""
            continue
        named = named if number == rounds - 1 == 0 else ""
    ending = rng.choice([".toml", ".json"])
    text = as_toml(content) if ending == ".toml" else as_json(content)
    if rng.random() < 0.3:
        return ending, broken_text(text, rng), ""
    return ending, text.encode("utf-8", "surrogatepass"), named if named and loads(sound, kinds) else ""


def new_file(ending: str, content: bytes) -> str:
    """The name of a file with this content; never an old one, since some file systems wait when one is overwritten."""
    with tempfile.NamedTemporaryFile(prefix="data", suffix=ending, dir=".", delete=False) as file:
        file.write(content)
    return Path(file.name).name


def loads(content: bytes, kinds: SupportedKinds) -> bool:
    path = new_file(".json", content)
    try:
        load_data_config(make_options(dataset_config=path).dataset, kinds, bucket_step=8)
    except ConfigError:
        return False
    return True


@pytest.mark.slow
def test_every_damaged_file_loads_or_says_where_it_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(CASES):
            rng = random.Random(seed)
            kinds = rng.choice(KINDS) if rng.random() < 0.4 else SupportedKinds(controlnet=True)
            ending, content, named = make_case(rng, kinds)
            path = Path(new_file(ending, content))
            options = make_options(dataset_config=str(path), resolution=rng.choice([None, "128"]))
            try:
                config = load_data_config(options.dataset, kinds, bucket_step=8)
            except ConfigError as error:
                counts[f"{ending} refused"] += 1
                counts["problems"] += len(error.problems)
                assert_says_where(error.problems, path.name, named, seed)
                continue
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{content[:2000]!r}") from error
            counts[f"{ending} valid"] += 1
            assert_valid(config, with_images=seed % 3 == 0)
    finally:
        logging.disable(logging.NOTSET)
    with capsys.disabled():
        print(f"\n{CASES} damaged dataset files: {dict(sorted(counts.items()))}, 0 other exceptions")
    assert sum(counts[f"{e} {what}"] for e in (".toml", ".json") for what in ("valid", "refused")) == CASES
    assert min(counts[".toml valid"], counts[".json valid"], counts[".toml refused"], counts[".json refused"]) > 100


def assert_says_where(problems: tuple[str, ...], file: str, named: str, seed: int) -> None:
    assert problems
    for problem in problems:
        assert problem.startswith((file, "--")), (seed, problem)
        assert PLACE.search(problem), (seed, problem)
        assert len(problem.encode("utf-8")) < 2000, (seed, problem)
    is_syntax = "the file is not valid" in problems[0]
    text = "\n".join(problems)
    assert not named or is_syntax or any(word in text for word in (named, *places_of(named))), (seed, named, text)


def places_of(name: str) -> tuple[str, ...]:
    """What an error may name in place of a damaged key: what then lacks, or is checked together with it."""
    if name in ("image_dir", "metadata_file", "conditioning_data_dir", "general", "datasets", "subsets"):
        return ("image_dir", "metadata_file", "conditioning_data_dir", "subsets", "datasets")
    return ("resolution", "bucket") if "bucket" in name or name == "resolution" else ()
