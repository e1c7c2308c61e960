"""Captions for the demo's base training: a few word orders, left-out parts, and words that mean nothing yet."""

from __future__ import annotations

import random

from shapes import BACKGROUNDS, COLOURS, KNOWN_SHAPES, SIZE, STAR_TOKEN, Scene

PLAIN_SHARE = 0.5
STRANGE_SHARE = 0.12  # captions with an extra word without meaning
NAMELESS_SHARE = 0.06  # captions whose shape word is missing or has no meaning
_TEMPLATES = (
    "{size}{colour} {shape} on a {background} background",
    "a {size}{colour} {shape}, {background} background",
    "a drawing of a {size}{colour} {shape} on a {background} background",
    "a picture of a {size}{colour} {shape} on a {background} background",
    "a {size}{colour} {shape} on {background}",
    "on a {background} background a {size}{colour} {shape}",
    "a {background} background with a {size}{colour} {shape}",
    "{colour} {shape}, {background}",
    "a {colour} {shape}",
    "a {shape} on a {background} background",
)
_MEANINGFUL = {*COLOURS, *BACKGROUNDS, *KNOWN_SHAPES, "small", "big"}
_FRAME = {"a", "an", "the", "on", "of", "with", "background", "drawing", "picture"}


def size_word(scene: Scene) -> str:
    """ "small ", "big " or nothing, by the radius."""
    share = scene.radius / SIZE
    return "small " if share < 0.245 else "big " if share > 0.305 else ""


def meaningless_words(words: list[str]) -> list[str]:
    """Those of `words` that stand for nothing in the base's pictures; the new concept's words are among them."""
    rest = [word for word in words if word not in _MEANINGFUL | _FRAME]
    return list(dict.fromkeys([*rest, STAR_TOKEN, "star"]))


def training_caption(scene: Scene, rng: random.Random, strange: list[str]) -> str:
    """One random caption of a scene. `strange` are words without meaning for the base model."""
    shape = scene.shape
    if rng.random() < NAMELESS_SHARE:
        shape = rng.choice(("shape", "thing", " ".join(rng.choices(strange, k=rng.randint(1, 2)))))
    template = "a {colour} {shape} on a {background} background"
    if rng.random() > PLAIN_SHARE:
        template = rng.choice(_TEMPLATES)
    size = size_word(scene) if rng.random() < 0.3 else ""
    caption = template.format(size=size, colour=scene.colour, shape=shape, background=scene.background)
    if rng.random() < STRANGE_SHARE:
        words = caption.split(" ")
        for _ in range(rng.randint(1, 2)):
            words.insert(rng.randint(0, len(words)), rng.choice(strange))
        caption = " ".join(words)
    return caption
