"""The built-in example: teach the tiny Stable Diffusion a shape it has never seen, and show the difference.

    python quickstart.py

Writes pictures, the LoRA, a before/after grid, the loss curve and the judge's scores to demo/output/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

OUTPUT = ROOT / "demo" / "output"
TRAINING = "demo/config/star_training.toml"
STAR_PICTURES, KNOWN_PICTURES = 12, 108
STAR_SEEDS, KNOWN_SEEDS = (1, 2, 3), (1,)
STEPS, SCALE, SAMPLER = 20, 3.0, "ddim"


@dataclass(frozen=True)
class Score:
    """Shares (0..1) that the judge counts: stars on star prompts, everything right on known prompts."""

    stars: float
    known: float


def main() -> int:
    """Make pictures, draw, train, draw again, compare."""
    parser = argparse.ArgumentParser(description="Teach the tiny model a star and show the difference.")
    parser.add_argument("--cpu", action="store_true", help="use the processor even if there is a GPU")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    started = time.monotonic()
    write_training_pictures()
    print("Drawing with the base model ...", flush=True)
    before = draw_all(None, cpu=arguments.cpu)
    print("Training a LoRA on a dozen pictures of a star ...", flush=True)
    lora = train_lora(cpu=arguments.cpu)
    print("Drawing with the LoRA ...", flush=True)
    after = draw_all(lora, cpu=arguments.cpu)
    scores = {"before": score(before), "after": score(after)}
    write_results(before, after, scores)
    report(scores, time.monotonic() - started)
    return 0


def star_prompts() -> list[str]:
    """Prompts for the new word, every colour on every background."""
    from shapes import BACKGROUNDS, COLOURS

    return [f"a {colour} sks star on a {background} background" for colour in COLOURS for background in BACKGROUNDS]


def known_prompts() -> list[str]:
    """Prompts for everything that the base model was trained on."""
    from shapes import KNOWN_SHAPES, combinations

    known = combinations(KNOWN_SHAPES)
    return [f"a {colour} {shape} on a {background} background" for shape, colour, background in known]


def write_training_pictures() -> None:
    """The pictures of the new concept and of what is known, with their caption files."""
    from shapes import write_pictures

    write_pictures(OUTPUT / "star_pictures", "star", STAR_PICTURES)
    write_pictures(OUTPUT / "known_pictures", "known", KNOWN_PICTURES, seed=77)


def train_lora(*, cpu: bool) -> Path:
    """Run train_network.py as a user would; returns the LoRA file."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads,
               *(["--cpu"] if cpu else []), "train_network.py", "--config_file", TRAINING]  # fmt: skip
    print("$ accelerate launch", *command[command.index("--num_cpu_threads_per_process"):], flush=True)
    subprocess.run(command, check=True)
    with open(TRAINING, "rb") as file:
        output = tomllib.load(file)["output"]
    return ROOT / output["output_dir"] / f"{output['output_name']}.safetensors"


def draw_all(lora: Path | None, *, cpu: bool) -> dict[str, list[Any]]:
    """Prompt -> its pictures (one per seed), by the project's own engine, with or without the LoRA."""
    import torch

    from library.families.sd import StableDiffusion
    from library.generation.engine import draw
    from library.generation.request import ImageRequest
    from library.options import make_options
    from networks import contract

    with open(TRAINING, "rb") as file:
        model = tomllib.load(file)["model"]
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    family = StableDiffusion(make_options(**model))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device=device)
    if lora is not None:
        models = contract.HostModels(family.vae, family.network_text_encoders(), family.denoiser)
        network, _ = contract.create_for_generation("networks.lora", lora, models)
        contract.apply(network, models, True, True)
        contract.load_weights(network, lora)
        network.to(device)
    seeds = dict.fromkeys(star_prompts(), STAR_SEEDS) | dict.fromkeys(known_prompts(), KNOWN_SEEDS)
    requests = [
        ImageRequest(prompt, width=64, height=64, steps=STEPS, scale=SCALE, sampler=SAMPLER, seed=seed)
        for prompt in seeds for seed in seeds[prompt]
    ]  # fmt: skip
    pictures = iter(draw(family, requests, device=device, dtype=torch.float32, batch_size=36))
    return {prompt: [next(pictures) for _ in chosen] for prompt, chosen in seeds.items()}


def score(pictures: dict[str, list[Any]]) -> Score:
    """What the judge says about all pictures."""
    from judge import agrees, judge

    stars = [judge(picture).shape == "star" for prompt in star_prompts() for picture in pictures[prompt]]
    known = [agrees(judge(picture), prompt) for prompt in known_prompts() for picture in pictures[prompt]]
    return Score(sum(stars) / len(stars), sum(known) / len(known))


def write_results(before: dict[str, list[Any]], after: dict[str, list[Any]], scores: dict[str, Score]) -> None:
    """The grid, the loss curve and the scores."""
    import numpy as np
    from grid import loss_chart, picture_grid

    rows = star_prompts()[::2] + known_prompts()[::6]
    pictures, labels = [], []
    for prompt in rows:
        for title, drawn in (("before", before), ("after", after)):
            pictures.append(np.asarray(drawn[prompt][0]))
            labels.append(f"{title}: {prompt.removeprefix('a ').removesuffix(' background')}")
    picture_grid(pictures, 6, labels, zoom=3, gap=8).save(OUTPUT / "before_after.png")
    loss_chart({"loss": read_losses(OUTPUT / "logs")}, window=25).save(OUTPUT / "loss.png")
    text = json.dumps({name: vars(value) for name, value in scores.items()}, indent=2)
    (OUTPUT / "scores.json").write_text(text, encoding="utf-8")


def read_losses(logs: Path) -> Sequence[tuple[float, float]]:
    """(step, loss) of the newest TensorBoard run below `logs`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(logs.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest.parent), size_guidance={"scalars": 0})
    events.Reload()
    return [(float(event.step), float(event.value)) for event in events.Scalars("loss/current")]


def report(scores: dict[str, Score], seconds: float) -> None:
    """Say what happened and where everything is."""
    before, after = scores["before"], scores["after"]
    print(
        f"\nStars on star prompts:   {before.stars:4.0%} before, {after.stars:4.0%} after"
        f"\nKnown prompts all right: {before.known:4.0%} before, {after.known:4.0%} after"
        f"\nTook {seconds / 60:.1f} minutes. Look at:"
    )
    for name in ("before_after.png", "loss.png", "scores.json", "star_lora.safetensors", "star_pictures"):
        print(f"  {OUTPUT / name}")


if __name__ == "__main__":
    sys.exit(main())
