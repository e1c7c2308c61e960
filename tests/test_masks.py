"""Masks follow their picture to the pixel: through resize, crop, random crop, face crop and flip, cached or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config_schema import INTERPOLATIONS, SubsetConfig, SupportedKinds
from library.config_util import load_data_config
from library.data.cache import CacheOptions, cache_latents
from library.data.dataset import DatasetGroup, build_group
from library.data.discovery import discover_all
from library.data.loader import BatchLoader
from library.data.records import Batch
from library.options import make_options
from tests.picture_folder import SPEC, dataset_config, encode, group_of, records_of, tokenize

SIZES = {"square": (200, 200), "wide": (320, 180), "tall": (120, 360), "exact": (128, 128), "photo": (300, 200)}


def noise(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    return np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def masked_folder(folder: Path) -> None:
    """Pictures and their masks, equal to the pixel but for their ending; one pair is turned by its EXIF orientation."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for place, ending in (("images", "png"), ("masks", "bmp")):
        (folder / place).mkdir()
        for name, size in SIZES.items():
            Image.fromarray(noise(size)).save(folder / place / f"{name}.{ending}")
        Image.fromarray(noise((256, 128))).save(folder / place / "turned [1] é.png", exif=turned)


def configured_group(folder: Path, *, dataset: str = "", subset: str = "") -> DatasetGroup:
    """What `--masked_loss` trains on, from a dataset file."""
    (folder / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = [160, 128]\nbatch_size = 2\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
        f"{dataset}\n[[datasets.subsets]]\nimage_dir = {str(folder / 'images')!r}\n"
        f"conditioning_data_dir = {str(folder / 'masks')!r}\nflip_aug = true\n{subset}\n", encoding="utf-8",
    )  # fmt: skip
    options = make_options(dataset_config=str(folder / "dataset.toml")).dataset
    config = load_data_config(options, SupportedKinds(controlnet=True), bucket_step=8)
    records = [parts.training for parts in discover_all(config)]
    return build_group(config, records, spec=SPEC, tokenize=tokenize, seed=3)


def batches_of(group: DatasetGroup, epochs: int = 3) -> list[Batch]:
    batches = [batch for epoch in range(1, epochs + 1) for batch in BatchLoader(group).epoch(epoch)]
    assert {flipped for batch in batches for flipped in batch.flippeds} == {True, False}
    return batches


def red(batch: Batch) -> Tensor:
    """The red channel in [0,1], as masks are."""
    assert batch.images is not None
    return batch.images[:, 0] / 2 + 0.5


@pytest.mark.parametrize(
    "dataset",
    [
        "enable_bucket = true\nbucket_reso_steps = 64", "enable_bucket = true\nbucket_no_upscale = true",
        "enable_bucket = false",
        *(f'enable_bucket = true\nresize_interpolation = "{name}"' for name in INTERPOLATIONS),
    ],
)
def test_mask_images_lie_on_their_pictures(tmp_path, dataset):
    masked_folder(tmp_path)
    seen = 0
    for batch in batches_of(configured_group(tmp_path, dataset=dataset)):
        assert torch.equal(batch.conditioning_images, batch.images)
        seen += len(batch)
    assert seen == 3 * 6


def test_colours_change_in_the_picture_only(tmp_path):
    masked_folder(tmp_path)
    settings = "enable_bucket = true"
    plain = batches_of(configured_group(tmp_path, dataset=settings))
    coloured = batches_of(configured_group(tmp_path, dataset=settings, subset="color_aug = true"))
    changed = 0
    for one, other in zip(plain, coloured, strict=True):
        assert one.image_keys == other.image_keys and one.flippeds == other.flippeds
        assert torch.equal(one.conditioning_images, other.conditioning_images)
        changed += not torch.equal(one.images, other.images)
    assert changed > 0


def test_masks_of_cached_latents_lie_where_those_of_pixels_do(tmp_path):
    masked_folder(tmp_path)
    settings = "enable_bucket = true\nbucket_no_upscale = true"
    with_pixels, cached = configured_group(tmp_path, dataset=settings), configured_group(tmp_path, dataset=settings)
    cache_latents(cached, encode, spec=SPEC, options=CacheOptions())
    for one, other in zip(batches_of(with_pixels), batches_of(cached), strict=True):
        assert other.images is None and one.image_keys == other.image_keys and one.flippeds == other.flippeds
        assert torch.equal(one.conditioning_images, other.conditioning_images)
        assert torch.allclose(encode(one.images), other.latents, atol=1e-6)


def test_grey_masks_weigh_all_channels_alike(tmp_path):
    masked_folder(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        with Image.open(path) as image:
            exif, grey = image.getexif(), image.convert("L")
        grey.save(path, **({"exif": exif} if path.suffix == ".png" else {}))
    for batch in batches_of(configured_group(tmp_path, dataset="enable_bucket = true"), epochs=2):
        values = batch.conditioning_images
        assert torch.equal(values[:, 0], values[:, 1]) and torch.equal(values[:, 0], values[:, 2])
        assert values.min() < -0.5 and values.max() > 0.5


# --- alpha channels -------------------------------------------------------------------------------------------
def alpha_equals_red(path: Path, size: tuple[int, int]) -> Path:
    """A picture whose transparency repeats its red channel."""
    pixels = noise(size, 4)
    pixels[..., 3] = pixels[..., 0]
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("settings", "is_bucketed"),
    [({}, True), ({"random_crop": True}, True), ({"random_crop": True}, False), ({}, False)],
)
def test_alpha_masks_follow_crop_and_flip(tmp_path, settings, *, is_bucketed):
    paths = [alpha_equals_red(tmp_path / f"{name}.png", size) for name, size in SIZES.items()]
    subset = SubsetConfig(alpha_mask=True, flip_aug=True, **settings)
    group = group_of((dataset_config(subset, enable_bucket=is_bucketed), records_of(paths)))
    crops = set()
    for batch in batches_of(group, epochs=4):
        assert batch.alpha_masks.shape == batch.images.shape[:1] + batch.images.shape[2:]
        assert torch.allclose(batch.alpha_masks, red(batch), atol=1e-6)
        crops |= {mask.sum().item() for mask in batch.alpha_masks}
    assert len(crops) > 2 * len(paths) if settings else len(crops) >= len(paths)


def test_alpha_masks_follow_a_face_crop(tmp_path):
    path = alpha_equals_red(tmp_path / "girl_150_120_80_60.png", (300, 280))
    subset = SubsetConfig(alpha_mask=True, flip_aug=True, face_crop_aug_range=(1.0, 3.0), random_crop=True)
    group = group_of((dataset_config(subset, enable_bucket=False), records_of([path], num_repeats=6)))
    sums = set()
    for batch in batches_of(group):
        assert torch.allclose(batch.alpha_masks, red(batch), atol=1e-6)
        sums |= {mask.sum().item() for mask in batch.alpha_masks}
    assert len(sums) > 6


def test_colours_leave_alpha_masks_alone(tmp_path):
    path = alpha_equals_red(tmp_path / "a.png", (200, 160))
    groups = [
        group_of((dataset_config(SubsetConfig(alpha_mask=True, flip_aug=True, color_aug=coloured), batch_size=1),
                  records_of([path], num_repeats=12)))
        for coloured in (False, True)
    ]  # fmt: skip
    pairs = list(zip(batches_of(groups[0], 1), batches_of(groups[1], 1), strict=True))
    assert all(torch.equal(one.alpha_masks, other.alpha_masks) for one, other in pairs)
    assert 0 < sum(not torch.equal(one.images, other.images) for one, other in pairs) < 12
