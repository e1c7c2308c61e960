"""From an image file to a cropped array and on to a tensor: decoding, orientation, resizing, cutting."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from library.data import formats
from library.data.buckets import Size
from library.data.jxl_header import jxl_size
from library.options.errors import UserError

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(UserError):
    """An image file that cannot be used, and why; travels between processes."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.path, self.reason)


def image_size(path: str | Path) -> Size:
    """(width, height) after the EXIF orientation, from the header alone. Raises ImageError naming the file."""
    try:
        if str(path).lower().endswith(".jxl") and not formats.missing_plugin(path) and (size := jxl_size(path)):
            return size
        with _open(path) as image:
            width, height = image.size
            is_turned = _orientation(image) >= 5
    except _UNREADABLE as error:
        raise ImageError(path, _reason(path, error)) from error
    return (height, width) if is_turned else (width, height)


def load_image(path: str | Path, *, alpha: bool = False) -> np.ndarray:
    """The pixels as uint8 [H,W,3], or [H,W,4] with `alpha`, upright by the EXIF orientation.

    Without `alpha`, transparency is discarded (the colours behind it show through); with it, images without
    transparency are opaque. 16-bit greyscale is scaled to 8 bits. Raises ImageError naming the file.
    """
    return load_image_and_transparency(path, alpha=alpha)[0]


def load_image_and_transparency(path: str | Path, *, alpha: bool = False) -> tuple[np.ndarray, bool]:
    """`load_image`, and whether any pixel is not opaque."""
    try:
        with _open(path) as image:
            orientation = _orientation(image)
            image.load()
            pixels = _convert(image)
    except (*_UNREADABLE, MemoryError) as error:
        raise ImageError(path, _reason(path, error)) from error
    if orientation in _TRANSPOSE:
        pixels = pixels.transpose(_TRANSPOSE[orientation])
    array = np.array(pixels)
    if array.shape[2] == 3:
        opaque = np.full((*array.shape[:2], 1), 255, dtype=np.uint8)
        return np.concatenate([array, opaque], axis=2) if alpha else array, False
    return array if alpha else np.ascontiguousarray(array[..., :3]), bool(array[..., 3].min() < 255)


def check_decodes(path: str | Path) -> Size:
    """(width, height) after the EXIF orientation, of a file whose whole content was decoded. Raises ImageError."""
    try:
        with _open(path) as image:
            orientation = _orientation(image)
            image.load()
            if image.mode not in ("L", "RGB", "RGBA"):
                _convert(image)
            width, height = image.size
    except (*_UNREADABLE, MemoryError) as error:
        raise ImageError(path, _reason(path, error)) from error
    return (height, width) if orientation >= 5 else (width, height)


def resize(pixels: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """uint8 [H,W,C] resized to `size` (width, height) with the filter that `resize_interpolation` names.

    Unset: OpenCV's area filter when no side grows, else Pillow's Lanczos. Channels are resized independently
    (no premultiplication by alpha).
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation in ("lanczos", "box"):
        return _resize_pillow(pixels, size, interpolation)
    import cv2

    filters = {
        "area": cv2.INTER_AREA, "nearest": cv2.INTER_NEAREST_EXACT, "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "cubic": cv2.INTER_CUBIC,
    }
    if interpolation not in filters:
        allowed = ", ".join(sorted([*filters, "box", "lanczos"]))
        raise ValueError(f"resize_interpolation = {interpolation!r} is unknown. Use one of {allowed}.")
    resized = cv2.resize(pixels, size, interpolation=filters[interpolation])
    return resized.reshape(size[1], size[0], pixels.shape[2])


def crop(pixels: np.ndarray, offset: tuple[int, int], size: Size) -> np.ndarray:
    """The window of `size` (width, height) whose upper left corner is `offset` (left, top)."""
    left, top = offset
    return pixels[top : top + size[1], left : left + size[0]]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3 or 4] -> float32 [3,H,W] in [-1,1]; a fourth channel is left out."""
    rgb = torch.from_numpy(np.ascontiguousarray(pixels[..., :3]))
    return rgb.permute(2, 0, 1).to(torch.float32).div_(255).sub_(0.5).div_(0.5).contiguous()


def alpha_mask(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3 or 4] -> float32 [H,W] in [0,1]; opaque without a fourth channel."""
    if pixels.shape[2] == 4:
        return torch.from_numpy(np.ascontiguousarray(pixels[..., 3])).to(torch.float32).div_(255)
    return torch.ones(pixels.shape[:2], dtype=torch.float32)


def _resize_pillow(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    resample = Image.Resampling.LANCZOS if interpolation == "lanczos" else Image.Resampling.BOX
    # Pillow premultiplies "RGBA" by alpha; "CMYK" is its mode for four independent channels.
    mode = "CMYK" if pixels.shape[2] == 4 else "RGB"
    image = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())
    return np.array(image.resize(size, resample))


def _convert(image: Image.Image) -> Image.Image:
    """RGBA where the file has transparency, else RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF (or XMP) orientation 1 to 8 of an opened image, without decoding pixels; 1 when unreadable."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # the decoder has turned it as its own header says, which counts more than EXIF there
    try:
        if image.format == "PNG" and "exif" not in image.info:
            _read_late_png_exif(image)
        # The PNG plug-in's own method would decode the whole picture to look behind it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (*_UNREADABLE, KeyError, IndexError, TypeError):
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _read_late_png_exif(image: ImageFile.ImageFile) -> None:
    """Find an eXIf chunk that stands behind the pixels of a PNG, by its chunk headers."""
    if image.fp is None:
        return
    position = image.fp.tell()
    try:
        image.fp.seek(8)
        while len(header := image.fp.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                image.info["exif"] = b"Exif\x00\x00" + image.fp.read(length)
                return
            image.fp.seek(length + 4, 1)
    finally:
        image.fp.seek(position)


def _open(path: str | Path) -> ImageFile.ImageFile:
    formats.image_suffixes()  # plug-ins are registered in this process
    return Image.open(path)


def _reason(path: str | Path, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "the image file does not exist"
    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return "the file is empty (0 bytes)"
        missing = formats.missing_plugin(path)
        return missing or "not an image that Pillow can read (wrong content or a damaged header)"
    return f"the image cannot be read ({str(error) or type(error).__name__})"
