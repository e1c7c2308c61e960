"""Latents and buckets of a folder of images, prepared before training: `<stem>.npz` files and a metadata file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from library import devices
from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data.cache import CacheOptions, cache_latents
from library.data.dataset import BucketDataset, DatasetGroup, build_group
from library.data.image_files import BadImagesError, list_images, read_image_sizes
from library.data.image_memory import replace_text
from library.data.records import ImageRecord, LatentSpec
from library.families.chosen import of_vae
from library.options.bucket_preparation import BucketPreparationOptions
from library.options.errors import UserError
from library.options.values import read_resolution
from library.train_util import DTYPES

logger = logging.getLogger(__name__)

VAE_STEP, WIDER_STEP = 8, 32  # what sides must be multiples of; the second for models that halve latents twice


def prepare(options: BucketPreparationOptions) -> None:
    """Encode every image of the folder and record its bucket. Raises UserError that says what cannot be used."""
    _check(options)
    metadata = _read_metadata(options.in_json)
    images = _find_images(options)
    device = devices.preferred_device()
    family = of_vae(
        options.model_name_or_path, option="model_name_or_path", dtype=DTYPES[options.mixed_precision], device=device
    )
    group = _group(options, images, family.latent)
    print("training can cache latents by itself (--cache_latents_to_disk); these files are for older ways of working")
    choices = CacheOptions(
        to_disk=True, vae_batch_size=options.batch_size, vae_identity=family.vae_identity, writes_oldest_name=True,
        overwrites=not options.skip_existing,
    )
    with torch.no_grad():
        report = cache_latents(
            group, family.encode_images, spec=family.latent, options=choices, device=device
        )
    print(report)
    for record in group.datasets[0].records:
        metadata.setdefault(record.key, {})["train_resolution"] = list(record.bucket_size)
    replace_text(Path(options.out_json), json.dumps(metadata, indent=2) + "\n")
    _report(group.datasets[0])


def _check(options: BucketPreparationOptions) -> None:
    problems = []
    if options.recursive and not options.full_path:
        problems.append("--recursive needs --full_path: equal names in several folders could not be told apart.")
    if options.bucket_reso_steps < 1 or options.bucket_reso_steps % VAE_STEP:
        problems.append(f"--bucket_reso_steps {options.bucket_reso_steps}: it must be a multiple of {VAE_STEP}.")
    elif options.bucket_reso_steps % WIDER_STEP:
        logger.warning(
            "--bucket_reso_steps %d is no multiple of %d: SDXL cannot train from these files",
            options.bucket_reso_steps, WIDER_STEP,
        )
    if options.batch_size < 1:
        problems.append(f"--batch_size {options.batch_size}: it must be at least 1.")
    if not Path(options.train_data_dir).is_dir():
        problems.append(f"train_data_dir: there is no folder {options.train_data_dir}.")
    if not Path(options.in_json).is_file():
        problems.append(f"in_json: there is no file {options.in_json}.")
    try:
        read_resolution(options.max_resolution)
    except ValueError as error:
        problems.append(f"--max_resolution: {error}.")
    if problems:
        raise UserError(problems)


def _read_metadata(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(f"{path}: the metadata file must hold one object whose keys are the images")
    return content


def _find_images(options: BucketPreparationOptions) -> list[str]:
    folders = [options.train_data_dir]
    if options.recursive:
        folders = sorted(folder for folder, _, _ in os.walk(options.train_data_dir))
    found = [path for folder in folders for path in list_images(folder)]
    if not found:
        raise UserError(f"train_data_dir: there are no images in {options.train_data_dir}.")
    return found


def _group(options: BucketPreparationOptions, images: Sequence[str], spec: LatentSpec) -> DatasetGroup:
    sizes, bad = read_image_sizes(images)
    if bad:
        raise BadImagesError(bad)
    records = [
        ImageRecord(
            key=path if options.full_path else Path(path).stem, path=Path(os.path.abspath(path)), caption="",
            subset_index=0, image_size=sizes[path],
        )
        for path in images
    ]
    subset = SubsetConfig(flip_aug=options.flip_aug, alpha_mask=options.alpha_mask)
    dataset = DatasetConfig(
        resolution=read_resolution(options.max_resolution), subsets=(subset,), enable_bucket=True,
        min_bucket_reso=options.min_bucket_reso, max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps, bucket_no_upscale=options.bucket_no_upscale,
    )
    config = DataConfig((dataset,), source=options.train_data_dir, from_file=False)
    return build_group(config, [records], spec=spec, tokenize=None, seed=0)


def _report(dataset: BucketDataset) -> None:
    statistics = dataset.bucket_statistics() or {}
    for bucket in statistics["buckets"].values():
        width, height = bucket["resolution"]
        print(f"bucket {width}x{height}: {bucket['count']} image(s)")
    print(f"mean error of the aspect ratio: {statistics['mean_img_ar_error']:.6f}")
