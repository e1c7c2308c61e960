"""Learning cases with a shape that the model has never seen: LoRAs and whole models learn the star.

The LoRA of Stable Diffusion is the built-in example (demo/run_quickstart.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judge import agrees, judge
from learning import ROOT, Measure, run_script
from PIL import Image
from shapes import BACKGROUNDS, COLOURS, KNOWN_SHAPES, SIZE, combinations, write_pictures

STAR_PICTURES, KNOWN_PICTURES, BATCH = 12, 108, 8
EVERY_STAR = 18  # one picture for every colour on every background: transformers keep to the pairs that they saw
MODEL = ROOT / "demo" / "model"


@dataclass(frozen=True)
class Base:
    """A model of the demo: its family, the file of demo/config with its options, what training adds, how it draws."""

    family: str
    file: str
    config: str
    training: tuple[str, ...]
    scale: float
    steps: int
    sampler: str

    @property
    def options(self) -> dict[str, Any]:
        """The options that name its files, as its own training had them, with the trained file."""
        with open(ROOT / "demo" / "config" / self.config, "rb") as file:
            chosen = tomllib.load(file)["model"]
        tokenizers = str(MODEL / "tokenizers")  # also for trained files, which have no tokenizer beside them
        return chosen | {"tokenizer_cache_dir": tokenizers, "pretrained_model_name_or_path": str(MODEL / self.file)}


CACHED = ("--cache_text_encoder_outputs",)
BASES = {
    "sd": Base("library.families.sd:StableDiffusion", "shapes_sd15.safetensors", "star_training.toml",
               ("--debiased_estimation_loss",), 3.0, 20, "ddim"),
    "sdxl": Base("library.families.sdxl:StableDiffusionXL", "shapes_sdxl.safetensors", "sdxl_base.toml",
                 ("--debiased_estimation_loss", *CACHED), 3.0, 25, "euler"),
    "sd3": Base("library.families.sd3:StableDiffusion3", "shapes_sd3.safetensors", "sd3_base.toml",
                ("--weighting_scheme", "sigma_sqrt", *CACHED), 2.0, 25, "euler"),
    "flux": Base("library.families.flux:Flux", "shapes_flux.safetensors", "flux_base.toml",
                 ("--timestep_sampling", "sigmoid", "--model_prediction_type", "raw", *CACHED), 1.0, 25, "euler"),
}  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """Which script teaches which base the star.

    `network`: the module of the network that the script trains; None: it trains the model itself. `stars`: how many
    pictures. `known_subset`: further settings of the subset with what is known.
    """

    base: str
    script: str
    network: str | None = None
    stars: int = STAR_PICTURES
    known_subset: str = ""


# --- cases -----------------------------------------------------------------------------------------------------
def lora_sdxl(folder: Path, words: Sequence[str]) -> list[Measure]:
    """A LoRA on SDXL's U-Net, with cached text."""
    network = ("--network_module", "networks.lora", "--network_dim", "8", "--network_alpha", "8", "--network_args",
               "conv_dim=8", "conv_alpha=8", "--network_train_unet_only", "--learning_rate", "3e-3",
               "--max_train_steps", "800")  # fmt: skip
    return teach_star(Lesson("sdxl", "sdxl_train_network", "networks.lora"), folder, [*network, *words])


def lora_sd3(folder: Path, words: Sequence[str]) -> list[Measure]:
    """A LoRA on SD3's transformer, with cached text."""
    lesson = Lesson("sd3", "sd3_train_network", "networks.lora_sd3", EVERY_STAR)
    return teach_star(lesson, folder, [*lora_words("networks.lora_sd3"), "--max_train_steps", "1000", *words])


def lora_flux(folder: Path, words: Sequence[str]) -> list[Measure]:
    """A LoRA on FLUX.1's transformer, with cached text."""
    lesson = Lesson("flux", "flux_train_network", "networks.lora_flux", EVERY_STAR)
    return teach_star(lesson, folder, [*lora_words("networks.lora_flux"), "--max_train_steps", "1200", *words])


def lora_words(module: str) -> tuple[str, ...]:
    """What the LoRAs of both transformers share."""
    return ("--network_module", module, "--network_dim", "16", "--network_alpha", "16", "--network_train_unet_only",
            "--learning_rate", "4e-3")  # fmt: skip


def dreambooth(folder: Path, words: Sequence[str]) -> list[Measure]:
    """DreamBooth on Stable Diffusion, U-Net and text encoder, with known pictures as regularisation images."""
    training = ("--learning_rate", "6e-4", "--max_train_steps", "400")
    return teach_star(Lesson("sd", "train_db", known_subset="is_reg = true"), folder, [*training, *words])


def full_sdxl(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Full training of SDXL's U-Net."""
    training = ("--learning_rate", "6e-4", "--max_train_steps", "550")
    return teach_star(Lesson("sdxl", "sdxl_train"), folder, [*training, *words])


def full_sd3(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Full training of SD3's transformer."""
    training = ("--learning_rate", "1e-3", "--max_train_steps", "600")
    return teach_star(Lesson("sd3", "sd3_train", stars=EVERY_STAR), folder, [*training, *words])


def full_flux(folder: Path, words: Sequence[str]) -> list[Measure]:
    """Full training of FLUX.1's transformer."""
    training = ("--learning_rate", "1e-3", "--max_train_steps", "900")
    return teach_star(Lesson("flux", "flux_train", stars=EVERY_STAR), folder, [*training, *words])


# --- training --------------------------------------------------------------------------------------------------
def teach_star(lesson: Lesson, folder: Path, words: Sequence[str]) -> list[Measure]:
    """Train on a few stars and pictures of what is known; shares of pictures judged right before and after.

    Words may override the base's options, also where it is drawn.
    """
    base, network = BASES[lesson.base], lesson.network
    write_star_data(folder, lesson)
    files = base.options | {key: value for key, value in given(words).items() if key in base.options}
    run_script(
        lesson.script, *as_words(files), "--dataset_config", folder / "dataset.toml", "--cache_latents", *base.training,
        "--max_data_loader_n_workers", "0", "--seed", "1", "--lr_scheduler", "cosine", "--save_model_as",
        "safetensors", "--save_precision", "fp16", "--output_dir", folder, "--output_name", "trained", *words,
    )  # fmt: skip
    trained = folder / "trained.safetensors"
    model = files if network else files | {"pretrained_model_name_or_path": str(trained)}
    before = shares(draw_all(base, files, prompts()), folder / "before.png")
    drawn = draw_all(base, model, prompts(), (network, trained) if network else None)
    after = shares(drawn, folder / "after.png")
    return [
        Measure("stars before", before[0], at_most=0.1),
        Measure("stars after", after[0], at_least=0.8),
        Measure("known prompts right before", before[1]),
        Measure("known prompts right after, as a share of those before", after[1] / before[1], at_least=0.75),
    ]


def as_words(options: Mapping[str, Any]) -> list[str]:
    """A command line of options."""
    words = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def given(words: Sequence[str]) -> dict[str, str]:
    """The options with one value on a command line."""
    return {name.removeprefix("--"): value for name, value in zip(words, words[1:], strict=False) if name[:2] == "--"}


def write_star_data(folder: Path, lesson: Lesson) -> None:
    """A few stars, repeated to be as many as the pictures of what is known; a dataset file for both."""
    write_pictures(folder / "stars", "star", lesson.stars)
    write_pictures(folder / "known", "known", KNOWN_PICTURES, seed=77)
    repeats = KNOWN_PICTURES // lesson.stars
    (folder / "dataset.toml").write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = {SIZE}\nbatch_size = {BATCH}\n'
        f"[[datasets.subsets]]\nimage_dir = {str(folder / 'stars')!r}\nnum_repeats = {repeats}\n"
        f"[[datasets.subsets]]\nimage_dir = {str(folder / 'known')!r}\n{lesson.known_subset}\n",
        encoding="utf-8",
    )


# --- pictures --------------------------------------------------------------------------------------------------
def prompts() -> list[tuple[str, int]]:
    """(prompt, seed): stars in every colour on every background twice, then everything that is known once."""
    stars = [f"a {colour} sks star on a {ground} background" for colour in COLOURS for ground in BACKGROUNDS]
    known = [f"a {colour} {shape} on a {ground} background" for shape, colour, ground in combinations(KNOWN_SHAPES)]
    return [(prompt, seed) for seed in (1, 2) for prompt in stars] + [(prompt, 1) for prompt in known]


def draw_all(
    base: Base, options: Mapping[str, Any], asked: Sequence[tuple[str, int]], network: tuple[str, Path] | None = None
) -> dict[tuple[str, int], Image.Image]:
    """A picture for each (prompt, seed), by the project's engine; `network`: module and file of one to draw with."""
    import torch

    from library.generation.engine import draw
    from library.generation.request import ImageRequest
    from library.launch import resolve
    from library.options import make_options
    from networks import contract

    family = resolve(base.family)(make_options(**options))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    if network:
        models = contract.HostModels(family.vae, family.network_text_encoders(), family.denoiser)
        adapter, _ = contract.create_for_generation(*network, models)
        contract.apply(adapter, models, True, True)
        contract.load_weights(adapter, network[1])
    guidance = options.get("guidance_scale")
    requests = [
        ImageRequest(prompt, width=SIZE, height=SIZE, steps=base.steps, scale=base.scale, sampler=base.sampler,
                     seed=seed, guidance_scale=guidance)
        for prompt, seed in asked
    ]  # fmt: skip
    drawn = draw(family, requests, device="cpu", dtype=torch.float32, batch_size=30)
    return dict(zip(asked, drawn, strict=True))


def shares(pictures: Mapping[tuple[str, int], Image.Image], grid: Path) -> tuple[float, float]:
    """(stars on star prompts, known prompts right in all three); writes all pictures as one file."""
    import numpy as np
    from grid import picture_grid

    picture_grid([np.asarray(picture) for picture in pictures.values()], 18).save(grid)
    stars = [judge(picture).shape == "star" for (prompt, _), picture in pictures.items() if "star" in prompt]
    known = [agrees(judge(picture), prompt) for (prompt, _), picture in pictures.items() if "star" not in prompt]
    return sum(stars) / len(stars), sum(known) / len(known)
