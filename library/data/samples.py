"""One image record becomes one sample: load, resize, cut, augment and flip, or fetch cached latents."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.config_schema import DatasetConfig, SubsetConfig
from library.data import augmentation, images
from library.data.buckets import Size, crop_ltrb, crop_offset, crop_top_left
from library.data.cache_files import Entry, LatentSample, Terms, read
from library.data.images import ImageError
from library.data.records import ImageRecord, LatentSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """Everything of one batch entry but its text. Sizes are (height, width) as in the batch."""

    original_size_hw: Size
    crop_top_left: tuple[int, int]
    target_size_hw: Size
    is_flipped: bool
    image: Tensor | None  # float32 [3,H,W] in [-1,1]
    latents: Tensor | None  # [C,h,w]; one of the two is set
    alpha_mask: Tensor | None  # float32 [H,W] in [0,1]
    conditioning_image: Tensor | None  # float32 [3,H,W] in [-1,1]


class SampleMaker:
    """Makes the samples of one dataset. `is_augmented` false: centre crops, no flips, no colour changes."""

    def __init__(self, config: DatasetConfig, spec: LatentSpec, *, is_augmented: bool) -> None:
        self._config = config
        self._spec = spec
        self._is_augmented = is_augmented
        self.cache_terms = Terms()
        self._transparency_reported: set[int] = set()

    def is_flippable(self, subset: SubsetConfig) -> bool:
        """Whether samples of the subset may be mirrored."""
        return self._is_augmented and subset.flip_aug

    def latent_entry(self, record: ImageRecord, path: Path) -> Entry:
        """What the cache file `path` must hold for the record under `cache_terms`."""
        subset = self._config.subsets[record.subset_index]
        return Entry.of(
            record, path, self._spec, self.cache_terms, interpolation=subset.resize_interpolation,
            wants_flipped=self.is_flippable(subset), wants_mask=subset.alpha_mask,
        )

    def make(self, record: ImageRecord, rng: random.Random) -> Sample:
        """The sample of a record. Draws: flip, then crop, then colour, each only where its option is on.

        Raises ImageError or CacheError naming the file.
        """
        subset = self._config.subsets[record.subset_index]
        is_flipped = self.is_flippable(subset) and rng.random() < 0.5
        if record.latents is not None or record.latents_path is not None:
            return self._from_latents(record, subset, rng, is_flipped=is_flipped)
        return self._from_image(record, subset, rng, is_flipped=is_flipped)

    def pixels(self, record: ImageRecord) -> np.ndarray:
        """uint8 [H,W,3 or 4] in the bucket's size, centre crop, unflipped: what is encoded for a cache."""
        subset = self._config.subsets[record.subset_index]
        resized = images.resize(self._load(record, subset), record.resized_size, subset.resize_interpolation)
        return images.crop(resized, crop_offset(record.resized_size, record.bucket_size), record.bucket_size)

    def _from_latents(
        self, record: ImageRecord, subset: SubsetConfig, rng: random.Random, *, is_flipped: bool
    ) -> Sample:
        cached = self._cached(record, is_flipped=is_flipped)
        height, width = (side * self._spec.downsample for side in cached.latents.shape[1:])
        offset = crop_offset(record.resized_size, record.bucket_size)
        return Sample(
            original_size_hw=(cached.original_size[1], cached.original_size[0]),
            crop_top_left=crop_top_left(cached.crop_ltrb, width, is_flipped=is_flipped),
            target_size_hw=(height, width), is_flipped=is_flipped, image=None, latents=cached.latents,
            alpha_mask=_mirrored(cached.alpha_mask, is_flipped=is_flipped),
            conditioning_image=self._conditioning(record, offset, is_flipped=is_flipped),
        )

    def _cached(self, record: ImageRecord, *, is_flipped: bool) -> LatentSample:
        if record.latents is not None:
            return record.latents.sample(is_flipped=is_flipped)
        assert record.latents_path is not None
        return read(self.latent_entry(record, record.latents_path), is_flipped=is_flipped)

    def _from_image(
        self, record: ImageRecord, subset: SubsetConfig, rng: random.Random, *, is_flipped: bool
    ) -> Sample:
        pixels, offset = self._cut(record, subset, rng)
        if self._is_augmented and subset.color_aug:
            pixels = augmentation.augment_colors(pixels, rng)
        if is_flipped:
            pixels = pixels[:, ::-1]
        height, width = pixels.shape[:2]
        ltrb = crop_ltrb(record.image_size, record.bucket_size)
        return Sample(
            original_size_hw=(record.image_size[1], record.image_size[0]),
            crop_top_left=crop_top_left(ltrb, width, is_flipped=is_flipped), target_size_hw=(height, width),
            is_flipped=is_flipped, image=images.to_tensor(pixels), latents=None,
            alpha_mask=images.alpha_mask(pixels) if subset.alpha_mask else None,
            conditioning_image=self._conditioning(record, offset, is_flipped=is_flipped),
        )

    def _cut(
        self, record: ImageRecord, subset: SubsetConfig, rng: random.Random
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels in the bucket's size, and the (left, top) they were cut at."""
        pixels = self._load(record, subset)
        face_range = subset.face_crop_aug_range if self._is_augmented else None
        face = augmentation.face_from_name(record.path) if face_range and record.path else None
        if face and face_range:
            face_crop = augmentation.FaceCrop(*face_range, subset.random_crop, subset.resize_interpolation)
            try:
                return face_crop(pixels, face, record.bucket_size, rng), (0, 0)
            except ValueError as error:
                raise ImageError(record.path or record.key, str(error)) from error
        pixels = images.resize(pixels, record.resized_size, subset.resize_interpolation)
        if self._is_augmented and subset.random_crop:
            offset = augmentation.random_crop_offset(record.resized_size, record.bucket_size, rng)
        else:
            offset = crop_offset(record.resized_size, record.bucket_size)
        return images.crop(pixels, offset, record.bucket_size), offset

    def _load(self, record: ImageRecord, subset: SubsetConfig) -> np.ndarray:
        if record.path is None:
            reason = "there is no image file, only a latent cache; train with --cache_latents_to_disk"
            raise ImageError(record.key, reason)
        pixels, is_transparent = images.load_image_and_transparency(record.path, alpha=subset.alpha_mask)
        size = pixels.shape[1], pixels.shape[0]
        if size != record.image_size:
            raise ImageError(
                record.path,
                f"the image is {size[0]}x{size[1]} (upright), but {record.image_size[0]}x{record.image_size[1]} is "
                "recorded for it. Correct the recorded size, or start again if the file was edited.",
            )
        if is_transparent and not subset.alpha_mask:
            self._report_transparency(record, subset)
        return pixels

    def _report_transparency(self, record: ImageRecord, subset: SubsetConfig) -> None:
        worker = torch.utils.data.get_worker_info()
        if record.subset_index in self._transparency_reported or (worker is not None and worker.id > 0):
            return
        self._transparency_reported.add(record.subset_index)
        logger.warning(
            "%s has transparency (%s): it is discarded and the colours behind it are trained; "
            "alpha_mask = true uses it as a loss mask", record.path, subset.location or "subset",
        )

    def _conditioning(self, record: ImageRecord, offset: tuple[int, int], *, is_flipped: bool) -> Tensor | None:
        if record.conditioning_path is None:
            return None
        pixels = images.load_image(record.conditioning_path)
        size = pixels.shape[1], pixels.shape[0]
        if self._config.enable_bucket and size != record.image_size:
            raise ImageError(
                record.conditioning_path,
                f"size of conditioning image is not match: it is {size[0]}x{size[1]}, its "
                f"image {record.path} is {record.image_size[0]}x{record.image_size[1]}. With enable_bucket both must "
                "have the same size.",
            )
        pixels = images.resize(pixels, record.resized_size, self._config.resize_interpolation)
        pixels = images.crop(pixels, offset, record.bucket_size)
        return images.to_tensor(pixels[:, ::-1] if is_flipped else pixels)


def _mirrored(mask: Tensor | None, *, is_flipped: bool) -> Tensor | None:
    return mask.flip(-1) if mask is not None and is_flipped else mask
