"""Training of the demo's U-Net and text encoder on cached latents of the known shapes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import shapes
import torch
from base_captions import meaningless_words, training_caption
from base_models import BaseSize, build_text_encoder, build_unet
from base_tokenizer import MAX_TOKENS, WORDS
from base_vae import LATENT_SCALE, to_tensor
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from fast_norm import use_fast_norm
from torch import Tensor, nn
from training_tools import Ema, TimeBudget, TrainingRun, autocast
from transformers import CLIPTextModel, CLIPTokenizer

from library.losses import debiased_estimation_weights
from library.schedulers import scaled_linear_schedule


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of the denoiser training; `drop_share` captions are empty, which guidance needs."""

    minutes: float = 60.0
    pictures: int = 14_000
    batch_size: int = 64
    learning_rate: float = 1.2e-3
    drop_share: float = 0.1
    ema_decay: float = 0.9985
    seed: int = 2
    checkpoint_seconds: float = 240.0
    evaluate_seconds: float = 600.0


@dataclass(frozen=True)
class LatentCache:
    """Posterior of every training picture, already times the latent scale: mean and deviation [n, 4, 8, 8], float32."""

    mean: Tensor
    deviation: Tensor
    scenes: list[shapes.Scene]


class BaseModel(nn.Module):
    """Text encoder and U-Net as one module, so that one optimizer and one average cover both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predicted noise [B, 4, h, w] for noisy latents [B, 4, h, w], timesteps [B] and token ids [B, 77]."""
        context = self.text_encoder(token_ids).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=context).sample


def build_base(size: BaseSize, tokenizer: CLIPTokenizer, device: torch.device) -> BaseModel:
    """Fresh models, arranged for speed on a CPU."""
    model = BaseModel(build_unet(size), build_text_encoder(size, tokenizer))
    model = model.to(device, memory_format=torch.channels_last)
    use_fast_norm(model)
    if device.type == "cpu":  # PyTorch's fused attention is slow on a CPU for heads this narrow
        model.unet.set_attn_processor(AttnProcessor())
        model.text_encoder.set_attn_implementation("eager")
    return model


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, 77]."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return encoded.input_ids


@torch.no_grad()
def posteriors(vae: AutoencoderKL, count: int, batch_size: int = 64) -> LatentCache:
    """Encode `count` known pictures, evenly over all combinations."""
    device, triples = next(vae.parameters()).device, shapes.combinations()
    means, deviations, scenes = [], [], []
    for start in range(0, count, batch_size):
        drawn = [shapes.known_picture(i, combination=triples[i % len(triples)])
                 for i in range(start, min(count, start + batch_size))]
        with autocast(device):
            posterior = vae.encode(to_tensor([picture for picture, _ in drawn]).to(device)).latent_dist
        means.append(posterior.mean.float().cpu() * LATENT_SCALE)
        deviations.append(posterior.std.float().cpu() * LATENT_SCALE)
        scenes += [scene for _, scene in drawn]
    return LatentCache(torch.cat(means).contiguous(), torch.cat(deviations).contiguous(), scenes)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, count: int = 4096) -> None:
    """Change the VAE's 1x1 convolutions so that latents times 0.18215 have mean 0 and variance 1 per channel.

    Decoding an encoded picture gives the same picture as before: what `quant_conv` divides out, `post_quant_conv`
    multiplies back. Log variances move by the same factor.
    """
    cache = posteriors(vae, count)
    mean = cache.mean.mean((0, 2, 3)) / LATENT_SCALE
    variance = (cache.mean.var((0, 2, 3)) + cache.deviation.pow(2).mean((0, 2, 3))) / LATENT_SCALE**2
    factor = (variance.sqrt() * LATENT_SCALE).to(next(vae.parameters()).device)
    mean = mean.to(factor.device)
    inward, outward, channels = vae.quant_conv, vae.post_quant_conv, len(factor)
    outward.bias.add_(outward.weight[:, :, 0, 0] @ mean)
    outward.weight.mul_(factor[None, :, None, None])
    inward.weight[:channels] /= factor[:, None, None, None]
    inward.bias[:channels] = (inward.bias[:channels] - mean) / factor
    inward.bias[channels:] -= 2 * factor.log()


def loss_weights(snr: Tensor) -> Tensor:
    """Weight of the squared noise error per sample [B]: 1/sqrt(SNR) within bounds.

    What decides colour and kind of shape happens at high noise, where an error of the picture is a tiny error of
    the noise; equal weights for all timesteps would hardly train it.
    """
    return debiased_estimation_weights(snr, v_parameterization=False).clamp(0.2, 6.0)


def training_step(
    model: BaseModel, cache: LatentCache, tokenizer: CLIPTokenizer, settings: DenoiserSettings, step: int,
    schedule: tuple[Tensor, Tensor, Tensor], strange: list[str],
) -> Tensor:
    """Loss (scalar) of one batch; everything random is a function of seed and step."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    rng = random.Random(settings.seed * 1_000_003 + step)
    size = settings.batch_size
    picks = torch.randint(0, len(cache.scenes), (size,), generator=generator)
    captions = ["" if rng.random() < settings.drop_share else training_caption(cache.scenes[i], rng, strange)
                for i in picks.tolist()]
    latents = cache.mean[picks]
    latents = latents + cache.deviation[picks] * torch.randn(latents.shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size  # timesteps spread evenly
    timesteps = (strata * 1000).long().clamp_max(999)
    signal, noise_scale, snr = (table[timesteps] for table in schedule)
    noisy = signal[:, None, None, None] * latents + noise_scale[:, None, None, None] * noise
    noisy = noisy.to(device).contiguous(memory_format=torch.channels_last)
    with autocast(device):
        predicted = model(noisy, timesteps.to(device), tokenize(tokenizer, captions).to(device))
    error = (predicted.float() - noise.to(device)).pow(2).mean((1, 2, 3))
    return (error * loss_weights(snr).to(device)).mean()


def train_denoiser(
    settings: DenoiserSettings, size: BaseSize, vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path,
    device: torch.device, evaluate: Callable[[BaseModel], float],
) -> BaseModel:
    """Train for `settings.minutes`, resuming from `work/denoiser.pt`; returns the averaged model.

    `evaluate` gets the averaged model now and then and returns its share of right pictures (0..1).
    """
    torch.manual_seed(settings.seed)
    cache = posteriors(vae, settings.pictures)
    model = build_base(size, tokenizer, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.99), weight_decay=1e-2, fused=True
    )
    run = TrainingRun(model, optimizer, Ema(model, settings.ema_decay), TimeBudget(settings.minutes * 60),
                      work / "denoiser.pt", settings.learning_rate, settings.checkpoint_seconds)
    run.resume()
    table = scaled_linear_schedule()
    schedule = (table.signal_scales, table.noise_scales, table.snr)
    strange = meaningless_words(WORDS)
    looked_at = time.monotonic()
    while not run.budget.spent():
        run.update(training_step(model, cache, tokenizer, settings, run.step, schedule, strange))
        run.save_if_due()
        if time.monotonic() - looked_at > settings.evaluate_seconds:
            evaluate(run.averaged())
            looked_at = time.monotonic()
    return run.averaged()
