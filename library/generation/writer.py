"""Image files: their names, and the texts in them that say how an image was drawn."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.checkpoints.tensors import atomic_write
from library.generation.pictures import exif_with_texts
from library.generation.plan import safe_output_path
from library.generation.request import ImageRequest, embedded_guidance
from library.generation.samplers import sampler_name
from library.sampling_spec import SamplingSpec

logger = logging.getLogger(__name__)

_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_NUMBERED = re.compile(r"im_[01]?(\d{6,})\.png")
_QUALITY = 100  # of formats with losses


@dataclass
class Writer:
    """Writes the images of a run below `outdir`; no file of the run takes the place of another one.

    Names: the line's `--f`; else with `keeps_original_names` that of the image it began with; else with
    `is_sequential` the next free number; else time, place in the batch and seed.
    """

    outdir: Path
    is_sequential: bool = False
    keeps_original_names: bool = False
    _written: set[str] = field(default_factory=set)
    _last_number: int | None = None

    def write(self, image: Image.Image, request: ImageRequest, texts: Mapping[str, str], *, index: int) -> Path:
        """The file of one image; `index` is its place in the batch."""
        path = self._path(request, index)
        self._written.add(str(path).casefold())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, path, texts)
        return path

    def _path(self, request: ImageRequest, index: int) -> Path:
        if request.output_name is not None:
            return self._unused(safe_output_path(self.outdir, request.output_name), replaces_old=True)
        if self.keeps_original_names and request.init_image is not None:
            return self._unused(self.outdir / f"{request.init_image.stem}.png")
        if self.is_sequential:
            return self.outdir / f"im_{self._next_number():06d}.png"
        stamp = time.strftime("%Y%m%d%H%M%S")
        return self._unused(self.outdir / f"im_{stamp}_{index:03d}_{request.seed}.png")

    def _next_number(self) -> int:
        """One more than the highest number in the folder and in this run."""
        if self._last_number is None:
            names = (path.name for path in self.outdir.iterdir()) if self.outdir.is_dir() else ()
            found = (_NUMBERED.fullmatch(name) for name in names)
            self._last_number = max((int(match[1]) for match in found if match), default=0)
        self._last_number += 1
        return self._last_number

    def _unused(self, path: Path, *, replaces_old: bool = False) -> Path:
        """`path`, or with `_001`, `_002`... the first free one; `replaces_old`: files of other runs do not count."""
        candidate, number = path, 0
        while str(candidate).casefold() in self._written or (not replaces_old and candidate.exists()):
            number += 1
            candidate = path.with_stem(f"{path.stem}_{number:03d}")
        return candidate


def save_image(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, or another format (by the ending) with the texts in its EXIF data, atomically."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind == "PNG":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)
        with atomic_write(path) as file:
            image.save(file, kind, pnginfo=chunks)
        return
    if kind is None:
        logger.warning("%s: files of this kind cannot hold the prompt", path)
    extra = {"quality": _QUALITY, "exif": exif_with_texts(texts)} if kind else {}
    with atomic_write(path) as file:
        image.save(file, kind or Image.registered_extensions()[path.suffix.lower()], **extra)


def texts_of(request: ImageRequest, spec: SamplingSpec, *, model: str, networks: str) -> dict[str, str]:
    """What a file records about its image: key -> text. `model` is a name, `networks` what `described` gives.

    What had no part in the image (a negative prompt without guidance, another sampler than the flow's) is not recorded.
    """
    is_guided = request.uses_guidance
    texts = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "sampler": sampler_name(request.sampler, spec),
        "steps": str(request.steps),
        "scale": str(request.scale),
        "negative-prompt": request.negative_prompt if is_guided else "",
        "size": f"{request.width}x{request.height}",
        "model": model,
    }
    optional = {
        "guidance": embedded_guidance(request, spec),
        "negative-scale": request.negative_scale if is_guided else None,
        "flow-shift": request.flow_shift if spec.flow_sigmas is not None else None,
        "clip-skip": request.clip_skip,
        "clip-prompt": request.clip_prompt,
        "strength": request.strength,
        "raw-prompt": request.raw_prompt,
        "networks": networks or None,
        "init-image": request.init_image.name if request.init_image else None,
        "mask-image": request.mask_image.name if request.mask_image else None,
        "control-image": request.controlnet_image.name if request.controlnet_image else None,
        **(_size_texts(request) if spec.uses_sizes else {}),
    }
    return texts | {key: str(value) for key, value in optional.items() if value is not None}


def _size_texts(request: ImageRequest) -> dict[str, int]:
    """The sizes that a model is conditioned on."""
    original = request.original_size_hw or (request.height, request.width)
    negative = request.negative_original_size_hw or original
    return {
        "original-height": original[0], "original-width": original[1],
        "original-height-negative": negative[0], "original-width-negative": negative[1],
        "crop-top": request.crop_top_left[0], "crop-left": request.crop_top_left[1],
    }  # fmt: skip
