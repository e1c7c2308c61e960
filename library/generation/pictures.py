"""Pictures to start from and masks: finding files, their sizes, and tensors of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.images import ImageError, image_size, load_image
from library.options.generation_checks import picture_files

logger = logging.getLogger(__name__)

SIZE_STEP = 32  # pictures that give an image its size are reduced to a multiple of it

_EXIF_TAGS, _USER_COMMENT = 0x8769, 0x9286
_UTF16 = b"UNICODE\0"

Size = tuple[int, int]  # width, height


def find_pictures(name: str | None, option: str) -> list[Path]:
    """The file, or the pictures in the folder, that an option names; sorted. Raises FileNotFoundError."""
    if name is None:
        return []
    files = picture_files(Path(name))
    if not files:
        raise FileNotFoundError(f"--{option} {name}: there is no such file, or no picture in the folder.")
    return files


def reduced_size(path: Path) -> Size:
    """(width, height) of a picture, reduced to multiples of 32. Raises ImageError, or ValueError if it is too small."""
    size = image_size(path)
    width, height = (side - side % SIZE_STEP for side in size)
    if not width or not height:
        raise ValueError(f"{path} has {size[0]}x{size[1]} pixels; both sides must be at least {SIZE_STEP}.")
    if (width, height) != tuple(size):
        logger.warning("%s is used at %dx%d instead of %dx%d pixels", path, width, height, *size)
    return width, height


def load_picture(path: Path, size: Size) -> Tensor:
    """A picture as float32 [1,3,H,W] in [-1,1], resized to (width, height) where it differs.

    EXIF orientation is applied; transparent pixels are put on white. Raises ImageError.
    """
    image = Image.fromarray(load_image(path, alpha=True), "RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1)[None]


def load_mask(path: Path, size: Size, latent_hw: tuple[int, int]) -> Tensor:
    """What a mask for pictures of `size` repaints, as float32 [1,1,h,w] in [0,1]; white is 1. Raises ImageError."""
    image = Image.fromarray(load_image(path)).convert("L")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image = image.resize((latent_hw[1], latent_hw[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image, dtype=np.float32))[None, None] / 255


# --- texts in files -------------------------------------------------------------------------------------------
def exif_with_texts(texts: Mapping[str, str]) -> Image.Exif:
    """EXIF data for formats without text chunks: the texts as JSON in the user comment."""
    exif = Image.Exif()
    comment = json.dumps(dict(texts), ensure_ascii=False)
    exif.get_ifd(_EXIF_TAGS)[_USER_COMMENT] = _UTF16 + comment.encode("utf-16-be")
    return exif


def read_texts(path: Path) -> dict[str, str]:
    """The texts in a picture file: PNG text chunks, or what `exif_with_texts` wrote. Empty if there are none."""
    try:
        with Image.open(path) as image:
            image.load()
            texts = {key: value for key, value in getattr(image, "text", {}).items() if isinstance(value, str)}
            comment = image.getexif().get_ifd(_EXIF_TAGS).get(_USER_COMMENT, b"")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(path, f"it cannot be read as a picture ({error})") from error
    return texts or _texts_of_comment(comment)


def _texts_of_comment(comment: object) -> dict[str, str]:
    if not isinstance(comment, bytes) or not comment.startswith(_UTF16):
        return {}
    try:
        texts = json.loads(comment.removeprefix(_UTF16).decode("utf-16-be"))
    except ValueError:
        return {}
    return {key: value for key, value in texts.items() if isinstance(value, str)} if isinstance(texts, dict) else {}


def prompt_of(path: Path) -> str | None:
    """The prompt line that a picture was drawn from (prompt and negative prompt), or None if it says nothing."""
    texts = read_texts(path)
    if not texts.get("prompt"):
        return None
    negative = texts.get("negative-prompt")
    return texts["prompt"] + (f" --n {negative}" if negative else "")
