"""Random changes of pixels: crops, face crops and colours; all randomness comes from the generator handed in."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from library.data.buckets import Size, crop_offset
from library.data.images import ImageError, crop, resize

COLOR_PROBABILITY = 0.33
MAX_HUE_SHIFT = 8.0  # of OpenCV's 180 steps
GAMMA_RANGE = (0.95, 1.05)
MIN_FACE_TO_JITTER = 40  # pixels


@dataclass(frozen=True)
class Face:
    """A face marked in a file name: centre and extent in pixels of the file."""

    center: tuple[int, int]
    size: Size


def face_from_name(path: str | PurePath) -> Face | None:
    """The face of a file named `<name>_cx_cy_w_h.<ext>`; None without such an ending or with cx = 0.

    Raises ImageError when the face has no extent.
    """
    pieces = PurePath(path).stem.split("_")
    if len(pieces) < 5:
        return None
    try:
        center_x, center_y, width, height = (int(piece) for piece in pieces[-4:])
    except ValueError:
        return None
    if center_x <= 0:
        return None
    if max(width, height) <= 0:
        raise ImageError(str(path), f"its name marks a face of {width}x{height} pixels; a face has at least 1 pixel")
    return Face((center_x, center_y), (width, height))


def random_crop_offset(resized: Size, bucket: Size, rng: random.Random) -> tuple[int, int]:
    """(left, top) of a uniformly random window; draws for the width first, and only where there is room."""
    left, top = (rng.randint(0, room) if (room := a - b) > 0 else 0 for a, b in zip(resized, bucket, strict=True))
    return left, top


def crop_pixels(pixels: np.ndarray, bucket: Size, rng: random.Random | None) -> np.ndarray:
    """The centre window of size `bucket`, or a random one when `rng` is given."""
    resized = pixels.shape[1], pixels.shape[0]
    offset = crop_offset(resized, bucket) if rng is None else random_crop_offset(resized, bucket, rng)
    return crop(pixels, offset, bucket)


@dataclass(frozen=True)
class FaceCrop:
    """`face_crop_aug_range` (low, high): the target side is between low and high times the face's larger side."""

    low: float
    high: float
    is_random: bool  # random_crop: the window may leave the face's centre
    interpolation: str | None = None

    def __call__(self, pixels: np.ndarray, face: Face, target: Size, rng: random.Random) -> np.ndarray:
        """uint8 [h,w,C] scaled by a random factor of at most 1 and cut to `target` (width, height) near the face.

        Draws: scale, then height, then width. Raises ValueError when the image is smaller than the target.
        """
        size = pixels.shape[1], pixels.shape[0]
        if size == target:
            return pixels
        scale = self._scale(size, face, target, rng)
        resized = _round(size[0] * scale), _round(size[1] * scale)
        if resized[0] < target[0] or resized[1] < target[1]:
            raise ValueError(
                f"the image ({size[0]}x{size[1]}) is smaller than the resolution {target[0]}x{target[1]}; "
                "face_crop_aug_range cannot enlarge images"
            )
        pixels = resize(pixels, resized, self.interpolation)
        top = self._start(1, face, resized, target, scale, rng)
        left = self._start(0, face, resized, target, scale, rng)
        return crop(pixels, (left, top), target)

    def _scale(self, size: Size, face: Face, target: Size, rng: random.Random) -> float:
        extent, side = max(face.size), min(target)
        lowest = max(target[1] / size[1], target[0] / size[0])
        lowest = min(1.0, max(lowest, side / (extent * self.high)))
        highest = min(1.0, max(lowest, side / (extent * self.low)))
        return lowest if lowest >= highest else rng.uniform(lowest, highest)

    def _start(self, axis: int, face: Face, resized: Size, target: Size, scale: float, rng: random.Random) -> int:
        extent, length = max(face.size), resized[axis]
        center = _round(face.center[axis] * scale)
        start = center - target[axis] // 2
        if self.is_random:
            reach = max(length - center, center)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif self.low != self.high and extent > min(target) // 10 and extent >= MIN_FACE_TO_JITTER:
            start += rng.randint(-extent // 20, extent // 20)
        return max(0, min(start, length - target[axis]))


def augment_colors(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """uint8 [H,W,3 or 4] with, one time in three, its hue or its gamma shifted; a fourth channel is untouched."""
    if rng.random() > COLOR_PROBABILITY:
        return pixels
    if rng.random() > 0.5:
        changed = shift_hue(pixels[..., :3], rng.uniform(-MAX_HUE_SHIFT, MAX_HUE_SHIFT))
    else:
        changed = apply_gamma(pixels[..., :3], rng.uniform(*GAMMA_RANGE))
    return np.concatenate([changed, pixels[..., 3:]], axis=2)


def shift_hue(rgb: np.ndarray, shift: float) -> np.ndarray:
    """uint8 [H,W,3] with the hue moved by `shift` of 180 steps (channel order does not matter: it is symmetric)."""
    import cv2

    hsv = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_BGR2HSV)
    hsv[..., 0] = ((hsv[..., 0].astype(np.float64) + shift % 180) % 180).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def apply_gamma(rgb: np.ndarray, gamma: float) -> np.ndarray:
    """uint8 [H,W,3] with v -> 255 (v/255)^gamma, truncated."""
    table = np.clip(255.0 * (np.arange(256) / 255.0) ** gamma, 0, 255).astype(np.uint8)
    return table[rgb]


def _round(value: float) -> int:
    return int(value + 0.5)
