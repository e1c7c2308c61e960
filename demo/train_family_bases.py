"""Makes the demo's SDXL, SD3 and FLUX.1 models: VAE, untrained checkpoints, pictures; the training scripts do the rest.

    python demo/train_family_bases.py vae --minutes 24           # the VAE of SD3 and FLUX.1, from nothing
    python demo/train_family_bases.py prepare                    # untrained models, tokenizers and training pictures
    accelerate launch sdxl_train.py --config_file demo/config/sdxl_base.toml
    accelerate launch flux_train.py --config_file demo/config/flux_base.toml
    accelerate launch sd3_train.py --config_file demo/config/sd3_base.toml
    python demo/train_family_bases.py judge sdxl                 # draw every known prompt and judge

`judge` looks at the models in demo/model, or with --model at another file.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO), str(DEMO.parent)]

import family_models  # noqa: E402
import shapes  # noqa: E402
from base_captions import meaningless_words, training_caption  # noqa: E402
from base_tokenizer import WORDS  # noqa: E402
from base_vae import VaeSettings, build_wide_vae, held_out_psnr, to_tensor, train_vae  # noqa: E402
from grid import picture_grid  # noqa: E402
from judge import judge  # noqa: E402
from training_tools import save_state  # noqa: E402

WORK = DEMO / "work" / "families"
MODEL = DEMO / "model"
PICTURES = DEMO / "output" / "base_pictures"
EMPTY_SHARE = 0.1  # pictures without a caption, which guidance needs

logger = logging.getLogger("train_family_bases")


@dataclass(frozen=True)
class Base:
    """How a base is drawn: its family, its training options' file, its trained file, guidance and steps."""

    family: str
    config: str
    file: str
    scale: float
    steps: int = 25
    sampler: str = "euler"


BASES = {
    "sdxl": Base("library.families.sdxl:StableDiffusionXL", "sdxl_base.toml", "shapes_sdxl.safetensors", 3.0),
    "sd3": Base("library.families.sd3:StableDiffusion3", "sd3_base.toml", "shapes_sd3.safetensors", 3.0),
    "flux": Base("library.families.flux:Flux", "flux_base.toml", "shapes_flux.safetensors", 3.0),
}


def make_vae(minutes: float, decoder_minutes: float) -> None:
    """Train the VAE with 16 latent channels, then its decoder alone, which moves no latents."""
    WORK.mkdir(parents=True, exist_ok=True)
    cpu, path = torch.device("cpu"), WORK / "vae_trained.pt"
    if minutes:
        vae = train_vae(VaeSettings(minutes=minutes, kl_weight=1.5e-2), WORK, cpu, start=build_wide_vae())
        save_state(path, model=vae.state_dict())
    if decoder_minutes:
        vae = build_wide_vae()
        vae.load_state_dict(torch.load(path, weights_only=True)["model"])
        polish = VaeSettings(minutes=decoder_minutes, learning_rate=5e-4, decoder_only=True, seed=7)
        vae = train_vae(polish, WORK, cpu, start=vae)
        save_state(path, model=vae.state_dict())
    logger.info("PSNR on held-out pictures %s", held_out_psnr(vae))


def load_vae(scale: float, pictures: torch.Tensor) -> Any:
    """The trained VAE with 16 channels, its latents of variance 1 after `scale`."""
    vae = build_wide_vae().eval()
    vae.load_state_dict(torch.load(WORK / "vae_trained.pt", weights_only=True)["model"])
    family_models.scale_latents(vae, scale, pictures)
    return vae


def prepare(count: int) -> None:
    """Untrained models, tokenizers and text encoders, and `count` pictures with captions."""
    torch.manual_seed(0)
    statistics = to_tensor([shapes.known_picture(index)[0] for index in range(1024)])
    pieces = family_models.write_tokenizers(MODEL / "tokenizers", MODEL / "tokenizer")
    checkpoint = MODEL / "shapes_sd15.safetensors"
    family_models.write_text_encoders(MODEL, checkpoint, pieces)
    family_models.write_sdxl(WORK / "sdxl_start.safetensors", checkpoint)
    family_models.write_flux(
        WORK / "flux_start.safetensors", MODEL / "shapes_ae.safetensors", load_vae(0.3611, statistics)
    )
    family_models.write_sd3(WORK / "sd3_start.safetensors", load_vae(1.5305, statistics))
    write_pictures(count)


def write_pictures(count: int) -> None:
    """Known shapes, every combination equally often; captions in several word orders, some empty."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    triples, strange, rng = shapes.combinations(), meaningless_words(WORDS), random.Random(5)
    for index in range(count):
        picture, scene = shapes.known_picture(index, combination=triples[index % len(triples)])
        path = PICTURES / f"{index:05d}.png"
        Image.fromarray(picture).save(path)
        caption = "" if rng.random() < EMPTY_SHARE else training_caption(scene, rng, strange)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def draw_known(base: Base, model: Path, rounds: int, scale: float) -> list[tuple[tuple[str, str, str], Image.Image]]:
    """Every known combination `rounds` times, drawn by our own engine."""
    from library.generation.engine import draw
    from library.generation.request import ImageRequest
    from library.launch import resolve
    from library.options import make_options

    with open(DEMO / "config" / base.config, "rb") as file:
        chosen = tomllib.load(file)["model"]
    family = resolve(base.family)(make_options(**chosen | {"pretrained_model_name_or_path": str(model)}))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    triples = shapes.combinations() * rounds
    requests = [
        ImageRequest(
            f"a {colour} {shape} on a {background} background", width=64, height=64, steps=base.steps, scale=scale,
            sampler=base.sampler, seed=seed, guidance_scale=family.sampling_spec().defaults.guidance_scale and 1.0,
        )
        for seed, (shape, colour, background) in enumerate(triples)
    ]  # fmt: skip
    return list(zip(triples, draw(family, requests, device="cpu", dtype=torch.float32, batch_size=54), strict=True))


def judge_base(name: str, model: Path | None, rounds: int, scale: float | None) -> float:
    """Draw, judge, write a grid to demo/output; returns the share of pictures that are right in all three."""
    base = BASES[name]
    drawn = draw_known(base, model or MODEL / base.file, rounds, base.scale if scale is None else scale)
    verdicts = [(triple, judge(picture)) for triple, picture in drawn]
    parts = zip(*[(v.shape == t[0], v.colour == t[1], v.background == t[2]) for t, v in verdicts], strict=True)
    shares = [sum(part) / len(verdicts) for part in parts]
    right = sum(verdict.matches(*triple) for triple, verdict in verdicts) / len(verdicts)
    print(f"{name}: right {right:.1%} of {len(verdicts)} (shape, colour, background: "
          f"{', '.join(f'{share:.1%}' for share in shares)})")
    import numpy as np

    output = DEMO / "output" / f"{name}_known.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    picture_grid([np.asarray(picture) for _, picture in drawn], 18).save(output)
    return right


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="make and judge the demo's SDXL, SD3 and FLUX.1 models")
    commands = parser.add_subparsers(dest="command", required=True)
    vae = commands.add_parser("vae", help="train the VAE of SD3 and FLUX.1")
    vae.add_argument("--minutes", type=float, default=24.0)
    vae.add_argument("--decoder-minutes", type=float, default=10.0, help="further training of the decoder alone")
    preparing = commands.add_parser("prepare", help="untrained models and pictures")
    preparing.add_argument("--count", type=int, default=6000)
    judging = commands.add_parser("judge", help="draw every known prompt and judge")
    judging.add_argument("name", choices=sorted(BASES))
    judging.add_argument("--model", type=Path)
    judging.add_argument("--rounds", type=int, default=3)
    judging.add_argument("--scale", type=float, help="classifier-free guidance")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if arguments.command == "vae":
        make_vae(arguments.minutes, arguments.decoder_minutes)
    elif arguments.command == "prepare":
        prepare(arguments.count)
    else:
        judge_base(arguments.name, arguments.model, arguments.rounds, arguments.scale)


if __name__ == "__main__":
    main()
