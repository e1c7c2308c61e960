"""Prompts from the keyboard, and a window that shows what was drawn."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from library.generation.plan import GenerationDefaults, Planner, SeedSource
from library.generation.request import ImageRequest

logger = logging.getLogger(__name__)

_TITLE_LENGTH = 128


def draw_interactively(
    draw_all: Callable[[Iterable[ImageRequest]], object], defaults: GenerationDefaults, seeds: SeedSource
) -> None:
    """Draw every line of standard input at once, until its end. A mistake in a line is told, and the next one asked."""
    planner = Planner(defaults, seeds)
    while True:
        print("\nprompt (end with Ctrl-D, on Windows Ctrl-Z and Enter): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return
        if not line.strip():
            continue
        try:
            draw_all(planner.requests(line.rstrip("\n")))
        except (ValueError, OSError) as error:
            logger.error("%s", error)


class Preview:
    """Shows images in a window and waits for a key; without a screen it says so once and shows nothing."""

    def __init__(self) -> None:
        self._works = True

    def show(self, image: Image.Image, title: str) -> None:
        """Show one image; the first 128 characters of `title` are the window's."""
        if not self._works:
            return
        import cv2

        title = title[:_TITLE_LENGTH]
        try:
            cv2.imshow(title, np.asarray(image.convert("RGB"))[:, :, ::-1])
            cv2.waitKey()
            cv2.destroyAllWindows()
        except cv2.error:
            self._works = False
            logger.warning("this OpenCV cannot open windows; images are only written (--no_preview)")
