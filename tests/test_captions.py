"""Stored captions on their way to the tokenizer: the table of cases, distributions, and caption files."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config_schema import SubsetConfig
from library.data.caption_files import find_caption_file, read_caption_file, read_captions
from library.data.captions import CaptionContext, expand_wildcards, has_choices, process_caption, random_stream
from library.data.metadata_file import MetadataEntry, merge_caption

CASES = json.loads((Path(__file__).parent / "data" / "captions.json").read_text(encoding="utf-8"))
FIRST = CaptionContext(epoch=1, step=0)
DRAWS = 10_000


def context_of(case: dict[str, Any], *, is_training: bool = True) -> CaptionContext:
    state = CASES["about"]["default_state"] | case.get("state", {})
    replacements = dict(case.get("replacements", []))
    return CaptionContext(
        state["current_epoch"], state["current_step"], state["max_train_steps"], is_training, replacements
    )


@pytest.mark.parametrize("case", CASES["process_caption"], ids=lambda case: case["id"])
def test_caption_case(case: dict[str, Any]) -> None:
    known = {field.name for field in fields(SubsetConfig)}
    settings = CASES["about"]["default_settings"] | case["settings"]
    assert set(settings) <= known
    results = {
        process_caption(case["caption"], SubsetConfig(**settings), random.Random(seed), context_of(case))
        for seed in range(5)
    }
    assert results == {case["expected"]}


def test_the_table_has_all_cases() -> None:
    assert len(CASES["process_caption"]) == 76


def draw(caption: str, context: CaptionContext = FIRST, **settings: Any) -> Counter[str]:
    subset = SubsetConfig(**settings)
    return Counter(
        process_caption(caption, subset, random_stream(0, 1, sample, "caption"), context) for sample in range(DRAWS)
    )


def is_near(count: int, probability: float) -> bool:
    """Within four standard errors."""
    return abs(count - DRAWS * probability) < 4 * math.sqrt(DRAWS * probability * (1 - probability))


@pytest.mark.parametrize(
    ("caption", "settings", "probabilities"),
    [
        (
            "p, q ||| a, b ||| z",
            {"shuffle_caption": True, "keep_tokens_separator": "|||"},
            {"p, q, a, b, z": 0.5, "p, q, b, a, z": 0.5},
        ),
        ("a, b", {"caption_tag_dropout_rate": 0.1}, {"a, b": 0.81, "a": 0.09, "b": 0.09, "": 0.01}),
        ("{red|blue} ball", {"enable_wildcard": True}, {"red ball": 0.5, "blue ball": 0.5}),
        ("{a|} x", {"enable_wildcard": True}, {"a x": 0.5, " x": 0.5}),
        (
            "one\ntwo\nthree",
            {"enable_wildcard": True, "caption_prefix": "P,", "caption_suffix": "S"},
            {"P, one S": 1 / 3, "P, two S": 1 / 3, "P, three S": 1 / 3},
        ),
        ("a", {"caption_dropout_rate": 0.05}, {"a": 0.95, "": 0.05}),
        (
            "1girl, miku, a, b, c",
            {"shuffle_caption": True, "keep_tokens": 2},
            {"1girl, miku, " + ", ".join(order): 1 / 6 for order in permutations("abc")},
        ),
        (
            "x, sky;;;cloud",
            {"shuffle_caption": True, "secondary_separator": ";;;"},
            {"x, sky,cloud": 0.5, "sky,cloud, x": 0.5},
        ),
        (
            "x| sky;;;cloud",
            {"shuffle_caption": True, "secondary_separator": ";;;", "caption_separator": "|"},
            {"x, sky|cloud": 0.5, "sky|cloud, x": 0.5},
        ),
    ],
)
def test_random_steps_have_their_probabilities(
    caption: str, settings: dict[str, Any], probabilities: dict[str, float]
) -> None:
    counts = draw(caption, **settings)
    assert set(counts) == set(probabilities)
    assert all(is_near(counts[text], probability) for text, probability in probabilities.items())


def test_a_list_of_replacements_gives_each_with_equal_probability() -> None:
    counts = draw("anything", CaptionContext(1, 0, replacements={"": ["a photo of *", "a painting of *"], "*": "cat"}))
    assert set(counts) == {"a photo of cat", "a painting of cat"}
    assert is_near(counts["a photo of cat"], 0.5)


def test_random_steps_are_off_outside_training() -> None:
    subset = SubsetConfig(
        enable_wildcard=True, shuffle_caption=True, caption_dropout_rate=1.0, caption_tag_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1, token_warmup_step=100, keep_tokens_separator="|||", caption_suffix=", end",
    )
    context = CaptionContext(1, 0, is_training=False, replacements={"first": ["second", "third"]})
    result = process_caption("{first|x} ||| a,b , c\nother", subset, random.Random(0), context)
    assert result == "second, a, b, c, end"


def test_dropout_every_n_epochs_hits_only_multiples() -> None:
    subset = SubsetConfig(caption_dropout_every_n_epochs=3)
    dropped = [
        epoch for epoch in range(10) if not process_caption("a", subset, random.Random(0), CaptionContext(epoch, 0))
    ]
    assert dropped == [3, 6, 9]


def test_nothing_is_drawn_when_nothing_is_random() -> None:
    rng = random.Random(5)
    before = rng.getstate()
    process_caption("a, b", SubsetConfig(keep_tokens=1, caption_tag_dropout_rate=0.0), rng, FIRST)
    assert rng.getstate() == before


def test_literal_braces_survive_any_character_in_the_caption() -> None:
    text = "".join(map(chr, range(0xE000, 0xE010))) + "\0{{x}} {y}"
    assert expand_wildcards(text, random.Random(0)) == text[:-9] + "{x} y"


@pytest.mark.parametrize(
    ("caption", "settings", "expected"),
    [
        ("{a|b}", {}, True), ("a\nb", {}, True), ("{{a|b}}", {}, False), ("{a}", {}, False), ("plain", {}, False),
        ("plain", {"caption_prefix": "{a|b}"}, True), ("{a|b}", {"enable_wildcard": False}, False),
    ],
)
def test_choices_are_recognised(caption: str, settings: dict[str, Any], *, expected: bool) -> None:
    assert has_choices(caption, SubsetConfig(**{"enable_wildcard": True} | settings)) is expected


# --- properties -----------------------------------------------------------------------------------------------
TAG = st.text("abcäé日😀 _-|;:.0", min_size=1, max_size=6).map(str.strip).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=8)
SEEDS = st.integers(0, 2**32)
few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(text=st.text(max_size=40), seed=SEEDS)
def test_without_options_a_caption_is_its_first_line(text: str, seed: int) -> None:
    assert process_caption(text, SubsetConfig(), random.Random(seed), FIRST) == text.split("\n")[0]


@few
@given(tags=TAGS, keep=st.integers(0, 9), seed=SEEDS)
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(tags: list[str], keep: int, seed: int) -> None:
    subset = SubsetConfig(shuffle_caption=True, keep_tokens=keep)
    found = process_caption(",".join(tags), subset, random.Random(seed), FIRST).split(", ")
    assert found[:keep] == tags[:keep] and Counter(found) == Counter(tags)


@few
@given(head=TAGS, flexible=TAGS, tail=TAGS, rate=st.floats(0, 1), seed=SEEDS)
def test_tag_dropout_leaves_a_part_in_order_between_head_and_tail(
    head: list[str], flexible: list[str], tail: list[str], rate: float, seed: int
) -> None:
    subset = SubsetConfig(caption_tag_dropout_rate=max(rate, 1e-9), keep_tokens_separator="###")
    text = "###".join(",".join(part) for part in (head, flexible, tail))
    found = process_caption(text, subset, random.Random(seed), FIRST).split(", ")
    assert found[: len(head)] == head and found[len(found) - len(tail) :] == tail
    remaining = iter(flexible)
    assert all(tag in remaining for tag in found[len(head) : len(found) - len(tail)])


@few
@given(tags=TAGS, minimum=st.integers(0, 4), steps=st.integers(1, 50), step=st.integers(0, 60))
def test_warm_up_takes_ever_more_tags_from_the_front(tags: list[str], minimum: int, steps: int, step: int) -> None:
    def count(at: int) -> int:
        subset = SubsetConfig(token_warmup_step=steps, token_warmup_min=minimum)
        text = process_caption(",".join(tags), subset, random.Random(0), CaptionContext(1, at))
        found = text.split(", ") if text else []
        assert found == tags[: len(found)]
        return len(found)

    assert count(step) <= count(step + 1) <= len(tags) or minimum > len(tags)
    assert count(steps) == len(tags)


@few
@given(
    parts=st.lists(st.lists(st.text("ab c,", max_size=4), min_size=1, max_size=3), min_size=1, max_size=4), seed=SEEDS
)
def test_wildcards_give_one_of_their_options(parts: list[list[str]], seed: int) -> None:
    text = "-".join("{" + "|".join(options) + "}" for options in parts)
    found = expand_wildcards(text, random.Random(seed)).split("-")
    expected = [options if any(options) or len(options) > 1 else ["{}"] for options in parts]
    assert all(piece in options for piece, options in zip(found, expected, strict=True))
    assert expand_wildcards(text, None) == "-".join(options[0] for options in expected)


@few
@given(text=st.text("{}|ab", max_size=20), seed=SEEDS)
def test_wildcards_never_fail_and_leave_no_stand_ins(text: str, seed: int) -> None:
    found = expand_wildcards(text, random.Random(seed))
    assert set(found) <= set(text)
    assert expand_wildcards(text, random.Random(seed)) == found
    if "{" not in text:
        assert found == text.replace("}}", "}")


@few
@given(
    text=st.text("ab,{|}\n ", max_size=30), seed=SEEDS, rate=st.sampled_from([0.0, 0.5, 1.0]),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("shuffle_caption", "enable_wildcard")}),
)
def test_cached_and_validation_captions_draw_nothing(
    text: str, seed: int, rate: float, options: dict[str, bool]
) -> None:
    subset = SubsetConfig(
        caption_dropout_rate=rate, caption_tag_dropout_rate=rate, caption_prefix="{p|q}", caption_suffix="s", **options
    )
    rng = random.Random(seed)
    before = rng.getstate()
    fixed = process_caption(text, subset, rng, CaptionContext(3, 9, is_training=False))
    assert rng.getstate() == before
    assert fixed == process_caption(text, subset, random.Random(seed + 1), CaptionContext(1, 0, is_training=False))


# --- streams --------------------------------------------------------------------------------------------------


def test_streams_are_equal_in_every_process() -> None:
    code = "from library.data.captions import random_stream; print(random_stream(42, 3, 17, 'caption').random())"
    environment = {"PYTHONHASHSEED": "123", "PATH": ""}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    assert float(result.stdout) == random_stream(42, 3, 17, "caption").random()


def test_streams_differ_in_every_argument() -> None:
    arguments = [(1, 1, 1, "a"), (2, 1, 1, "a"), (1, 2, 1, "a"), (1, 1, 2, "a"), (1, 1, 1, "b"), (11, 1, 1, "a")]
    assert len({random_stream(*each).random() for each in arguments}) == len(arguments)


def test_neighbouring_streams_are_independent() -> None:
    firsts = [random_stream(7, 1, sample, "flip").random() for sample in range(DRAWS)]
    both = sum(a < 0.5 and b < 0.5 for a, b in zip(firsts[::2], firsts[1::2], strict=True))
    assert abs(both - DRAWS / 8) < 4 * math.sqrt(DRAWS / 2 * 3 / 16)


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["read_caption_file"])
def test_caption_file_case(tmp_path: Path, case: dict[str, Any]) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(case["file_text"].encode())
    if "expected_error" in case:
        with pytest.raises(ValueError, match=case["expected_error"]) as caught:
            read_caption_file(str(path), enable_wildcard=case["enable_wildcard"])
        assert str(path) in str(caught.value)
    else:
        assert read_caption_file(str(path), enable_wildcard=case["enable_wildcard"]) == case["expected"]


def test_byte_order_mark_is_stripped(tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nsecond")
    assert read_caption_file(str(path), enable_wildcard=False) == "café"


def test_wrong_encoding_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="image.txt: the caption file is not UTF-8"):
        read_caption_file(str(path), enable_wildcard=False)


def test_face_crop_names_share_the_caption_of_their_picture(tmp_path: Path) -> None:
    folder = tmp_path / "a_b_c_d_e"
    folder.mkdir()
    (folder / "photo.txt").write_text("x", encoding="utf-8")
    (tmp_path / "a.txt").write_text("outside", encoding="utf-8")
    assert find_caption_file(str(folder / "photo_1_2_3_4.png"), ".txt") == str(folder / "photo.txt")
    assert find_caption_file(str(folder / "other.png"), ".txt") is None
    (folder / "photo_1_2_3_4.txt").write_text("own", encoding="utf-8")
    assert find_caption_file(str(folder / "photo_1_2_3_4.png"), ".txt") == str(folder / "photo_1_2_3_4.txt")


def test_missing_captions_become_class_tokens_or_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(7)]
    captions, bad = read_captions(SubsetConfig(class_tokens="sks dog"), paths)
    assert (set(captions.values()), bad) == ({"sks dog"}, {})
    assert not caplog.messages
    (tmp_path / "0.txt").write_text("x", encoding="utf-8")
    captions, bad = read_captions(SubsetConfig(), paths)
    assert set(captions.values()) == {""}
    assert "7 of 7 images have no .caption file" in caplog.messages[0]
    assert paths[4] in caplog.messages[0]
    assert paths[5] not in caplog.messages[0]
    assert 'caption_extension = ".txt"' in caplog.messages[1]


@pytest.mark.parametrize("case", CASES["metadata_merge"])
def test_metadata_merge_case(case: dict[str, Any]) -> None:
    subset = SubsetConfig(caption_separator=case["caption_separator"], enable_wildcard=case["enable_wildcard"])
    assert merge_caption(MetadataEntry("k", case["caption"], case["tags"]), subset) == case["expected"]
