"""Pure arithmetic of aspect-ratio bucketing: which size an image is resized to, cropped to and conditioned on.

Every size is (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where one image goes: resized to `resized` (covers `bucket`), then cut to `bucket`."""

    bucket: Size
    resized: Size
    aspect_error: float  # bucket width/height minus image width/height


@dataclass(frozen=True)
class Bucketing:
    """The bucket rules of one dataset; `step`, `minimum` and `maximum` are unused without `enabled`."""

    resolution: Size
    enabled: bool = False
    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    no_upscale: bool = False

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The predefined buckets in sorted order; empty with `no_upscale`, where every image makes its own."""
        if not self.enabled:
            return (self.resolution,)
        if self.no_upscale:
            return ()
        return tuple(bucket_sizes(self.resolution, minimum=self.minimum, maximum=self.maximum, step=self.step))

    def place(self, image_size: Size) -> Placement:
        """The bucket and the resize target of an image of `image_size`.

        Raises ValueError for empty sizes and, with `no_upscale`, for images with a side shorter than `step`.
        """
        width, height = image_size
        if width < 1 or height < 1:
            raise ValueError(f"the image size {width}x{height} is not usable: both sides must be at least 1 pixel")
        if self.enabled and self.no_upscale:
            return _place_without_upscaling(image_size, self.resolution, self.step)
        return cover(image_size, choose_bucket(image_size, self.sizes))


def adjust_limits(resolution: Size, *, minimum: int, maximum: int, step: int) -> tuple[int, int]:
    """`min_bucket_reso` lowered and `max_bucket_reso` raised to multiples of `step`.

    Raises ValueError when the limits then exclude the sides of `resolution` (do not call with `bucket_no_upscale`,
    which uses neither limit).
    """
    low = minimum - minimum % step
    high = maximum + -maximum % step
    if low > min(resolution):
        raise ValueError(
            f"min_bucket_reso = {minimum} is greater than the smallest side of resolution {_text(resolution)}. "
            f"Lower min_bucket_reso to {min(resolution)} or less."
        )
    if high < max(resolution):
        raise ValueError(
            f"max_bucket_reso = {maximum} is smaller than the largest side of resolution {_text(resolution)}. "
            f"Raise max_bucket_reso to {max(resolution)} or more."
        )
    return low, high


def bucket_sizes(resolution: Size, *, minimum: int, maximum: int, step: int) -> list[Size]:
    """All buckets whose area is at most that of `resolution` and whose sides are multiples of `step`, sorted."""
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    sizes = {(square, square)} if square else set()
    for width in range(minimum, maximum + 1, step):
        if width < 1:
            continue
        height = min(maximum, area // width // step * step)
        if height >= max(minimum, 1):
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise ValueError(
            f"bucket_reso_steps = {step} leaves no bucket for resolution {_text(resolution)}. Lower bucket_reso_steps."
        )
    return sorted(sizes)


def choose_bucket(image_size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket of exactly this size, else the one with the nearest width/height ratio (the first among equals)."""
    if image_size in sizes:
        return image_size
    aspect = image_size[0] / image_size[1]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def cover(image_size: Size, bucket: Size) -> Placement:
    """The smallest resize, up or down, that keeps the aspect ratio and covers `bucket`."""
    width, height = image_size
    aspect, bucket_aspect = width / height, bucket[0] / bucket[1]
    scale = bucket[1] / height if aspect > bucket_aspect else bucket[0] / width
    return Placement(bucket, (_round(width * scale), _round(height * scale)), bucket_aspect - aspect)


def crop_offset(resized: Size, bucket: Size) -> tuple[int, int]:
    """(left, top) of the centre crop."""
    return max(resized[0] - bucket[0], 0) // 2, max(resized[1] - bucket[1], 0) // 2


def crop_ltrb(image_size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the image letter-boxed inside its bucket: SDXL's crop conditioning.

    This is not the pixel crop; existing models were trained with these values.
    """
    aspect = image_size[0] / image_size[1]
    width, height = bucket
    if width / height > aspect:
        inner_width, inner_height = height * aspect, float(height)
    else:
        inner_width, inner_height = float(width), width / aspect
    left = float(math.floor((width - inner_width) / 2))
    top = float(math.floor((height - inner_height) / 2))
    return left, top, left + inner_width, top + inner_height


def crop_top_left(ltrb: Sequence[float], bucket_width: int, *, is_flipped: bool) -> tuple[int, int]:
    """(top, left) as the batch carries it; a flipped image mirrors the left offset."""
    left, top, right, _ = ltrb
    return int(top), int(bucket_width - right) if is_flipped else int(left)


def statistics(placements: Iterable[tuple[Placement, int]]) -> dict[str, Any]:
    """The `ss_bucket_info` table of images with their repeats: counts per used bucket, mean absolute ratio error."""
    counts: dict[Size, int] = {}
    errors: list[float] = []
    for placement, repeats in placements:
        counts[placement.bucket] = counts.get(placement.bucket, 0) + repeats
        errors.append(abs(placement.aspect_error))
    used = sorted(size for size, count in counts.items() if count)
    return {
        "buckets": {str(i): {"resolution": list(size), "count": counts[size]} for i, size in enumerate(used)},
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def _place_without_upscaling(image_size: Size, resolution: Size, step: int) -> Placement:
    width, height = image_size
    area, aspect = resolution[0] * resolution[1], width / height
    resized = image_size
    if width * height > area:
        ideal_width = math.sqrt(area * aspect)
        first_width = _round_to_step(ideal_width, step)
        first_height = _round_to_step(first_width / aspect, step)
        second_height = _round_to_step(area / ideal_width, step)
        second_width = _round_to_step(second_height * aspect, step)
        first_error = abs(first_width / first_height - aspect) if first_height else math.inf
        second_error = abs(second_width / second_height - aspect) if second_height else math.inf
        if first_error < second_error:
            resized = first_width, _round(first_width / aspect)
        else:
            resized = _round(second_height * aspect), second_height
    bucket = resized[0] - resized[0] % step, resized[1] - resized[1] % step
    if min(bucket) < 1:
        raise ValueError(
            f"the image size {_text(image_size)} gives an empty bucket: with bucket_no_upscale both sides must be at "
            f"least bucket_reso_steps = {step} after fitting the area of {_text(resolution)}. Remove or enlarge the "
            "image, lower bucket_reso_steps, or turn bucket_no_upscale off."
        )
    return Placement(bucket, resized, bucket[0] / bucket[1] - aspect)


def _round(value: float) -> int:
    return int(value + 0.5)


def _round_to_step(value: float, step: int) -> int:
    rounded = _round(value)
    return rounded - rounded % step


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
