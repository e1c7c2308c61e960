"""The generation prompt language as a whole: all recorded cases, groups, BREAK, and ten thousand odd lines."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from library.generation import dynamic
from library.generation.dynamic import parse_groups
from library.generation.plan import (
    InitImage,
    Planner,
    SeedSource,
)
from library.generation.request import (
    GENERATION,
    NOT_YET_INLINE,
    TRAINING_SAMPLES,
    ImageRequest,
    PromptSyntaxError,
    parse_prompt_line,
)
from library.text import clip
from tests.prompt_plans import DEFAULTS, images, prompts, refusal, warnings_of

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "prompt_syntax.json").read_text(encoding="utf-8"))
COUNTS = {
    "weights": 39, "weights_wanted_differences": 3, "options": 31, "options_wanted_differences": 3,
    "training_sample_options": 4, "training_sample_options_wanted_differences": 1, "dynamic_enumerate": 13,
    "dynamic_enumerate_wanted_differences": 3, "dynamic_random": 15, "dynamic_mixed": 2, "dynamic_other": 7,
}  # fmt: skip


def cases(*sections: str) -> pytest.MarkDecorator:
    found = [case for section in sections for case in CASES[section]]
    return pytest.mark.parametrize("case", found, ids=[case["id"] for case in found])


# --- the recorded cases ---------------------------------------------------------------------------------------


def test_there_are_121_cases_and_no_section_without_a_test() -> None:
    """Training lines are tested in test_prompt_lines.py, weights and options there and in test_text.py too."""
    assert {name: len(section) for name, section in CASES.items() if isinstance(section, list)} == COUNTS
    assert sum(COUNTS.values()) == 121


@cases("weights", "weights_wanted_differences")
def test_weighted_prompts_pass_the_plan_or_are_refused(case: dict) -> None:
    if "expected_error" in case:
        assert case["input"][3:-1] in refusal(case["input"])
        assert "'--n'" in refusal(f"x --n {case['input']}")
        return
    (image,) = images(case["input"])
    assert image.prompt == case["input"].strip()
    assert images(f"x --n {case['input']}")[0].negative_prompt == case["input"]


FIELDS = {"network_muls": "network_multipliers", "filename": "output_name", "seeds": "seed"}
SIZE_FIELDS = {
    "original_size_hw": ("original_height", "original_width"),
    "negative_original_size_hw": ("original_height_negative", "original_width_negative"),
    "crop_top_left": ("crop_top", "crop_left"),
}


@cases("options", "options_wanted_differences")
def test_options_reach_the_image(case: dict) -> None:
    options = dict(case.get("options", {}))
    count = case.get("n_networks", 0)
    template = ImageRequest("", network_multipliers=(1.0,) * count or None, negative_scale=9.0, steps=9)
    changes = {"template": template}
    if "strength" in options:
        changes["init_images"] = (InitImage(Path("i.png"), 512, 512),)
    if "expected_error" in case or NOT_YET_INLINE.keys() & options.keys():
        assert case["line"][1:6].strip() in refusal(case["line"], **changes)
        return
    expected = {
        name: tuple(options.pop(key) for key in keys)
        for name, keys in SIZE_FIELDS.items()
        if options.keys() >= set(keys)
    }
    expected |= {FIELDS.get(key, key): value for key, value in options.items()}
    if "seed" in expected:
        expected["seed"] = expected["seed"][0]
    if "network_multipliers" in expected:
        expected["network_multipliers"] = tuple(expected["network_multipliers"][:count])
    (image,) = images(case["line"], **changes)
    unset = replace(template, prompt=case["prompt"], raw_prompt=image.raw_prompt, seed=image.seed)
    assert replace(image, init_image=None) == replace(unset, **expected)


@cases("dynamic_enumerate", "dynamic_enumerate_wanted_differences")
def test_enumerated_groups_make_the_recorded_prompts(case: dict) -> None:
    found = prompts(case["input"], images_per_prompt=case.get("images_per_prompt", 2))
    assert found in (case["expected"], case.get("accept_also"))
    assert parse_groups(case["input"]).count == len(found)


@cases("dynamic_random")
def test_random_groups_draw_all_admissible_prompts_and_no_others(case: dict) -> None:
    assert len(prompts(case["input"], images_per_prompt=case["images_per_prompt"])) == case["count"]
    found = prompts(case["input"], images_per_prompt=300)
    assert sorted(set(found)) == sorted(case["admissible"])


@cases("dynamic_mixed")
def test_random_groups_are_drawn_for_each_enumerated_prompt(case: dict) -> None:
    drawn = [prompts(case["input"], seed) for seed in range(60)]
    assert {len(found) for found in drawn} == {case["count"]}
    for position, admissible in enumerate(case["admissible_per_position"]):
        assert {found[position] for found in drawn} == set(admissible)
    assert len({tuple(found) for found in drawn}) == 4  # the draws do not depend on each other


@cases("dynamic_other")
def test_other_braces(case: dict) -> None:
    if "expected_error" in case:
        assert case["input"] in refusal(case["input"])
    else:
        assert prompts(case["input"]) == case["expected"]


# --- BREAK and chunks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> clip.ClipTokenizer:
    return clip.load_tokenizer(clip.CLIP_L, cache_dir=DATA / "golden" / "tokenizers")


def windows(tokenizer: clip.ClipTokenizer, prompt: str, max_chunks: int = 9) -> list[str]:
    """For each window of 77 positions: what stands there, w = text, . = start, end or padding."""
    style = clip.PromptStyle(max_chunks=max_chunks, with_breaks=True)
    ids, weights = clip.tokenize_prompts(tokenizer, [prompt], style)
    assert ids.shape == weights.shape
    special = {tokenizer.special.start, tokenizer.special.end, tokenizer.special.pad}
    return ["".join("." if token in special else "w" for token in row).rstrip(".") for row in ids[0].tolist()]


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("a BREAK a", [1, 1]),
        ("a BREAK a BREAK a a BREAK a", [1, 1, 2, 1]),
        ("a " * 75 + "BREAK a", [75, 1]),
        ("a " * 80 + "BREAK " + "a " * 76 + "BREAK a", [75, 5, 75, 1, 1]),
        ("BREAK a", [1]),
        ("a BREAK", [1]),
        ("a BREAK BREAK a", [1, 1]),
        ("(a BREAK a:1.3)", [1, 1]),
        ("a " * 76, [75, 1]),
        ("", [0]),
    ],
)
def test_break_starts_a_new_window(tokenizer: clip.ClipTokenizer, prompt: str, lengths: list[int]) -> None:
    assert windows(tokenizer, prompt) == ["." * (length > 0) + "w" * length for length in lengths]


def test_words_that_contain_break_and_small_letters_do_not_break(tokenizer: clip.ClipTokenizer) -> None:
    assert [len(windows(tokenizer, prompt)) for prompt in ("a BREAKFAST a", "a break a", "a xBREAK a")] == [1, 1, 1]


def test_padding_before_a_break_weighs_one(tokenizer: clip.ClipTokenizer) -> None:
    _, weights = clip.tokenize_prompts(tokenizer, ["(a BREAK a:1.5)"], clip.PromptStyle(with_breaks=True))
    assert weights.shape == (1, 2, 77)
    assert weights[0, :, 1].tolist() == [1.5, 1.5]
    assert int((weights != 1).sum()) == 2


def test_prompts_cut_for_length_name_the_option(
    tokenizer: clip.ClipTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert windows(tokenizer, "a BREAK a BREAK a", max_chunks=3) == [".w"] * 3
    assert not caplog.records
    assert windows(tokenizer, "a BREAK a BREAK a", max_chunks=1) == [".w"]
    assert "--max_embeddings_multiples 3" in caplog.text


# --- groups beyond the recorded cases -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{2$$$$a|a}", ["aa"]),
        ("{0$$a|b}|x", ["|x"]),
        ("{e$$1$$a|b}}", ["a}", "b}"]),
        ("{e$$2$$ \\} $$a|b|c}", ["a } b", "a } c", "b } c"]),
        ("{e$$\\{a|b\\}}", ["{a", "b}"]),
        ("｛a|b｝ {x}", ["｛a|b｝ x"]),
        ("a\\(b\\\\c", ["a\\(b\\\\c"]),
        ("{{x} {y}}", ["x y"]),
        ("{a|{}", ["{a|{}"]),
        ("{e$${e$$a|b}|{e$$c|d}}", ["a", "b", "c", "d"]),
        ("{e$$2$${e$$a|b}|{e$$c|d}}", ["a, c", "a, d", "b, c", "b, d"]),
        ("{x|{e$$x|x}}", ["x", "x"]),
        ("{a\nb}", ["{a\nb}"]),
        ("__name__", ["__name__"]),
        ("{e$$}", [""]),
    ],
)
def test_groups(line: str, expected: list[str]) -> None:
    assert prompts(line) == expected


def test_enumeration_comes_before_chance() -> None:
    drawn = {tuple(prompts("{x|{e$$a|b}}", seed)) for seed in range(40)}
    assert drawn == set(itertools.product("xa", "xb"))


def test_item_counts_are_drawn_evenly() -> None:
    counts = Counter(len(prompt) for prompt in prompts("{0-2$$$$a|b|c|d}", images_per_prompt=3000))
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 900


@pytest.mark.parametrize(
    "line",
    [
        "{e$$" + "|".join("abcdefghij") + "} " * 1 + "{e$$0|1|2|3|4|5|6|7|8|9}" * 4,
        "{e$$0-99$$" + "a|" * 99 + "a}",
        "{e$$" + "a|" * 10_000 + "a}",
        "{e$$1-3$$" + "|".join("{e$$1|2|3|4|5|6|7|8|9}" for _ in range(12)) + "}",
        "{e$$4999-5000$$" + "{e$$a|b}|" * 4999 + "a}",
        "".join("{x|{e$$a|b}}" for _ in range(400)),
    ],
)
def test_more_than_ten_thousand_prompts_are_refused_at_once(line: str) -> None:
    begin = time.thread_time()
    assert "more than 10000 prompts" in refusal(line)
    assert time.thread_time() - begin < 1


def test_exactly_ten_thousand_prompts_are_allowed() -> None:
    line = parse_groups("{e$$0|1|2|3|4|5|6|7|8|9}" * 4)
    assert line.count == dynamic.MAX_PROMPTS
    assert list(line.expand(random.Random(0))) == [f"{number:04d}" for number in range(10_000)]


def test_counts_agree_with_the_prompts_made() -> None:
    generator = random.Random(5)

    def text(depth: int) -> str:
        if depth == 0 or generator.random() < 0.3:
            return generator.choice(["a", "b ", "", "c"])
        variants = "|".join(text(depth - 1) for _ in range(generator.randint(1, 3)))
        prefix = generator.choice(["", "e$$", "e$$0-2$$", "2$$", "e$$2$$ and $$"])
        return generator.choice(["", "x"]) + "{" + prefix + variants + "}" + generator.choice(["", text(depth - 1)])

    many = 0
    for _ in range(300):
        line = parse_groups(text(3))
        found = list(line.expand(generator))
        assert len(found) == line.count
        many += line.count > 1
    assert many > 100


@pytest.mark.parametrize("group", ["{1-$$a|b}", "{-2$$a|b}", "{e$$-$$a}"])
def test_a_range_without_a_number_names_its_group(group: str) -> None:
    assert group in refusal(f"x {{a|b}} {group} y")


def test_groups_that_are_nested_too_deeply_are_refused() -> None:
    assert prompts("{" * 20 + "a" + "}" * 20) == ["a"]
    assert "more than 20" in refusal("{" * 2000 + "a" + "}" * 2000)
    assert prompts("{" * 2000 + "a") == ["{" * 2000 + "a"]


def test_two_dashes_in_a_range_warn() -> None:
    (warning,) = warnings_of("{1-2-3$$a|b}")
    assert "{1-2-3$$a|b}" in warning


def test_huge_counts_are_clamped() -> None:
    assert prompts("{e$$" + "9" * 5000 + "$$a|b}") == ["a, b"]
    assert prompts("{e$$000001$$a|b}") == ["a", "b"]


# --- odd input ------------------------------------------------------------------------------------------------

PIECES = [
    "a cat", " ", "{", "}", "|", "$$", "e$$", "2$$", "1-$$", "1-3$$", "\\", "\\{", "\\}", "(", ")", "[", "]", ":1.2)",
    ":1.2.3)", ":.)", " AND ", " BREAK ", "\n", "\t", "\0", "，", "ｗ", "\udcff", "\U0001f600", "e\u0301", "--", " --",
    "-", ",", ".", "9" * 30, "٣", "²", "__w__", "{a|b}", "{e$$a|b|c}", "{e$$0-2$$ $$x|y}", "../", "C:", "/", "%s", "%",
]  # fmt: skip
VALUES = [
    "64", "512", "0", "7.5", "-1", "1.2.3", "1,2", "1,", "1+2", "none", "x", "", " 5", "9" * 25, "../x", "{1|2}", "٣",
]  # fmt: skip


def odd_line(generator: random.Random) -> str:
    kind = generator.randrange(4)
    if kind == 0:
        raw = bytes(generator.randrange(256) for _ in range(generator.randrange(200)))
        return raw.decode(generator.choice(["latin-1", "utf-8"]), errors="surrogateescape")
    if kind == 1:
        return "".join(chr(generator.randrange(0x11_0000)) for _ in range(generator.randrange(60)))
    if kind == 2:
        return "".join(generator.choices(PIECES, k=generator.randrange(60)))
    options = [
        f" --{generator.choice([*GENERATION.options, *TRAINING_SAMPLES.options, 'zz', 'W', 'D'])} "
        + generator.choice([generator.choice(VALUES), "".join(generator.choices(PIECES, k=4))])
        for _ in range(generator.randrange(7))
    ]
    return "".join(generator.choices(PIECES[:6] + PIECES[-12:], k=generator.randrange(8))) + "".join(options)


@pytest.mark.slow
def test_ten_thousand_odd_lines_are_parsed_or_refused(tmp_path: Path) -> None:
    generator = random.Random(20_260_101)
    template = ImageRequest("", network_multipliers=(1.0,))
    count: Counter[str] = Counter()
    slowest, total_images = 0.0, 0
    for number in range(10_000):
        line = odd_line(generator)
        defaults = replace(DEFAULTS, template=template, outdir=tmp_path, images_per_prompt=1 + number % 3)
        planner = Planner(defaults, SeedSource(number), warn=lambda warning: count.update(["warnings"]))
        begin = time.thread_time()
        try:
            found = planner.requests(line)
        except PromptSyntaxError as error:
            assert str(error)
            count["refused"] += 1
            found = []
        else:
            count["parsed"] += 1
            total_images += len(found)
        slowest = max(slowest, (time.thread_time() - begin) / max(1, len(found) / 50))
        for image in found:
            assert 0 <= image.seed < 2**64 and image.width % 8 == image.height % 8 == 0
        assert parse_prompt_line(line, TRAINING_SAMPLES).prompt is not None
    print(dict(count), f"{total_images} images, slowest line {1000 * slowest:.1f} ms (per 50 images)")
    assert count["parsed"] > 3000 and count["refused"] > 1000
    assert slowest < 0.05


@pytest.mark.parametrize(
    "line",
    [
        "{" * 100_000, "}" * 100_000, "{" + "a|" * 50_000 + "}", "(a" * 3000, "a --w 64" * 5000, "a --d 1" * 5000,
        "{a|b}" * 5000,
    ],
    ids=lambda line: line[:6],
)  # fmt: skip
def test_long_odd_lines_take_no_long_time(line: str) -> None:
    begin = time.thread_time()
    assert len(images(line)) == 1
    assert time.thread_time() - begin < 2
