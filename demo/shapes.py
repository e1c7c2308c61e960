"""Generator of the demo's training pictures: small anti-aliased drawings with captions.

Every picture is a pure function of a seed. Three kinds of pictures exist:

* known pictures  - one circle, square or triangle in one of six colours on one of three backgrounds
  (what the base model learns),
* star pictures   - the new concept "sks star" that a LoRA teaches later,
* free drawings   - anything with edges (polygons, strokes, blobs, gradients, random colours); only the
  VAE sees them, so that its latent space can hold things that the base model has never drawn.

Run as a script, it writes a folder of PNG or JPEG files with caption files beside them::

    python demo/shapes.py --kind known --count 32 --output pictures/known
    python demo/shapes.py --kind star --count 12 --output pictures/star
"""

from __future__ import annotations

import argparse
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = 64
SUPERSAMPLE = 4
_SHIFT = 8  # fixed-point bits of OpenCV's sub-pixel coordinates

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 46, 52),
    "yellow": (246, 206, 58),
    "green": (52, 168, 83),
    "cyan": (64, 200, 215),
    "blue": (48, 88, 214),
    "purple": (158, 66, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 243),
    "grey": (146, 148, 154),
    "black": (32, 33, 38),
}
KNOWN_SHAPES = ("circle", "square", "triangle")
ALL_SHAPES = KNOWN_SHAPES + ("star",)
STAR_TOKEN = "sks"


@dataclass(frozen=True)
class Scene:
    """One shape on a background. Position and radius are in pixels of the finished picture, the tilt in radians."""

    shape: str
    colour: str
    background: str
    centre_x: float
    centre_y: float
    radius: float
    tilt: float

    def caption(self, token: str = "") -> str:
        """The plain caption, e.g. "a red circle on a white background"; `token`, if given, precedes the shape."""
        words = filter(None, ("a", self.colour, token, self.shape, "on a", self.background, "background"))
        return " ".join(words)


def combinations(shapes: tuple[str, ...] = KNOWN_SHAPES) -> list[tuple[str, str, str]]:
    """All (shape, colour, background) triples in a fixed order."""
    return list(itertools.product(shapes, COLOURS, BACKGROUNDS))


def regular_polygon(points: int, tilt: float = 0.0, inner: float | None = None) -> np.ndarray:
    """Corners [n, 2] of a regular polygon of circumradius 1, first one up; with `inner` a star of that inner radius."""
    count = points if inner is None else 2 * points
    angles = np.arange(count) * (2 * np.pi / count) - np.pi / 2 + tilt
    radii = np.ones(count) if inner is None else np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def shape_outline(shape: str, tilt: float = 0.0) -> np.ndarray:
    """Corners [n, 2] of a shape of radius about 1 around the origin; the four shapes look about equally large."""
    if shape == "circle":
        return regular_polygon(64) * 0.93
    if shape == "square":
        return regular_polygon(4, tilt + np.pi / 4) * 1.2
    if shape == "triangle":
        return regular_polygon(3, tilt) * 1.22 + np.array([0.0, 0.16])
    if shape == "star":
        return regular_polygon(5, tilt, inner=0.45) * 1.2 + np.array([0.0, 0.06])
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(ALL_SHAPES)}")


def fill(canvas: np.ndarray, corners: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Fill a polygon, corners [n, 2] in pixels of the finished picture, on a supersampled canvas [H, W, 3]."""
    points = np.round(corners * (SUPERSAMPLE * (1 << _SHIFT))).astype(np.int32)
    cv2.fillPoly(canvas, [points.reshape(-1, 1, 2)], colour, lineType=cv2.LINE_8, shift=_SHIFT)


def finish(canvas: np.ndarray, size: int) -> np.ndarray:
    """Average a supersampled canvas down to uint8 [size, size, 3]."""
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def random_scene(rng: random.Random, shape: str, colour: str, background: str, size: int = SIZE) -> Scene:
    """A scene with position, size and tilt drawn at random, the shape fully inside the picture."""
    radius = rng.uniform(0.21, 0.34) * size
    margin = radius * 1.22 + 0.03 * size
    centre = [rng.uniform(margin, size - margin) if margin < size / 2 else size / 2 for _ in range(2)]
    return Scene(shape, colour, background, centre[0], centre[1], radius, rng.uniform(-0.12, 0.12))


def jitter(rng: random.Random, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    """A colour moved by at most `amount` per channel."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def draw_scene(scene: Scene, rng: random.Random | None = None, size: int = SIZE) -> np.ndarray:
    """Draw a scene as uint8 RGB [size, size, 3]; with `rng` the two colours vary by a few levels."""
    amount = 0 if rng is None else 6
    rng = rng or random.Random(0)
    background = jitter(rng, BACKGROUNDS[scene.background], amount)
    canvas = np.full((size * SUPERSAMPLE, size * SUPERSAMPLE, 3), background, dtype=np.uint8)
    corners = shape_outline(scene.shape, scene.tilt) * scene.radius + np.array([scene.centre_x, scene.centre_y])
    fill(canvas, corners, jitter(rng, COLOURS[scene.colour], amount))
    return finish(canvas, size)


def known_picture(
    seed: int, shapes: tuple[str, ...] = KNOWN_SHAPES, combination: tuple[str, str, str] | None = None, size: int = SIZE
) -> tuple[np.ndarray, Scene]:
    """Picture uint8 [size, size, 3] and its scene, a pure function of the arguments."""
    rng = random.Random(f"known-{seed}")
    shape, colour, background = combination or (
        rng.choice(shapes), rng.choice(tuple(COLOURS)), rng.choice(tuple(BACKGROUNDS))
    )
    scene = random_scene(rng, shape, colour, background, size)
    return draw_scene(scene, rng, size), scene


# --------------------------------------------------------------------------------------------- free drawings


def _random_colour(rng: random.Random) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.45:
        return jitter(rng, rng.choice(tuple(COLOURS.values())), 14)
    if kind < 0.6:
        return jitter(rng, rng.choice(tuple(BACKGROUNDS.values())), 10)
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _random_backdrop(rng: random.Random, side: int) -> np.ndarray:
    kind = rng.random()
    first = np.array(_random_colour(rng), dtype=np.float32)
    if kind < 0.4:
        first = np.array(jitter(rng, rng.choice(tuple(BACKGROUNDS.values())), 10), dtype=np.float32)
    if kind < 0.75:
        return np.full((side, side, 3), first, dtype=np.uint8)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None] + rng.uniform(-0.3, 0.3)
    share = np.clip(ramp * 0.5 + 0.5, 0, 1) if kind < 0.92 else (ramp > 0).astype(np.float32)
    second = np.array(_random_colour(rng), dtype=np.float32)
    return (first + share[:, :, None] * (second - first)).astype(np.uint8)


def _random_outline(rng: random.Random) -> np.ndarray:
    kind = rng.randrange(6)
    tilt = rng.uniform(0, 2 * np.pi)
    if kind == 0:
        return shape_outline(rng.choice(ALL_SHAPES), rng.uniform(-0.3, 0.3))
    if kind == 1:
        return regular_polygon(rng.randint(3, 8), tilt)
    if kind == 2:
        return regular_polygon(rng.randint(3, 8), tilt, inner=rng.uniform(0.3, 0.75))
    if kind == 3:  # irregular polygon around the origin
        angles = np.sort([rng.uniform(0, 2 * np.pi) for _ in range(rng.randint(3, 7))])
        radii = np.array([rng.uniform(0.4, 1.1) for _ in angles])
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    if kind == 4:  # smooth blob
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        radii = np.full(48, 0.85)
        for wave in (2, 3, 4):
            radii += rng.uniform(-0.14, 0.14) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    ellipse = regular_polygon(48) * np.array([1.0, rng.uniform(0.3, 1.0)])
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return ellipse @ turn.T


def _random_stroke(rng: random.Random, canvas: np.ndarray, size: int) -> None:
    start, control, end = (np.array([rng.uniform(0, size), rng.uniform(0, size)]) for _ in range(3))
    steps = np.linspace(0, 1, 16 if rng.random() < 0.6 else 3)[:, None]
    curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * control + steps**2 * end
    points = np.round(curve * SUPERSAMPLE * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
    width = round(rng.uniform(1.5, 8.0) * SUPERSAMPLE)
    cv2.polylines(canvas, [points], rng.random() < 0.2, _random_colour(rng), width, cv2.LINE_8, _SHIFT)


def free_drawing(seed: int, size: int = SIZE) -> np.ndarray:
    """A drawing of one to four random things, uint8 [size, size, 3], a pure function of the seed."""
    rng = random.Random(f"free-{seed}")
    canvas = _random_backdrop(rng, size * SUPERSAMPLE)
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        if rng.random() < 0.25:
            _random_stroke(rng, canvas, size)
            continue
        radius = rng.uniform(0.1, 0.42) * size
        centre = np.array([rng.uniform(0.15, 0.85) * size, rng.uniform(0.15, 0.85) * size])
        outline = _random_outline(rng) * radius + centre
        fill(canvas, outline, _random_colour(rng))
        if rng.random() < 0.15:  # a hole makes a ring
            fill(canvas, (outline - centre) * rng.uniform(0.4, 0.75) + centre, _random_colour(rng))
    return finish(canvas, size)


def vae_picture(seed: int, size: int = SIZE) -> np.ndarray:
    """Training picture of the VAE: 40 % like the known pictures (stars included), the rest free drawings."""
    if seed % 5 < 2:
        return known_picture(seed, ALL_SHAPES, size=size)[0]
    return free_drawing(seed, size)


# --------------------------------------------------------------------------------------------- writing folders


def even_order(shape: str) -> list[tuple[str, str, str]]:
    """All combinations of one shape; any beginning shows the colours and the backgrounds about equally often."""
    grounds = list(BACKGROUNDS)
    return [(shape, colour, grounds[(index + turn) % len(grounds)])
            for turn in range(len(grounds)) for index, colour in enumerate(COLOURS)]


def write_pictures(output: Path, kind: str, count: int, seed: int = 0, extension: str = "png") -> list[Path]:
    """Write `count` pictures with captions beside them; combinations are visited evenly. Returns the picture paths."""
    if kind not in ("known", "star"):
        raise ValueError(f"unknown kind of picture {kind!r}; known are 'known' and 'star'")
    output.mkdir(parents=True, exist_ok=True)
    triples = even_order("star") if kind == "star" else combinations()
    if kind == "known":
        random.Random(seed).shuffle(triples)
    paths = []
    for index in range(count):
        picture, scene = known_picture(seed * 100_003 + index, combination=triples[index % len(triples)])
        path = output / f"{kind}_{index:04d}.{extension}"
        Image.fromarray(picture).save(path, **({"quality": 95} if extension in ("jpg", "jpeg") else {}))
        caption = scene.caption(STAR_TOKEN if kind == "star" else "")
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def main() -> None:
    """Command line: write a folder of pictures and captions."""
    parser = argparse.ArgumentParser(description="write small training pictures of coloured shapes with captions")
    parser.add_argument("--kind", choices=("known", "star"), default="known", help="known shapes or the new concept")
    parser.add_argument("--count", type=int, default=54, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="file format")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to (created if absent)")
    arguments = parser.parse_args()
    paths = write_pictures(arguments.output, arguments.kind, arguments.count, arguments.seed, arguments.format)
    print(f"wrote {len(paths)} pictures with captions to {arguments.output}")


if __name__ == "__main__":
    main()
