"""Draws the same prompts with every sampler, one row each: the picture in docs/gen_img.md.

    python demo/sampler_grid.py --output docs/samplers.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from grid import picture_grid  # noqa: E402

from library.families.sd import StableDiffusion  # noqa: E402
from library.generation.engine import draw  # noqa: E402
from library.generation.request import ImageRequest  # noqa: E402
from library.generation.samplers import SAMPLERS  # noqa: E402
from library.options import make_options  # noqa: E402

PROMPTS = (
    "a red circle on a white background", "a yellow square on a black background",
    "a green triangle on a grey background", "a cyan circle on a black background",
    "a blue square on a white background", "a purple triangle on a white background",
)  # fmt: skip


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description="Draw the same prompts with every sampler.")
    parser.add_argument("--model", default=str(ROOT / "demo" / "model" / "shapes_sd15.safetensors"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = StableDiffusion(make_options(pretrained_model_name_or_path=arguments.model))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device=device)
    names = [name for name in SAMPLERS if not name.startswith("k_")]  # those are other names of the same samplers
    pictures, labels = [], []
    for name in names:
        requests = [
            ImageRequest(prompt, width=64, height=64, steps=arguments.steps, scale=3.0, sampler=name, seed=seed)
            for seed, prompt in enumerate(PROMPTS)
        ]
        drawn = draw(family, requests, device=device, dtype=torch.float32, batch_size=len(requests))
        pictures += [np.asarray(picture) for picture in drawn]
        labels += [name, *[""] * (len(drawn) - 1)]
    picture_grid(pictures, len(PROMPTS), labels, zoom=2, gap=4).save(arguments.output)


if __name__ == "__main__":
    main()
