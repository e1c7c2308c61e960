"""Seconds and memory between a dataset file and the first batch, on many small pictures: first and second start.

    python benchmarks/startup.py --images 100000

Makes a folder of that many JPEG, PNG and WebP pictures (hard links to some hundred different ones, between 200 and 400
pixels) with a caption each, and starts twice, each time in a process of its own: read the dataset file, find images and
captions, read sizes, make buckets, decode every file once, count tags, and fetch one batch. The import of libraries is
not counted; `--profile` lists where the second start spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DISTINCT = 240  # different pictures: few enough to be made quickly, many enough for the limit of links per file
WORDS = [f"tag {number}" for number in range(2000)]


def make_folder(folder: Path, count: int) -> None:
    """`count` pictures `000000.jpg`, ... with a `.txt` caption each."""
    import numpy as np
    from PIL import Image

    rng, noise = random.Random(0), np.random.default_rng(0)
    originals = folder / "originals"
    pictures = folder / "pictures"
    originals.mkdir(parents=True)
    pictures.mkdir()
    for number in range(DISTINCT):
        size = rng.choice([200, 250, 300, 400]), rng.choice([200, 250, 300, 400])
        colours = noise.integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        ending = ("jpg", "jpg", "png", "webp")[number % 4]
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(originals / f"{number}.{ending}")
        (originals / f"{number}.txt").write_text(", ".join(rng.sample(WORDS, 15)), encoding="utf-8")
    files = {path.stem: path for path in originals.iterdir() if path.suffix != ".txt"}
    for number in range(count):
        original = files[str(number % DISTINCT)]
        os.link(original, pictures / f"{number:06d}{original.suffix}")
        os.link(original.with_suffix(".txt"), pictures / f"{number:06d}.txt")
    (folder / "dataset.toml").write_text(
        "[general]\ncaption_extension = '.txt'\nshuffle_caption = true\nenable_bucket = true\n"
        "[[datasets]]\nresolution = 512\nbatch_size = 4\nmax_bucket_reso = 1024\n"
        f"[[datasets.subsets]]\nimage_dir = '{pictures.as_posix()}'\nflip_aug = true\n",
        encoding="utf-8",
    )


def start(config: Path, *, is_profiled: bool) -> dict[str, Any]:
    """One start in this process: {phase: seconds, "total": seconds, "peak MiB": peak of the process}; see `clock`."""
    import torch

    from library import metadata, training_loop
    from library.config_util import SupportedKinds
    from library.data.loader import BatchLoader
    from library.data.records import LatentSpec
    from library.options import make_options

    spec = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd.npz")
    method = SimpleNamespace(
        family=SimpleNamespace(latent=spec), bucket_step=64, caption_replacements={},
        tokenize=lambda captions: {"ids": torch.zeros(len(captions), 1, 77, dtype=torch.int64)},
    )
    phases: dict[str, Any] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            phases[name] = clock(begun, begun_cpu)
            return result

        return call

    for name in ("load_data_config", "discover_all", "build_group", "check_images"):
        setattr(training_loop, name, timed(name, getattr(training_loop, name)))
    options = make_options(dataset_config=str(config), max_data_loader_n_workers=2)
    before, profile = peak_memory(), cProfile.Profile()
    if is_profiled:
        profile.enable()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    group = training_loop.load_data(options, method, SupportedKinds(), 1, is_main_process=True)
    timed("tag_frequencies", lambda: [metadata.tag_frequencies(dataset) for dataset in group.datasets])()
    timed("first batch", lambda: next(BatchLoader(group, num_workers=2).epoch(1)))()
    total = clock(begun, begun_cpu)
    if is_profiled:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    memory = {"peak MiB": round(peak_memory()), "of which before": round(before)}
    return phases | {"total": total, "images": group.num_train_images} | memory


def clock(begun: float, begun_cpu: float) -> str:
    """Seconds since then, and those that the process computed: on a busy machine the second number says more."""
    return f"{time.perf_counter() - begun:.2f} s (CPU {time.process_time() - begun_cpu:.2f} s)"


def peak_memory() -> float:
    """MiB, the largest that this process has been."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    """Make the folder, start twice, print one JSON line per start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", help="where to make the pictures (default: a temporary folder, removed afterwards)")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(Path(arguments.start), is_profiled=arguments.profile)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_folder(folder, arguments.images)
        print(f"{arguments.images} images, Python {platform.python_version()}, {os.cpu_count()} CPUs", flush=True)
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        for label in ("first start", "second start"):
            words = [sys.executable, __file__, "--start", str(folder / "dataset.toml")]
            words += ["--profile"] if arguments.profile and label == "second start" else []
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            print(f"{label}: {done.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
