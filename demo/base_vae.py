"""Training of the demo's VAE on all kinds of small drawings (see `shapes.vae_picture`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapes
import torch
from diffusers import AutoencoderKL
from fast_norm import use_fast_norm
from training_tools import Ema, TimeBudget, TrainingRun, autocast

LATENT_SCALE = 0.18215  # factor between VAE latents and the denoiser's latents in SD 1.x
HELD_OUT_SEED = 1_000_000_000


@dataclass(frozen=True)
class VaeSettings:
    """Settings of the VAE training. `kl_weight` is per latent element, the reconstruction loss per pixel element."""

    minutes: float = 27.0
    batch_size: int = 8
    learning_rate: float = 1e-3
    kl_weight: float = 1e-2
    kl_rise: float = 0.5
    l2_weight: float = 2.0
    seed: int = 1
    checkpoint_seconds: float = 120.0
    decoder_only: bool = False  # keep encoder and latents as they are, only sharpen the decoder


def build_vae(channels: tuple[int, ...] = (64, 64, 64, 64), layers: int = 1) -> AutoencoderKL:
    """A VAE of SD 1.x's structure (4 levels, factor 8, 4 latent channels) with 1.4 M parameters."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=channels, layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32, sample_size=shapes.SIZE, scaling_factor=LATENT_SCALE,
    )


def build_wide_vae() -> AutoencoderKL:
    """A VAE as SD3 and FLUX.1 have it (16 latent channels, no quant convolutions) with 0.6 M parameters."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 64, 32), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
        sample_size=shapes.SIZE, use_quant_conv=False, use_post_quant_conv=False,
    )


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 [H, W, 3] pictures to a float tensor [B, 3, H, W] in -1..1, channels last."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (batch / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def to_pictures(batch: torch.Tensor) -> list[np.ndarray]:
    """The inverse of `to_tensor`, clamped."""
    levels = ((batch.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, batch: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Encode to the posterior mean and decode, [B, 3, H, W] in -1..1."""
    device = next(vae.parameters()).device
    parts = []
    for part in batch.split(batch_size):
        with autocast(device):
            parts.append(vae.decode(vae.encode(part.to(device)).latent_dist.mode()).sample.float().cpu())
    return torch.cat(parts)


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio per picture in dB of two batches in -1..1."""
    error = (first.clamp(-1, 1) - second.clamp(-1, 1)).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-9))


def held_out_psnr(vae: AutoencoderKL, count: int = 128) -> dict[str, float]:
    """Mean PSNR in dB on pictures never trained on: known shapes, stars, free drawings."""
    groups = {
        "known": [shapes.known_picture(HELD_OUT_SEED + i)[0] for i in range(count)],
        "star": [shapes.known_picture(HELD_OUT_SEED + i, ("star",))[0] for i in range(count)],
        "free": [shapes.free_drawing(HELD_OUT_SEED + i) for i in range(count)],
    }
    batches = {name: to_tensor(pictures) for name, pictures in groups.items()}
    return {name: psnr(reconstruct(vae, batch), batch).mean().item() for name, batch in batches.items()}


def kl_weight_at(settings: VaeSettings, share: float) -> float:
    """KL weight after `share` (0..1) of the budget: rises from 1 % to the full weight; at once, latents collapse."""
    return settings.kl_weight * 10.0 ** (-2.0 * (1.0 - min(1.0, share / settings.kl_rise)))


def vae_loss(
    vae: AutoencoderKL, batch: torch.Tensor, settings: VaeSettings, kl_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Reconstruction (L1 + L2 per pixel element) plus weighted KL per latent element."""
    with autocast(batch.device):
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - batch
    l1, l2 = error.abs().mean(), error.pow(2).mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.pow(2) + logvar.exp() - 1.0 - logvar).mean()
    loss = l1 + settings.l2_weight * l2 + kl_weight * divergence
    return loss, {"l1": l1.item(), "l2": l2.item(), "kl": divergence.item()}


def train_vae(
    settings: VaeSettings, work: Path, device: torch.device, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train for `settings.minutes`, from `start` or from nothing; resumes from `work/vae.pt` (with `decoder_only`
    `work/vae_decoder.pt`) if present. Returns the averaged model."""
    torch.manual_seed(settings.seed)
    vae = (copy.deepcopy(start) if start is not None else build_vae()).to(device, memory_format=torch.channels_last)
    vae.train().requires_grad_(True)
    if settings.decoder_only:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    use_fast_norm(vae)
    weights = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, (0.9, 0.99), weight_decay=1e-3, fused=True)
    path = work / ("vae_decoder.pt" if settings.decoder_only else "vae.pt")
    run = TrainingRun(vae, optimizer, Ema(vae, 0.999), TimeBudget(settings.minutes * 60), path,
                      settings.learning_rate, settings.checkpoint_seconds)
    run.resume()
    while not run.budget.spent():
        first = run.step * settings.batch_size
        batch = to_tensor([shapes.vae_picture(first + offset) for offset in range(settings.batch_size)]).to(device)
        loss, parts = vae_loss(vae, batch, settings, kl_weight_at(settings, run.budget.share()))
        run.update(loss, **parts)
        run.save_if_due()
    return run.averaged()
