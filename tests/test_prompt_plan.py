"""Plans of images: seeds, iterations, what a line may say, and file names that stay below the output folder."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from library.generation.plan import (
    InitImage,
    SeedSource,
    check_lines,
    plan,
    read_prompt_lines,
    safe_output_path,
)
from library.generation.request import (
    GENERATION,
    NOT_YET_INLINE,
    SIZE_CONDITIONING,
    ImageRequest,
    PromptSyntaxError,
    batches,
    cut_seeds,
)
from tests.prompt_plans import DEFAULTS, images, prompts, refusal, warnings_of

# --- seeds ----------------------------------------------------------------------------------------------------


def seeds_of(line: str | list[str], seed: int | None = 1, **changes: object) -> list[int]:
    return [image.seed for image in images(line, seed, **changes)]


def test_the_seed_option_is_the_seed_of_a_single_image() -> None:
    assert seeds_of("a", 42) == [42]
    assert seeds_of("{a|b}", 42) == [42]
    assert seeds_of("{e$$a}", 42) == [42]


def test_the_seed_option_seeds_a_list_for_more_than_one_image() -> None:
    for found in (
        seeds_of(["a", "b"], 42), seeds_of("a", 42, images_per_prompt=2), seeds_of("a", 42, n_iter=2),
    ):  # fmt: skip
        assert len(set(found)) == 2 and 42 not in found
        assert all(0 <= seed < 2**32 for seed in found)
    assert seeds_of(["a", "b"], 42) == seeds_of("a", 42, images_per_prompt=2)
    assert seeds_of(["a", "b"], 42) != seeds_of(["a", "b"], 43)


def test_lines_of_unknown_number_get_drawn_seeds() -> None:
    (image,) = plan((line for line in ["a"]), DEFAULTS, SeedSource(42))
    assert image.seed == seeds_of(["a", "b"], 42)[0]


def test_without_a_seed_the_system_draws() -> None:
    assert len({seeds_of("a", None)[0] for _ in range(5)}) == 5


def test_drawn_seeds_use_the_whole_range() -> None:
    found = seeds_of("a", 3, images_per_prompt=200)
    assert min(found) < 2**28 and max(found) > 2**32 - 2**28


def test_a_lines_own_seeds_are_used_in_order_and_the_last_one_stays(caplog: pytest.LogCaptureFixture) -> None:
    assert seeds_of("a --d 7,8", images_per_prompt=2, n_iter=2) == [7, 8, 7, 8]
    assert not caplog.records
    assert seeds_of("a --d 7,8", images_per_prompt=4, n_iter=2) == [7, 8, 8, 8] * 2
    (record,) = caplog.records
    assert "'--d' gives 2 seed(s) for 4 images" in record.message
    assert seeds_of("a --d 7,8,9", images_per_prompt=2) == [7, 8]


def test_random_groups_fill_up_their_seeds() -> None:
    found = seeds_of("{a|b} --d 7", images_per_prompt=3)
    assert found[0] == 7 and len(set(found)) == 3


def test_a_saved_seed_gives_the_variant_again() -> None:
    line = "{2$$a|b|c|d} {e|{f|g}}"
    for image in images(line, images_per_prompt=20):
        assert prompts(f"{line} --d {image.seed}") == [image.raw_prompt]


def test_enumerated_images_share_one_seed() -> None:
    assert seeds_of("{e$$a|b|c} --d 7") == [7, 7, 7]
    assert len(set(seeds_of("{x|{e$$a|b}}{e$$c|d}", images_per_prompt=3))) == 1
    assert len(seeds_of("{e$$a|b|c}", images_per_prompt=5)) == 3
    assert "first seed" in warnings_of("{e$$a|b} --d 7,8")[0]


def test_one_seed_per_iteration() -> None:
    found = seeds_of(["a", "b --d 5", "c"], 42, iter_same_seed=True, n_iter=2)
    assert found[0] == found[2] != found[3] == found[5] and found[1] == found[4] == 5
    assert found == seeds_of(["a", "b --d 5", "c"], 42, iter_same_seed=True, n_iter=2)
    (warning,) = warnings_of("a", iter_same_seed=True, images_per_prompt=2)
    assert "equal" in warning


def test_lines_are_checked_one_by_one_before_anything_is_drawn(caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a --w ten", "b --zz 4", "c\t--d 7", "d --d 123456789012345678901", "(e:1.2.3)", "f --w ten", "g"]
    places = [f"p.txt, line {number}" for number in range(3, 10)]
    report = check_lines(lines, DEFAULTS, places)
    assert [text.split(":")[0] for text in report.problems] == ["p.txt, line 6", "p.txt, line 7"]
    assert [text.split(":")[0] for text in report.warnings] == [f"p.txt, line {n}" for n in (3, 4, 5, 8)]
    drawn = list(plan(lines, replace(DEFAULTS, n_iter=2), SeedSource(1), places=places, told=report.told))
    assert [image.prompt for image in drawn] == ["a", "b", "c", "f", "g"] * 2
    assert drawn[2].seed == 7
    assert caplog.records == []  # nothing is told twice


@pytest.mark.parametrize(
    ("line", "rest", "found"),
    [
        ("a --d 5 --w 64", "a --w 64", [5]),
        (" a --W 64 --D 1,2 ", "a --W 64", [1, 2]),
        ("{a --d 5|b} c", "{a|b} c", [5]),
        ("a --d 5 {b|c}", "a {b|c}", [5]),
        ("a --d 5 --d 6", "a --d 6", [5]),
        ("--d 5", "--d 5", None),
        ("a --d", "a --d", None),
        ("a --d x", "a --d x", None),
        ("a --dsd1 5", "a --dsd1 5", None),
    ],
)
def test_the_first_seed_list_is_cut_out(line: str, rest: str, found: list[int] | None) -> None:
    assert cut_seeds(line)[:2] == (rest, found)


@pytest.mark.parametrize("seeds", ["1,", "1+2", ",", "+", "9" * 20, "9" * 6000])
def test_unreadable_seeds_name_the_option(seeds: str) -> None:
    assert "'--d" in refusal(f"a --d {seeds}")


def test_seeds_that_come_too_late_or_are_trailed_by_text_warn() -> None:
    assert "ignored" in warnings_of("a --d 1 --d 2")[0]
    assert "ignored" in warnings_of("a --d {1|2}")[0]
    assert "'px'" in warnings_of("a --d 1px")[0]
    assert seeds_of(f"a --d {2**64 - 1}") == [2**64 - 1]


# --- plans ----------------------------------------------------------------------------------------------------


def test_iterations_repeat_the_list_and_may_shuffle_it() -> None:
    lines = [str(number) for number in range(8)]
    assert prompts(lines, n_iter=2) == lines * 2
    shuffled = prompts(lines, n_iter=2, shuffle_prompts=True)
    assert sorted(shuffled[:8]) == sorted(shuffled[8:]) == lines
    assert shuffled[:8] != lines and shuffled[:8] != shuffled[8:]
    assert shuffled == prompts(lines, n_iter=2, shuffle_prompts=True)


def test_values_of_the_command_line_hold_for_each_line_anew() -> None:
    template = ImageRequest("", negative_prompt="bad", width=640, scale=5.0, sampler="euler_a", steps=11)
    first, second = images(["a --w 512 --n dog --s 3", "b"], template=template)
    assert (first.width, first.negative_prompt, first.steps, first.scale) == (512, "dog", 3, 5.0)
    assert second == replace(template, prompt="b", raw_prompt="b", seed=second.seed)


def test_bad_lines_are_skipped_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a", "b --d 1,", "c --dsd1 3", "d"]
    assert prompts(lines) == ["a", "d"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "prompt 2" in caplog.records[0].message and "'--d 1,'" in caplog.records[0].message
    assert [problem.split(":")[0] for problem in check_lines(lines, DEFAULTS).problems] == ["prompt 2", "prompt 3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w 100", "multiples of 8"),
        ("a --h 99999999", "--h 99999999"),
        ("a --w 0", "--w 0"),
        ("a --t 1.5", "--t 1.5"),
        ("a --l " + "9" * 400, "--l inf"),
        ("a --am " + "9" * 400, "finite"),
        ("a --ow 99999999999999999999", "--ow"),
        ("a (b:" + "9" * 400 + ")", "is not a weight"),
        ("a --dst1 700", "'--dst1': Deep Shrink is not supported yet"),
        ("a --glus 3,0.5,0.5", "'--glus': Gradual Latent is not supported yet"),
        ("a AND b", "AND needs a region mask"),
        ("a \udcff", "not UTF-8"),
        ("a --n \udcff", "not UTF-8"),
    ],
)
def test_lines_that_cannot_be_drawn_are_refused(line: str, message: str) -> None:
    assert message in refusal(line)


@pytest.mark.parametrize("name", [name for name, option in GENERATION.options.items() if option.key in NOT_YET_INLINE])
def test_options_of_missing_features_are_refused(name: str) -> None:
    assert f"'--{name}'" in refusal(f"a --{name} 1")


def test_regions_need_networks_and_a_mask_and_are_not_supported_yet() -> None:
    template = ImageRequest("", network_multipliers=(1.0,))
    masks = (Path("mask.png"),)
    assert "AND needs" in refusal("a AND b", template=template)
    assert "AND needs" in refusal("a AND b", mask_images=masks)
    assert "not supported yet" in refusal("a AND b", template=template, mask_images=masks)
    assert ImageRequest("a AND b AND c").sub_prompts == ("a", "b", "c")
    assert ImageRequest("a ANDb").sub_prompts == ("a ANDb",)
    assert images("a --n c AND d")[0].negative_prompt == "c AND d"


@pytest.mark.parametrize(
    ("line", "word", "changes"),
    [
        ("a --t 0.5", "--image_path", {}),
        ("a --am 0.5", "no network", {}),
        ("a --ow 512", "no effect on this model", {"without_effect": frozenset(SIZE_CONDITIONING)}),
        ("a --w 64", "size", {"init_images": (InitImage(Path("i.png"), 64, 64),)}),
        ("a --am 1,2,3", "3 multipliers", {"template": ImageRequest("", network_multipliers=(1.0, 1.0))}),
        ("a --nl 2 --l 1", "guidance is off", {}),
        ("a --zz 1", "--zz", {}),
    ],
)
def test_options_without_effect_warn_once(line: str, word: str, changes: dict) -> None:
    (warning,) = warnings_of(line, images_per_prompt=3, **changes)
    assert word in warning


def test_size_conditioning_given_in_part_is_completed() -> None:
    (image,) = images("a --ow 2048 --nh 100 --cl 5 --h 256")
    assert image.original_size_hw == (256, 2048)
    assert image.negative_original_size_hw == (100, 2048)
    assert image.crop_top_left == (0, 5)
    (plain,) = images("a")
    assert plain.original_size_hw is None and plain.negative_original_size_hw is None
    template = ImageRequest("", original_size_hw=(7, 8), negative_original_size_hw=(3, 4), crop_top_left=(1, 2))
    (image,) = images("a --oh 9 --nw 5", template=template)
    assert (image.original_size_hw, image.negative_original_size_hw) == ((9, 8), (3, 5))
    assert image.crop_top_left == (1, 2)


def test_init_images_and_masks_are_taken_in_turn_in_every_iteration() -> None:
    start = (InitImage(Path("a.png"), 64, 128), InitImage(Path("b.png"), 32, 32))
    masks = (Path("1.png"), Path("2.png"), Path("3.png"))
    found = images(["x", "y --t 0.3", "z"], n_iter=2, init_images=start, mask_images=masks)
    assert [(i.init_image.stem, i.mask_image.stem) for i in found] == [("a", "1"), ("b", "2"), ("a", "3")] * 2
    assert [(i.width, i.height) for i in found[:2]] == [(64, 128), (32, 32)]
    assert [i.strength for i in found[:3]] == [0.8, 0.3, 0.8]
    assert images("x")[0].strength is None


def test_network_multipliers_come_from_the_line_or_the_template() -> None:
    template = ImageRequest("", network_multipliers=(0.5, 0.6, 0.7))
    found = images(["a", "b --am 1", "c --am -1,0.25", "d --am 1,2,3,4"], template=template)
    assert [i.network_multipliers for i in found] == [(0.5, 0.6, 0.7), (1, 1, 1), (-1, 0.25, 0.25), (1, 2, 3)]


def test_clip_prompts_are_only_recorded() -> None:
    (image,) = images("a --c a photo, b")
    assert (image.prompt, image.clip_prompt, image.raw_prompt) == ("a", "a photo, b", "a --c a photo, b")


def test_raw_prompt_is_the_expanded_line_without_seeds() -> None:
    assert prompts("{e$$a|b} --d 5 --n {x} \\{y\\}") == ["a --n x {y}", "b --n x {y}"]


def test_a_batch_holds_images_that_can_be_drawn_together() -> None:
    template = ImageRequest("", network_multipliers=(1.0,))
    lines = ["a --n 1", "b --n 2", "c --am 2", "d --s 3", "e --s 3 --d 9", "f --l 2 --s 3", "g --w 64"]
    found = list(batches(plan(lines, replace(DEFAULTS, template=template), SeedSource(1)), 3))
    assert [[image.prompt for image in batch] for batch in found] == [["a", "b"], ["c"], ["d", "e"], ["f"], ["g"]]
    start = tuple(InitImage(Path(f"{n}.png"), 64, 64) for n in range(2))
    found = list(batches(plan(["a", "b", "c --t 0.2"], replace(DEFAULTS, init_images=start), SeedSource(1)), 4))
    assert [len(batch) for batch in found] == [2, 1]


def test_an_endless_source_is_planned_line_by_line() -> None:
    endless = (f"line {number}" for number in itertools.count())
    assert [i.prompt for i in itertools.islice(plan(endless, DEFAULTS, SeedSource()), 2)] == ["line 0", "line 1"]


def test_repetitions_must_be_positive() -> None:
    with pytest.raises(ValueError, match="--images_per_prompt 0"):
        replace(DEFAULTS, images_per_prompt=0)


def test_prompt_files_skip_blank_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffein Häuschen\r\n\n#no\n  \n #yes\n".encode())
    assert [(number, line.strip()) for number, line in read_prompt_lines(path)] == [(1, "ein Häuschen"), (5, "#yes")]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="p.txt"):
        read_prompt_lines(path)
    with pytest.raises(FileNotFoundError, match="none.txt"):
        read_prompt_lines(tmp_path / "none.txt")


# --- file names -----------------------------------------------------------------------------------------------


def test_names_of_a_plan_never_collide() -> None:
    lines = ["a --f x.png", "b --f X", "c --f x_001.png", "d --f sub\\y.webp", "e --f v1.5", "f"]
    found = [image.output_name for image in images(lines, images_per_prompt=2)]
    assert found[:6] == ["x.png", "x_001.png", "X_002.png", "X_003.png", "x_001_001.png", "x_001_002.png"]
    assert found[6:] == ["sub/y.webp", "sub/y_001.webp", "v1.5.png", "v1.5_001.png", None, None]
    assert [image.output_name for image in images("a --f x", n_iter=3)] == ["x.png", "x_001.png", "x_002.png"]
    assert [image.output_name for image in images("a --f {e$$p|q}")] == ["p.png", "q.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.png", "x.png"), ("a/b/c.webp", "a/b/c.webp"), ("./x", "x.png"), ("a\\b.JPG", "a/b.JPG"), ("..x", "..x.png")],
)
def test_names_stay_below_the_output_folder(tmp_path: Path, name: str, expected: str) -> None:
    assert safe_output_path(tmp_path / "out", name) == tmp_path.resolve() / "out" / expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.png", "../x.png", "a/../../x.png", "a/..", "..", "..\\x.png", "a\\..\\..\\x.png", "C:\\x.png",
        "c:x.png", "\\\\server\\share\\x.png", "\\x.png", "//server/x.png",
        "", " ", ".", "a/", "a\\", "x\0.png", "x\n.png",
        "x\udcff.png", "x" * 300, "ä" * 150, "a/" * 600 + "x.png",
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptSyntaxError, match="is refused"):
        safe_output_path(tmp_path, name)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    outdir = tmp_path / "out"
    outdir.mkdir()
    (tmp_path / "secret").mkdir()
    (outdir / "inside").mkdir()
    (outdir / "folder").symlink_to(tmp_path / "secret")
    (outdir / "file.png").symlink_to(tmp_path / "not_yet.png")
    (outdir / "fine").symlink_to(outdir / "inside")
    (outdir / "loop").symlink_to(outdir / "loop")
    (outdir / "dir.png").mkdir()
    for name in ("folder/x.png", "file.png", "loop/x.png", "dir.png"):
        with pytest.raises(PromptSyntaxError, match="is refused"):
            safe_output_path(outdir, name)
    assert safe_output_path(outdir, "fine/x.png") == (outdir / "inside" / "x.png").resolve()
    (tmp_path / "alias").symlink_to(outdir)
    assert safe_output_path(tmp_path / "alias", "x.png") == (outdir / "x.png").resolve()


def test_lines_with_bad_names_are_refused(tmp_path: Path) -> None:
    assert "--f" in refusal("a --f ../x.png", outdir=tmp_path)
    assert "--f" in refusal("a --f {../x|..\\y}", outdir=tmp_path)
