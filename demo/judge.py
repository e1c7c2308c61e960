"""Automatic judge of the demo's pictures: which shape, in which colour, on which background?

The colours come from the pixels (border = background, the pixels farthest from it = shape), the shape from the
overlap of the drawn area with templates of circle, square, triangle and star after moving both to the same centre
and area. Nothing is learned, so the judge cannot share a model's mistakes.

As a script it judges files or folders, and if captions lie beside the pictures, compares with them::

    python demo/judge.py pictures/known pictures/one.png
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from shapes import ALL_SHAPES, BACKGROUNDS, COLOURS, SIZE, shape_outline

UNKNOWN = "unknown"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CANVAS = 64  # side of the normalised masks
_AREA = 1000.0  # pixels that a normalised mask covers
_BORDER = 2  # width in pixels of the frame that shows the background
_TILTS = np.radians(np.arange(-14, 15, 3.5))
_MIN_OVERLAP = 0.72  # below this the shape is unknown
_MIN_CONTRAST = 45.0  # RGB distance between shape and background below which there is no shape
_MAX_COLOUR_DISTANCE = 40.0  # in CIE Lab units
_MAX_BACKGROUND_DISTANCE = 24.0


@dataclass(frozen=True)
class Verdict:
    """What the judge sees; a name may be "unknown". `scores` holds the overlap (0..1) with each shape's template."""

    shape: str
    colour: str
    background: str
    scores: Mapping[str, float] = field(default_factory=dict)

    def matches(self, shape: str, colour: str, background: str) -> bool:
        """Whether all three are as wanted."""
        return (self.shape, self.colour, self.background) == (shape, colour, background)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 RGB [64, 64, 3] of a picture of any size."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the judge needs an RGB picture [H, W, 3], got shape {tuple(image.shape)}")
    if image.shape[:2] != (SIZE, SIZE):
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return image.astype(np.uint8)


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIE Lab [n, 3] of RGB levels [n, 3] in 0..255."""
    return cv2.cvtColor((np.asarray(colours, np.float32) / 255.0).reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]


def nearest_name(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]], limit: float) -> str:
    """The name of the nearest colour in Lab, or "unknown" beyond `limit`. `colour` is RGB [3]."""
    distances = np.linalg.norm(to_lab(np.array(list(names.values()))) - to_lab(colour), axis=1)
    best = int(distances.argmin())
    return list(names)[best] if distances[best] <= limit else UNKNOWN


def normalise(mask: np.ndarray) -> np.ndarray | None:
    """A soft mask [H, W] (0..1) moved to the centre and scaled to a fixed area; None if it covers next to nothing."""
    area = float(mask.sum())
    if area < 0.015 * mask.size:
        return None
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    centre_x, centre_y = float((columns * mask).sum()) / area, float((rows * mask).sum()) / area
    scale, middle = np.sqrt(_AREA / area), (_CANVAS - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * centre_x], [0, scale, middle - scale * centre_y]], np.float32)
    return cv2.warpAffine(mask.astype(np.float32), matrix, (_CANVAS, _CANVAS), flags=cv2.INTER_LINEAR)


@functools.cache
def templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Shape names [n] and normalised masks [n, H, W] of all shapes at all tilts."""
    names, masks = [], []
    side = 256
    for shape in ALL_SHAPES:
        for tilt in _TILTS if shape != "circle" else (0.0,):
            corners = shape_outline(shape, float(tilt)) * (side * 0.3) + side / 2
            canvas = np.zeros((side, side), np.uint8)
            cv2.fillPoly(canvas, [np.round(corners * 256).astype(np.int32)], 255, cv2.LINE_AA, 8)
            mask = normalise(canvas / 255.0)
            if mask is not None:
                names.append(shape)
                masks.append(mask)
    return tuple(names), np.stack(masks)


def shape_scores(mask: np.ndarray) -> dict[str, float]:
    """Best overlap (soft intersection over union, 0..1) of a soft mask [H, W] with the templates of each shape."""
    scores = dict.fromkeys(ALL_SHAPES, 0.0)
    normal = normalise(mask)
    if normal is None:
        return scores
    names, masks = templates()
    overlaps = np.minimum(masks, normal).sum((1, 2)) / np.maximum(masks, normal).sum((1, 2))
    for name, overlap in zip(names, overlaps, strict=True):
        scores[name] = max(scores[name], float(overlap))
    return scores


def judge(image: Image.Image | np.ndarray) -> Verdict:
    """Name shape, colour and background of one picture."""
    pixels = as_array(image).astype(np.float32)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    ground = np.median(pixels[~inner], axis=0)
    background = nearest_name(ground, BACKGROUNDS, _MAX_BACKGROUND_DISTANCE)
    difference = pixels - ground
    distance = np.linalg.norm(difference, axis=2)
    reference = float(np.percentile(distance, 97))
    if reference < _MIN_CONTRAST:
        return Verdict(UNKNOWN, UNKNOWN, background, dict.fromkeys(ALL_SHAPES, 0.0))
    paint = np.median(pixels[distance > 0.75 * reference], axis=0)
    direction = paint - ground
    mask = np.clip((difference @ direction) / float(direction @ direction), 0.0, 1.0)
    mask[mask < 0.2] = 0.0  # faint noise of the background is not part of the shape
    scores = shape_scores(mask)
    best = max(scores, key=lambda name: scores[name])
    shape = best if scores[best] >= _MIN_OVERLAP else UNKNOWN
    return Verdict(shape, nearest_name(paint, COLOURS, _MAX_COLOUR_DISTANCE), background, scores)


def wanted_from_caption(caption: str) -> dict[str, str]:
    """The parts that a caption names: any of "shape", "colour", "background"."""
    words = re.findall(r"[a-z]+", caption.lower())
    wanted = {"shape": next((word for word in words if word in ALL_SHAPES), ""),
              "colour": next((word for word in words if word in COLOURS), ""),
              "background": next((word for word in words if word in BACKGROUNDS), "")}
    return {name: word for name, word in wanted.items() if word}


def agrees(verdict: Verdict, caption: str) -> bool:
    """Whether everything that the caption names is in the picture."""
    return all(getattr(verdict, name) == word for name, word in wanted_from_caption(caption).items())


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """The picture files among `paths`, folders expanded, sorted."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(entry for entry in path.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return files


def main() -> None:
    """Command line: judge pictures, compare with captions beside them."""
    parser = argparse.ArgumentParser(description="name shape, colour and background of the demo's pictures")
    parser.add_argument("paths", nargs="+", type=Path, help="picture files or folders of them")
    arguments = parser.parse_args()
    right = compared = 0
    for path in picture_files(arguments.paths):
        with Image.open(path) as image:
            verdict = judge(image)
        line = f"{path}: {verdict.colour} {verdict.shape} on {verdict.background}"
        line += f" (overlap {max(verdict.scores.values()):.2f})"
        caption = path.with_suffix(".txt")
        if caption.is_file():
            compared += 1
            good = agrees(verdict, caption.read_text(encoding="utf-8"))
            right += good
            line += " - as captioned" if good else f" - wanted: {caption.read_text(encoding='utf-8').strip()}"
        print(line)
    if compared:
        print(f"{right} of {compared} as captioned ({100 * right / compared:.1f} %)")


if __name__ == "__main__":
    main()
