"""Images per second of caching latents: this project beside a plain loop of Pillow and the same VAE.

    python benchmarks/caching.py --images 48 --rounds 5

Writes random photographs (JPEG, two shapes), then caches their latents to disk in turn with both programs, several
times. The plain loop opens, resizes and cuts one batch with Pillow, encodes it and writes one npz file per image; ours
loads ahead and writes behind the model, and its files also carry checksums and what they were made from. `--model FILE`
takes a VAE or model of yours, `--device cuda` a GPU. One line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig  # noqa: E402
from library.data.cache import CacheOptions, cache_latents  # noqa: E402
from library.data.dataset import DatasetGroup, build_group  # noqa: E402
from library.data.records import ImageRecord  # noqa: E402
from library.families.base import ModelFamily  # noqa: E402
from library.families.chosen import of_vae  # noqa: E402

SHAPES = ((3, 2), (2, 3))


def save_photographs(folder: Path, count: int, longer_side: int) -> list[Path]:
    """Soft random pictures, which compress about as well as photographs do."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        horizontal, vertical = SHAPES[index % len(SHAPES)]
        longer = max(horizontal, vertical)
        size = longer_side * horizontal // longer, longer_side * vertical // longer
        small = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)
        path = folder / f"p{index:04d}.jpg"
        picture.save(path, quality=92)
        paths.append(path)
    return paths


def make_group(paths: list[Path], family: ModelFamily, resolution: int) -> DatasetGroup:
    """The pictures in buckets around `resolution`."""
    records = []
    for path in paths:
        with Image.open(path) as image:
            records.append(ImageRecord(key=str(path), path=path, caption="", subset_index=0, image_size=image.size))
    dataset = DatasetConfig(
        resolution=(resolution, resolution), subsets=(SubsetConfig(),), enable_bucket=True, min_bucket_reso=64,
        max_bucket_reso=2 * resolution, bucket_reso_steps=64,
    )
    config = DataConfig((dataset,), source="benchmark", from_file=False)
    return build_group(config, [records], spec=family.latent, tokenize=None, seed=0)


def remove_caches(folder: Path) -> None:
    for path in folder.glob("*.npz"):
        path.unlink()


def ours(group: DatasetGroup, family: ModelFamily, batch_size: int, device: str) -> float:
    """Seconds to cache the group."""
    options = CacheOptions(to_disk=True, vae_batch_size=batch_size, vae_identity=family.vae_identity)
    began = time.perf_counter()
    report = cache_latents(group, family.encode_images, spec=family.latent, options=options, device=device)
    seconds = time.perf_counter() - began
    if report.encoded != len(group.datasets[0].records):
        raise RuntimeError(f"not everything was encoded: {report}")
    return seconds


@torch.no_grad()
def plain_loop(group: DatasetGroup, family: ModelFamily, batch_size: int, device: str) -> float:
    """Seconds of a straightforward script for the same buckets, batches and files."""
    began = time.perf_counter()
    by_bucket: dict[tuple[int, int], list[ImageRecord]] = {}
    for record in group.datasets[0].records:
        by_bucket.setdefault(record.bucket_size, []).append(record)
    for (width, height), records in by_bucket.items():
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            images = torch.stack([load(record, width, height) for record in batch]).to(device)
            for record, latents in zip(batch, family.encode_images(images).float().cpu().numpy(), strict=True):
                write(record, latents)
    return time.perf_counter() - began


def load(record: ImageRecord, width: int, height: int) -> torch.Tensor:
    """float32 [3,height,width] in [-1,1]: resized to cover the bucket, cut at the centre."""
    with Image.open(str(record.path)) as image:
        resized = image.convert("RGB").resize(record.resized_size, Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def write(record: ImageRecord, latents: np.ndarray) -> None:
    """The arrays that a training needs."""
    path = Path(str(record.path)).with_suffix(".npz")
    np.savez(path, latents=latents, original_size=np.array(record.image_size), crop_ltrb=np.zeros(4))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both programs in turn, `rounds` times after one round that does not count."""
    family = of_vae(arguments.model, option="--model", dtype=torch.float32, device=arguments.device)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = save_photographs(Path(folder), arguments.images, arguments.longer_side)
        for _ in range(arguments.rounds + 1):
            for name, program in (("plain", plain_loop), ("ours", ours)):
                group = make_group(paths, family, arguments.resolution)
                seconds[name].append(program(group, family, arguments.batch_size, arguments.device))
                remove_caches(Path(folder))
    counted = {name: values[1:] for name, values in seconds.items()}
    ratios = [plain / own for plain, own in zip(counted["plain"], counted["ours"], strict=True)]
    return {
        "images": arguments.images, "batch_size": arguments.batch_size, "resolution": arguments.resolution,
        "longer_side": arguments.longer_side, "device": arguments.device,
        "ours_images_per_s": round(arguments.images / statistics.median(counted["ours"]), 2),
        "plain_images_per_s": round(arguments.images / statistics.median(counted["plain"]), 2),
        "ratio_median": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = ROOT / "tests" / "data" / "golden" / "models" / "sd1_tiny.safetensors"
    parser.add_argument("--model", default=str(tiny), help="VAE or model (default: the tiny one of the tests)")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--longer_side", type=int, default=1536, help="of the pictures, in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where the pictures are written for the time of the run")
    logging.disable(logging.INFO)
    result = measure(parser.parse_args())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    print(json.dumps(result | versions))


if __name__ == "__main__":
    main()
