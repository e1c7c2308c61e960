"""Prompt lines of both dialects and prompt files, against the recorded cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.generation.prompt_file import read_prompt_file
from library.generation.request import (
    GENERATION,
    TRAINING_SAMPLES,
    Dialect,
    ImageRequest,
    PromptSyntaxError,
    batches,
    padded_multipliers,
    parse_prompt_line,
)
from library.sampling_spec import SamplingDefaults

CASES = json.loads((Path(__file__).parent / "data" / "prompt_syntax.json").read_text(encoding="utf-8"))
IGNORED_PARTLY = {
    "unknown_ignored", "double_space_value", "dash_in_text", "value_trailing", "negative_number", "empty_negative",
    "s4",
}  # fmt: skip


def ids(cases: list[dict]) -> list[str]:
    return [case["id"] for case in cases]


@pytest.mark.parametrize("case", CASES["options"], ids=ids(CASES["options"]))
def test_generation_lines_set_the_recorded_options(case: dict) -> None:
    line = parse_prompt_line(case["line"], GENERATION)
    options = dict(line.options)
    if "n_networks" in case:
        options["network_muls"] = padded_multipliers(options["network_muls"], case["n_networks"])
    assert line.prompt == case["prompt"]
    assert options == case["options"]
    assert bool(line.warnings) == (case["id"] in IGNORED_PARTLY), line.warnings


@pytest.mark.parametrize("case", CASES["options_wanted_differences"], ids=ids(CASES["options_wanted_differences"]))
def test_unreadable_values_warn_or_name_the_option(case: dict) -> None:
    if "expected_error" in case:
        with pytest.raises(PromptSyntaxError, match="--d"):
            parse_prompt_line(case["line"], GENERATION)
        return
    line = parse_prompt_line(case["line"], GENERATION)
    assert (line.prompt, line.options) == (case["prompt"], case["options"])
    assert len(line.warnings) == 1 and case["line"].split("--")[1].split()[0] in line.warnings[0]


TRAINING_CASES = CASES["training_sample_options"] + CASES["training_sample_options_wanted_differences"]


@pytest.mark.parametrize("case", TRAINING_CASES, ids=ids(TRAINING_CASES))
def test_training_sample_lines_set_the_recorded_options(case: dict) -> None:
    line = parse_prompt_line(case["line"], TRAINING_SAMPLES)
    expected = dict(case["expected"])
    if "flow_shift" in expected:
        expected["flow_shift"] = float(expected["flow_shift"])
    assert {"prompt": line.prompt, **line.options} == expected
    assert bool(line.warnings) == (case["id"] in IGNORED_PARTLY)


def test_unknown_option_names_are_listed_in_the_warning() -> None:
    (warning,) = parse_prompt_line("a --zz 5", TRAINING_SAMPLES).warnings
    assert "--zz" in warning and "--w" in warning


@pytest.mark.parametrize("blank", ["\t", "\u3000", "\xa0"])
@pytest.mark.parametrize("dialect", [GENERATION, TRAINING_SAMPLES])
def test_white_space_beside_an_option_is_read_as_a_blank_and_told(blank: str, dialect: Dialect) -> None:
    line = parse_prompt_line(f"a{blank}b{blank}--w{blank}64{blank}--h 32 --n x{blank}y", dialect)
    assert line.prompt == f"a{blank}b"
    assert line.options == {"width": 64, "height": 32, "negative_prompt": f"x{blank}y"}
    assert len(line.warnings) == 2 and "'--w'" in line.warnings[0] and "'--h'" in line.warnings[1]


# --- prompt files ---------------------------------------------------------------------------------------------


def requests(path: Path, **defaults: object) -> list[ImageRequest]:
    return [e.request(SamplingDefaults(**defaults), "euler")[0] for e in read_prompt_file(path)]


def test_text_file_skips_blank_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    text = "# comment\n\n a cat --w 100 --h 30 --d 3\n   \nein Häuschen --s 0 --l 1.5 --ss ddim\n"
    path.write_text(text, encoding="utf-8")
    first, second = requests(path)
    assert (first.prompt, first.width, first.height, first.seed, first.sampler) == ("a cat", 96, 64, 3, "euler")
    assert (second.prompt, second.steps, second.scale, second.sampler) == ("ein Häuschen", 1, 1.5, "ddim")
    assert [e.index for e in read_prompt_file(path)] == [0, 1]


def test_defaults_come_from_the_model(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a --w 100\n", encoding="utf-8")
    (request,) = requests(path, size_multiple=16, steps=20, scale=1.0, guidance_scale=3.5)
    assert (request.width, request.height, request.steps) == (96, 512, 20)
    assert (request.scale, request.guidance_scale) == (1.0, 3.5)


def test_toml_subsets_win_over_common_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(
        '[prompt]\nwidth = 768\nseed = 1\n[[prompt.subset]]\nprompt = "a lighthouse"\nseed = 7\n'
        '[[prompt.subset]]\nprompt = "a harbour"\nnegative_prompt = "people"\nscale = 5\n',
        encoding="utf-8",
    )
    first, second = requests(path)
    assert (first.prompt, first.width, first.seed, first.negative_prompt) == ("a lighthouse", 768, 7, "")
    assert (second.prompt, second.width, second.seed, second.negative_prompt) == ("a harbour", 768, 1, "people")


def test_json_entries_are_tables_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    content = [{"prompt": "a", "sample_steps": 5000, "flow_shift": "2.5", "controlnet_image": "x.png"}, "b --n c"]
    path.write_text(json.dumps(content), encoding="utf-8")
    first, second = requests(path)
    assert (first.steps, first.flow_shift, first.controlnet_image) == (1000, 2.5, Path("x.png"))
    assert (second.prompt, second.negative_prompt) == ("b", "c")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a", "must end in"),
        ("p.json", "{", "cannot be read"),
        ("p.json", '{"prompt": "a"}', "a list"),
        ("p.toml", "[prompt]\nwidth = 3\n", "at least one"),
        ("p.toml", "= 3", "cannot be read"),
    ],
)
def test_unreadable_files_are_errors_that_name_the_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_prompt_file(path)
    assert name in str(caught.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompt_file(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"width": 512}, "no 'prompt'"),
        ({"prompt": "a", "width": "512"}, "'width'"),
        ({"prompt": "a", "seed": True}, "'seed'"),
        ({"prompt": "a", "scale": -1}, "at least 0"),
        ({"prompt": "a", "flow_shift": "x"}, "'flow_shift'"),
        (3, "line of text or a table"),
    ],
)
def test_bad_entries_name_file_and_place(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["fine", entry]), encoding="utf-8")
    good, bad = read_prompt_file(path)
    assert good.request(SamplingDefaults(), "ddim")[0].prompt == "fine"
    with pytest.raises(ValueError, match=message) as caught:
        bad.request(SamplingDefaults(), "ddim")
    assert "prompts.json, entry 1" in str(caught.value)


def test_keys_of_other_models_warn(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a", "cfg_trunc_ratio": 0.2, "colour": 1}]), encoding="utf-8")
    _, warnings = read_prompt_file(path)[0].request(SamplingDefaults(), "ddim")
    assert "cfg_trunc_ratio" in warnings[0] and "unknown key 'colour'" in warnings[1]


def test_batches_hold_equal_neighbours() -> None:
    wide, plain = ImageRequest("w", width=768), ImageRequest("p")
    grouped = list(batches([plain, ImageRequest("q", seed=3), plain, wide, plain], 2))
    assert [[r.prompt for r in batch] for batch in grouped] == [["p", "q"], ["p"], ["w"], ["p"]]
