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
_CAMERA = (0x010F, 0x0110)  # make and model
_UTF16, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"

Size = tuple[int, int]  # width, height


def find_pictures(name: str | None, option: str) -> list[Path]:
    """The file, or the pictures in the folder, that an option names; sorted. Raises FileNotFoundError."""
    if name is None:
        return []
    files = picture_files(Path(name))
    if not files:
        raise FileNotFoundError(f"--{option} {name}: there is no such file, or no picture in the folder.")
    return files


def reduced_size(path: Path, exact: int | None = None) -> Size:
    """(width, height) of a picture, reduced to multiples of 32 unless both are multiples of `exact`.

    Raises ImageError, or ValueError if it is too small.
    """
    size = image_size(path)
    if exact and not (size[0] % exact or size[1] % exact):
        return size[0], size[1]
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
    """The texts in a picture file: PNG text chunks, or EXIF's. Empty if there are none.

    In EXIF: what `exif_with_texts` wrote, another program's user comment as "parameters", ComfyUI's graph as "prompt".
    """
    try:
        with Image.open(path) as image:
            image.load()
            texts = {key: str(value) for key, value in getattr(image, "text", {}).items() if isinstance(value, str)}
            exif = image.getexif()
            camera = [exif.get(tag) for tag in _CAMERA]
            comment = exif.get_ifd(_EXIF_TAGS).get(_USER_COMMENT, b"")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(path, f"it cannot be read as a picture ({error})") from error
    return texts or _texts_of_comment(comment) or _texts_of_camera(camera)


def _texts_of_comment(comment: object) -> dict[str, str]:
    text = _comment_text(comment)
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError):
        return {"parameters": text} if text else {}
    return {key: value for key, value in texts.items() if isinstance(value, str)} if isinstance(texts, dict) else {}


def _comment_text(comment: object) -> str:
    """The text of an EXIF user comment; its first eight bytes name the encoding."""
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return ""
    if comment.startswith(_UTF16):
        both = [comment.removeprefix(_UTF16).decode(f"utf-16-{order}", errors="replace") for order in ("be", "le")]
        return max(both, key=lambda text: sum(character < "\x80" for character in text))
    return comment.removeprefix(_ASCII).decode("utf-8", errors="replace").strip("\0 ")


def _texts_of_camera(texts: list[object]) -> dict[str, str]:
    """ComfyUI writes `prompt:{...}` in place of a camera's name."""
    pairs = (text.split(":", 1) for text in texts if isinstance(text, str) and ":" in text)
    return {key.lower(): text for key, text in pairs}
