"""Training noise: the base draw, noise offset, pyramid noise, and the perturbation of the noisy input."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from library.options.noise import NoiseOptions


@dataclass(frozen=True)
class NoiseConfig:
    """What is added to Gaussian noise. None or 0 switches a kind off."""

    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False

    @classmethod
    def from_options(cls, noise_options: NoiseOptions) -> NoiseConfig:
        """The noise options of a command line."""
        return cls(
            noise_offset=noise_options.noise_offset,
            noise_offset_random_strength=noise_options.noise_offset_random_strength,
            adaptive_noise_scale=noise_options.adaptive_noise_scale,
            multires_noise_iterations=noise_options.multires_noise_iterations,
            multires_noise_discount=noise_options.multires_noise_discount,
            ip_noise_gamma=noise_options.ip_noise_gamma,
            ip_noise_gamma_random_strength=noise_options.ip_noise_gamma_random_strength,
        )


def draw_noise(latents: Tensor, config: NoiseConfig) -> Tensor:
    """Noise with the shape, dtype and device of `latents` [B,C,h,w]: base draw, then offset, then pyramid.

    The order and the generators are part of the contract: torch's generator of the latents' device for the base and
    the offset, Python's and torch's CPU generator for the pyramid.
    """
    noise = torch.randn_like(latents)
    if config.noise_offset:
        offset: float | Tensor = config.noise_offset
        if config.noise_offset_random_strength:
            offset = torch.rand(1, device=latents.device) * config.noise_offset
        noise = apply_noise_offset(latents, noise, offset, config.adaptive_noise_scale)
    if config.multires_noise_iterations:
        noise = pyramid_noise(noise, config.multires_noise_iterations, config.multires_noise_discount)
    return noise


def apply_noise_offset(
    latents: Tensor, noise: Tensor, offset: float | Tensor, adaptive_noise_scale: float | None = None
) -> Tensor:
    """Noise [B,C,h,w] plus one Gaussian value per sample and channel, times `offset` (Guttenberg 2023).

    `adaptive_noise_scale` adds that multiple of the latents' absolute channel means to the offset, which never
    becomes negative.
    """
    strength: float | Tensor = offset
    if adaptive_noise_scale:
        channel_means = latents.mean(dim=(2, 3), keepdim=True).abs()
        strength = (offset + adaptive_noise_scale * channel_means).clamp(min=0.0)
    batch, channels = latents.shape[:2]
    drawn = torch.randn((batch, channels, 1, 1), device=latents.device)
    return (noise + strength * drawn).to(noise.dtype)


def pyramid_noise(noise: Tensor, iterations: int, discount: float) -> Tensor:
    """Noise [B,C,h,w] plus coarser and coarser noise, scaled to unit variance over the whole batch (Whitaker 2023).

    Each level is smaller than the image by a random factor r in (2,4), redrawn per level, to the power of the level;
    level 0 is therefore a second full-resolution noise. Levels end when a side reaches one pixel.
    """
    batch, channels, height, width = noise.shape
    for level in range(iterations):
        ratio = random.random() * 2 + 2
        size_hw = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = torch.randn(batch, channels, *size_hw).to(noise)
        noise = noise + interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if 1 in size_hw:
            break
    return noise / noise.std()


def perturb(noise: Tensor, config: NoiseConfig, *, draws_strength_last: bool = False) -> Tensor:
    """The noise for the noisy input: `noise` plus `ip_noise_gamma` fresh noise (Ning et al. 2023, Algorithm 1).

    The training target keeps the unperturbed noise. Without gamma nothing is drawn. A random strength is drawn before
    the fresh noise, or after it with `draws_strength_last` (see `Objective`).
    """
    if not config.ip_noise_gamma:
        return noise
    fresh = torch.randn_like(noise) if draws_strength_last else None
    gamma: float | Tensor = config.ip_noise_gamma
    if config.ip_noise_gamma_random_strength:
        gamma = torch.rand(1, device=noise.device) * config.ip_noise_gamma
    if fresh is None:
        fresh = torch.randn_like(noise)
    return (noise + gamma * fresh).to(noise.dtype)
