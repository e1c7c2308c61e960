"""Bucket tables, sizing, crops and statistics against frozen reference values and general properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import buckets
from library.data.buckets import Bucketing, Placement

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text(encoding="utf-8"))
EXAMPLES = [(group["input"], case) for group in GOLDEN["worked_examples"] for case in group["examples"]]


def bucketing(given_input: dict[str, Any]) -> Bucketing:
    if not given_input["enable_bucket"]:
        return Bucketing(tuple(given_input["resolution"]))
    return Bucketing(
        tuple(given_input["resolution"]), enabled=True, minimum=given_input["min_bucket_reso"],
        maximum=given_input["max_bucket_reso"], step=given_input["bucket_reso_steps"],
        no_upscale=given_input["bucket_no_upscale"],
    )


@pytest.mark.parametrize("table", GOLDEN["bucket_tables"], ids=lambda t: str(t["input"]["resolution"]))
def test_bucket_list_equals_reference(table: dict[str, Any]) -> None:
    options = table["input"]
    sizes = buckets.bucket_sizes(
        tuple(options["resolution"]), minimum=options["min_bucket_reso"], maximum=options["max_bucket_reso"],
        step=options["bucket_reso_steps"],
    )
    assert [list(size) for size in sizes] == table["resolutions"]
    assert len(sizes) == table["count"]


@pytest.mark.parametrize(("options", "case"), EXAMPLES)
def test_worked_example(options: dict[str, Any], case: dict[str, Any]) -> None:
    image = tuple(case["image"])
    placement = bucketing(options).place(image)
    assert list(placement.bucket) == case["bucket"]
    assert list(placement.resized) == case["resized"]
    assert placement.aspect_error == pytest.approx(case["ar_error"], abs=1e-9)
    left, top = buckets.crop_offset(placement.resized, placement.bucket)
    width, height = placement.bucket
    assert [left, top, left + width, top + height] == case["crop_box"]
    ltrb = buckets.crop_ltrb(image, placement.bucket)
    assert list(ltrb) == pytest.approx(case["crop_ltrb"], abs=1e-9)
    assert list(buckets.crop_top_left(ltrb, width, is_flipped=False)) == case["crop_top_left"]
    assert list(buckets.crop_top_left(ltrb, width, is_flipped=True)) == case["crop_top_left_flipped"]
    assert [height, width] == case["target_size_hw"]


@pytest.mark.parametrize("case", GOLDEN["min_max_adjustment"], ids=str)
def test_limits_are_adjusted_to_the_step(case: dict[str, Any]) -> None:
    def adjust() -> tuple[int, int]:
        return buckets.adjust_limits(
            tuple(case["resolution"]), minimum=case["min_bucket_reso"], maximum=case["max_bucket_reso"],
            step=case["bucket_reso_steps"],
        )

    if "error" in case:
        with pytest.raises(ValueError, match=case["error"].replace(" smallest", " the smallest").replace(
            " largest", " the largest"
        ).replace("_reso ", "_reso = [0-9]+ (is )?")):
            adjust()
    else:
        assert list(adjust()) == case["adjusted"]


side = st.integers(64, 4096)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(width=side, height=side, resolution=st.sampled_from([512, 768, 1024]), no_upscale=st.booleans())
def test_resized_image_covers_its_bucket(width: int, height: int, resolution: int, no_upscale: bool) -> None:
    rules = Bucketing((resolution, resolution), enabled=True, minimum=256, maximum=2048, no_upscale=no_upscale)
    try:
        placement = rules.place((width, height))
    except ValueError as error:
        assert no_upscale and "empty bucket" in str(error)
        return
    assert placement.resized[0] >= placement.bucket[0] and placement.resized[1] >= placement.bucket[1]
    assert placement.bucket[0] % 64 == 0 and placement.bucket[1] % 64 == 0
    if no_upscale:
        assert placement.resized[0] <= width and placement.resized[1] <= height
        assert placement.bucket[0] * placement.bucket[1] <= resolution * resolution
    else:
        assert placement.bucket in rules.sizes
        assert placement.resized[0] == placement.bucket[0] or placement.resized[1] == placement.bucket[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(width=side, height=side)
def test_letterbox_keeps_the_aspect_ratio_and_stays_inside(width: int, height: int) -> None:
    bucket = Bucketing((512, 512), enabled=True).place((width, height)).bucket
    left, top, right, bottom = buckets.crop_ltrb((width, height), bucket)
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert 0 <= left <= right <= bucket[0] + 1e-6 and 0 <= top <= bottom <= bucket[1] + 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(a=st.integers(128, 1536), b=st.integers(128, 1536), step=st.sampled_from([8, 16, 32, 64]))
def test_bucket_areas_never_exceed_the_resolution(a: int, b: int, step: int) -> None:
    sizes = buckets.bucket_sizes((a, b), minimum=128, maximum=2048, step=step)
    assert sizes == sorted(set(sizes))
    assert all(w * h <= a * b and w % step == h % step == 0 for w, h in sizes)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(width=side, height=side, resolution=st.sampled_from([(512, 512), (512, 768), (1024, 1024)]))
def test_no_bucket_has_a_nearer_aspect_ratio(width: int, height: int, resolution: tuple[int, int]) -> None:
    rules = Bucketing(resolution, enabled=True)
    placement = rules.place((width, height))
    if (width, height) in rules.sizes:
        assert placement.bucket == placement.resized == (width, height)
        return
    errors = [abs(size[0] / size[1] - width / height) for size in rules.sizes]
    assert placement.bucket == rules.sizes[errors.index(min(errors))]
    assert abs(placement.aspect_error) == pytest.approx(min(errors))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(width=side, height=side, is_bucketed=st.booleans())
def test_crop_is_in_the_middle_and_flips_mirror_its_conditioning(width: int, height: int, *, is_bucketed: bool) -> None:
    placement = Bucketing((512, 384), enabled=is_bucketed).place((width, height))
    for offset, whole, part in zip(
        buckets.crop_offset(placement.resized, placement.bucket), placement.resized, placement.bucket, strict=True
    ):
        assert 0 <= offset <= whole - part and 0 <= (whole - part) - 2 * offset <= 1
    ltrb = buckets.crop_ltrb((width, height), placement.bucket)
    top, left = buckets.crop_top_left(ltrb, placement.bucket[0], is_flipped=False)
    same_top, right = buckets.crop_top_left(ltrb, placement.bucket[0], is_flipped=True)
    assert top == same_top and left <= right <= left + 1 and top * left == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    a=st.integers(64, 2048), b=st.integers(64, 2048), low=st.integers(1, 1024), high=st.integers(1, 4096),
    step=st.sampled_from([8, 32, 64]),
)
def test_adjusted_limits_are_multiples_around_the_given_ones(a: int, b: int, low: int, high: int, step: int) -> None:
    try:
        new_low, new_high = buckets.adjust_limits((a, b), minimum=low, maximum=high, step=step)
    except ValueError as error:
        assert low > min(a, b) if "min_bucket_reso" in str(error) else high < max(a, b)
        return
    assert new_low % step == new_high % step == 0
    assert low - step < new_low <= low and high <= new_high < high + step
    assert new_low <= min(a, b) and max(a, b) <= new_high


def test_limits_below_one_step_are_no_bucket_sizes() -> None:
    usual = buckets.bucket_sizes((512, 512), minimum=64, maximum=1024, step=64)
    assert buckets.bucket_sizes((512, 512), minimum=0, maximum=1024, step=64) == usual


@pytest.mark.parametrize("size", [(0, 64), (64, 0), (0, 0), (-1, 64)])
@pytest.mark.parametrize("kind", [{}, {"enabled": True}, {"enabled": True, "no_upscale": True}], ids=str)
def test_images_without_extent_are_refused(size: tuple[int, int], kind: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=f"image size {size[0]}x{size[1]} is not usable"):
        Bucketing((512, 512), **kind).place(size)


def test_the_smallest_image_has_a_place() -> None:
    assert Bucketing((512, 512)).place((1, 1)).resized == (512, 512)
    assert Bucketing((512, 512), enabled=True).place((1, 1)).bucket == (512, 512)


def test_exact_size_beats_a_nearer_earlier_ratio() -> None:
    assert buckets.choose_bucket((512, 1024), [(256, 512), (512, 1024)]) == (512, 1024)
    assert buckets.choose_bucket((300, 600), [(256, 512), (512, 1024)]) == (256, 512)


def test_the_nearest_bucket_is_that_of_the_nearest_ratio_not_of_the_nearest_factor() -> None:
    # 1.45 is 0.45 from 1 and 0.55 from 2, but a factor of 1.45 from 1 and of 1.38 from 2
    assert buckets.choose_bucket((1450, 1000), [(512, 512), (1024, 512)]) == (512, 512)
    assert buckets.choose_bucket((1550, 1000), [(512, 512), (1024, 512)]) == (1024, 512)


def test_tiny_image_without_upscaling_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match="63x200.*bucket_reso_steps = 64"):
        Bucketing((512, 512), enabled=True, no_upscale=True).place((63, 200))
    with pytest.raises(ValueError, match="empty bucket"):
        Bucketing((512, 512), enabled=True, no_upscale=True).place((100000, 100))


def test_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="0x0"):
        Bucketing((512, 512)).place((0, 0))


def test_statistics_count_repeats_and_list_used_buckets_in_order() -> None:
    placements = [
        (Placement((512, 512), (512, 512), 0.25), 3), (Placement((384, 640), (384, 640), -0.75), 2),
        (Placement((512, 512), (512, 512), 0.5), 1), (Placement((64, 64), (64, 64), 0.5), 0),
    ]
    assert buckets.statistics(placements) == {
        "buckets": {"0": {"resolution": [384, 640], "count": 2}, "1": {"resolution": [512, 512], "count": 4}},
        "mean_img_ar_error": 0.5,
    }
    assert buckets.statistics([]) == {"buckets": {}, "mean_img_ar_error": 0.0}
