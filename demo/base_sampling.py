"""Drawing pictures with the demo's models through diffusers' ordinary samplers, and counting what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapes
import torch
from base_tokenizer import MAX_TOKENS
from base_vae import LATENT_SCALE, to_pictures
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from judge import judge
from training_tools import autocast
from transformers import CLIPTextModel, CLIPTokenizer

_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SAMPLERS = ("ddim", "euler", "euler_a")


@dataclass(frozen=True)
class Models:
    """What a picture needs."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer


@dataclass(frozen=True)
class SamplingSettings:
    """Sampler name, number of steps, guidance scale and seed of the first picture."""

    sampler: str = "ddim"
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0


def make_scheduler(name: str) -> DDIMScheduler | EulerDiscreteScheduler | EulerAncestralDiscreteScheduler:
    """The scheduler as SD 1.5 comes with it."""
    if name == "ddim":
        return DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    if name == "euler":
        return EulerDiscreteScheduler(**_SCHEDULE)
    if name == "euler_a":
        return EulerAncestralDiscreteScheduler(**_SCHEDULE)
    raise ValueError(f"unknown sampler {name!r}; known are {', '.join(SAMPLERS)}")


@torch.no_grad()
def sample(models: Models, prompts: Sequence[str], settings: SamplingSettings) -> list[np.ndarray]:
    """One uint8 RGB picture [64, 64, 3] per prompt; picture i starts from the noise of seed `settings.seed + i`."""
    device = next(models.unet.parameters()).device
    side = shapes.SIZE // 8
    noise = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(settings.seed + index))
             for index in range(len(prompts))]
    scheduler = make_scheduler(settings.sampler)
    scheduler.set_timesteps(settings.steps)
    generator = torch.Generator().manual_seed(settings.seed + 7919)
    latents = torch.stack(noise) * scheduler.init_noise_sigma
    tokens = models.tokenizer([*prompts, *[""] * len(prompts)], padding="max_length", truncation=True,
                              max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(device)
    with autocast(device):
        context = models.text_encoder(tokens).last_hidden_state
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep).to(device)
            predicted = models.unet(scaled, timestep.to(device), encoder_hidden_states=context).sample.float().cpu()
            wanted, empty = predicted.chunk(2)
            guided = empty + settings.guidance * (wanted - empty)
            extra = {} if settings.sampler == "euler" else {"generator": generator}
            latents = scheduler.step(guided, timestep, latents, **extra).prev_sample
        decoded = [models.vae.decode(part.to(device) / LATENT_SCALE).sample for part in latents.split(32)]
    return to_pictures(torch.cat(decoded))


@dataclass(frozen=True)
class Tally:
    """Shares (0..1) of right pictures over all known prompts, and the pictures themselves in prompt order."""

    right: float
    shape: float
    colour: float
    background: float
    pictures: list[np.ndarray]


def tally_known(models: Models, settings: SamplingSettings, rounds: int = 2) -> Tally:
    """Draw every known combination `rounds` times and judge."""
    triples = shapes.combinations() * rounds
    prompts = [f"a {colour} {shape} on a {background} background" for shape, colour, background in triples]
    pictures = sample(models, prompts, settings)
    verdicts = [judge(picture) for picture in pictures]
    return Tally(
        right=float(np.mean([v.matches(*t) for v, t in zip(verdicts, triples, strict=True)])),
        shape=float(np.mean([v.shape == t[0] for v, t in zip(verdicts, triples, strict=True)])),
        colour=float(np.mean([v.colour == t[1] for v, t in zip(verdicts, triples, strict=True)])),
        background=float(np.mean([v.background == t[2] for v, t in zip(verdicts, triples, strict=True)])),
        pictures=pictures,
    )
