"""Noise schedules: the DDPM table, its zero-terminal-SNR form, flow-matching sigmas and their shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TRAINING_STEPS = 1000

#: The line that gives the resolution shift mu: tokens -> mu, through these two points.
_MU_LINE = ((256, 0.5), (4096, 1.15))


# --- DDPM --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DdpmSchedule:
    """A discrete variance-preserving schedule; every tensor is float32 [T] on the CPU.

    `snr` always belongs to the schedule before any zero-terminal rescaling: after it the last entry would be 0 and
    the loss weights made from it 0/0.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    snr: Tensor

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def signal_scales(self) -> Tensor:
        """Factor of the clean latents in x_t, sqrt(alphas_cumprod)."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def noise_scales(self) -> Tensor:
        """Factor of the noise in x_t, sqrt(1 - alphas_cumprod)."""
        return (1.0 - self.alphas_cumprod).sqrt()


def scaled_linear_schedule(
    num_timesteps: int = TRAINING_STEPS,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    *,
    zero_terminal_snr: bool = False,
) -> DdpmSchedule:
    """The schedule whose sqrt(beta) is linear in the timestep (Rombach et al. 2022, appendix of the code release).

    With `zero_terminal_snr` betas and alphas_cumprod are rescaled, `snr` is not.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    snr = (alphas_cumprod.sqrt() / (1.0 - alphas_cumprod).sqrt()) ** 2
    if zero_terminal_snr:
        betas = rescale_to_zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return DdpmSchedule(betas, alphas_cumprod, snr)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale a DDPM schedule [T] so that its last step is pure noise (Lin et al. 2023, Algorithm 1).

    The first step keeps its signal. Raises ValueError if the schedule is not strictly decreasing in signal.
    """
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    if len(signal) < 2 or not bool((signal.diff() < 0).all()):
        raise ValueError(
            f"rescale_to_zero_terminal_snr needs at least two betas, all of them > 0; got {len(betas)} betas "
            f"between {betas.min().item()} and {betas.max().item()}."
        )
    first, last = signal[0].clone(), signal[-1].clone()
    signal = (signal - last) * (first / (first - last))
    alphas_cumprod = signal**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


# --- flow matching -----------------------------------------------------------------------------------------
def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """s*sigma / (1 + (s-1)*sigma): moves sigmas in [0,1] towards noise for shift > 1 (Esser et al. 2024, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(num_steps: int = TRAINING_STEPS, shift: float = 1.0) -> Tensor:
    """Training sigmas float32 [num_steps], descending from 1 to just above 0; timestep i is 1000 * sigma i."""
    ascending = torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps
    return shift_sigmas(ascending.flip(0), shift)


def packed_tokens(latent_hw: Sequence[int]) -> int:
    """How many 2x2 patches a latent of this (height, width) has."""
    height, width = latent_hw
    return (height // 2) * (width // 2)


def resolution_shift_mu(tokens: int) -> float:
    """The log-shift mu for an image of `tokens` patches: 0.5 at 256, 1.15 at 4096, on one line through both."""
    (x1, y1), (x2, y2) = _MU_LINE
    slope = (y2 - y1) / (x2 - x1)
    return slope * tokens + (y1 - slope * x1)


def time_shift(mu: float, sigmas: Tensor) -> Tensor:
    """e^mu / (e^mu + 1/sigma - 1): `shift_sigmas` with shift e^mu. Sigmas in [0,1]; 0 stays 0."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def resolution_shifted_inference_sigmas(num_steps: int, tokens: int, *, shifted: bool = True) -> Tensor:
    """Sampling sigmas float32 [num_steps + 1] from 1 to 0, shifted for `tokens` patches unless `shifted` is off."""
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32)
    return time_shift(resolution_shift_mu(tokens), sigmas) if shifted else sigmas


def shifted_inference_sigmas(num_steps: int, shift: float) -> Tensor:
    """Sampling sigmas float32 [num_steps + 1]: even steps between the training schedule's ends, shifted, then 0.

    The ends come from the already shifted training schedule, so that the last sigma above 0 is shifted twice; the
    published models are sampled that way.
    """
    training = flow_sigmas(shift=shift)
    sigmas = torch.linspace(float(training[0]), float(training[-1]), num_steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(sigmas, shift), torch.zeros(1, dtype=torch.float64)]).float()


# --- drawing positions on the flow -------------------------------------------------------------------------
#: `--weighting_scheme`: names with a density of their own, and names with a loss weight of their own.
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


@dataclass(frozen=True)
class DensityConfig:
    """From which density positions u in [0,1] on the flow are drawn, and how losses at sigma are weighted."""

    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            known = ", ".join(WEIGHTING_SCHEMES)
            raise ValueError(f"--weighting_scheme {self.weighting_scheme!r} is unknown; choose one of {known}.")


def mode_density(uniform: Tensor, mode_scale: float) -> Tensor:
    """u = 1 - v - k*(cos^2(pi*v/2) - 1 + v) for uniform v (Esser et al. 2024, section 3.1, eq. 20)."""
    return 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def draw_density(count: int, config: DensityConfig) -> Tensor:
    """Positions u in [0,1], float32 [count], from torch's global CPU generator."""
    if config.weighting_scheme == "logit_normal":
        return torch.sigmoid(torch.normal(config.logit_mean, config.logit_std, size=(count,)))
    uniform = torch.rand(count)
    return mode_density(uniform, config.mode_scale) if config.weighting_scheme == "mode" else uniform


def sigma_weight(sigmas: Tensor, weighting_scheme: str) -> Tensor:
    """Loss weight [B] at sigma (Esser et al. 2024, section 3.1): sigma_sqrt, cosmap, else 1.

    Sigmas below 1/1000 count as 1/1000: at 0 the weight would be infinite.
    """
    if weighting_scheme == "sigma_sqrt":
        return sigmas.clamp(min=1 / TRAINING_STEPS) ** -2.0
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)
