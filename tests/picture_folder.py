"""Small folders of pictures, and dataset groups over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data.dataset import DatasetGroup, build_group
from library.data.records import ImageRecord, LatentSpec

SPEC = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=0.18215, shift=0.0, cache_suffix="_sd.npz")
SIZED_SPEC = LatentSpec(
    channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd3.npz", cache_keys_have_size=True
)
SIZES = ((128, 128), (160, 150), (200, 220), (256, 64), (300, 80))


def tokenize(captions: Sequence[str]) -> dict[str, Tensor]:
    """Stands in for a family's tokenizer: the character codes of the first eight letters."""
    return {"ids": torch.tensor([[ord(letter) for letter in caption.ljust(8)[:8]] for caption in captions])}


def encode(images: Tensor) -> Tensor:
    """Stands in for a VAE: [B,3,H,W] -> [B,4,H/8,W/8], deterministic, and different for mirrored images."""
    pooled = torch.nn.functional.avg_pool2d(images.float(), 8)
    return torch.cat([pooled, pooled[:, :1] * 2], dim=1)


def save_pictures(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Path]:
    """`a0.png`, `a1.png`, ...: random pixels of the given sizes (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    paths = []
    for index, (width, height) in enumerate(sizes):
        path = folder / f"a{index}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def records_of(paths: Sequence[Path], **settings: Any) -> list[ImageRecord]:
    """One record per picture, captioned by its stem and some tags."""
    records = []
    for path in paths:
        with Image.open(path) as image:
            size = image.size
        records.append(
            ImageRecord(
                **({"key": str(path), "path": path, "caption": f"{path.stem}, red, green, blue", "subset_index": 0,
                    "image_size": size} | settings)
            )
        )
    return records


def dataset_config(subset: SubsetConfig | None = None, **settings: Any) -> DatasetConfig:
    """Resolution 128, buckets of 64 to 256 in steps of 64, batches of two."""
    defaults: dict[str, Any] = {
        "resolution": (128, 128), "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256,
    }
    return DatasetConfig(subsets=(subset or SubsetConfig(),), **(defaults | settings))


def group_of(
    *datasets: tuple[DatasetConfig, Sequence[ImageRecord]], spec: LatentSpec = SPEC, seed: int = 11, **settings: Any
) -> DatasetGroup:
    """A group over the given datasets with the stand-in tokenizer."""
    config = DataConfig(tuple(dataset for dataset, _ in datasets), source="test.toml", from_file=True)
    records = [found for _, found in datasets]
    return build_group(config, records, spec=spec, seed=seed, **({"tokenize": tokenize} | settings))
