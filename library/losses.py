"""Element-wise losses, Huber thresholds, masks, and the loss weights that derive from a signal-to-noise ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from library.options.loss import LossOptions

LOSS_TYPES = ("l1", "l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")

#: Ratios above it count as this value in the weights below (timesteps almost without noise).
MAX_SNR = 1000.0


# --- element-wise ------------------------------------------------------------------------------------------
def elementwise_loss(prediction: Tensor, target: Tensor, loss_type: str, threshold: Tensor | None = None) -> Tensor:
    """Loss of every element, float32 [B,...].

    `threshold` [B] is the width c of the quadratic part of `huber` and `smooth_l1` (pseudo-Huber; they differ by the
    factor c); the other kinds ignore it. Raises ValueError for an unknown kind or a missing threshold.
    """
    error = prediction.float() - target.float()
    if loss_type == "l2":
        return error**2
    if loss_type == "l1":
        return error.abs()
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"--loss_type {loss_type!r} is unknown; choose one of {', '.join(LOSS_TYPES)}.")
    if threshold is None:
        raise ValueError(f"--loss_type {loss_type} needs a threshold for every sample.")
    c = threshold.to(error).reshape(-1, *[1] * (error.ndim - 1))
    scale = 2 * c if loss_type == "huber" else 2
    return scale * (torch.sqrt(error**2 + c**2) - c)


@dataclass(frozen=True)
class HuberConfig:
    """The threshold c of the Huber losses: `constant` c*scale, `exponential` from 1 down to c, `snr` likewise."""

    schedule: str = "snr"
    c: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in HUBER_SCHEDULES:
            raise ValueError(
                f"--huber_schedule {self.schedule!r} is unknown; choose one of {', '.join(HUBER_SCHEDULES)}."
            )
        if not self.c > 0:
            raise ValueError(f"--huber_c must be greater than 0, not {self.c}.")

    @classmethod
    def from_options(cls, loss_options: LossOptions) -> HuberConfig | None:
        """The Huber options of a command line; None where `--loss_type` has no threshold."""
        if loss_options.loss_type not in ("huber", "smooth_l1"):
            return None
        return cls(loss_options.huber_schedule, loss_options.huber_c, loss_options.huber_scale)


def huber_thresholds(
    config: HuberConfig, timesteps: Tensor, alphas_cumprod: Tensor | None = None, num_timesteps: int = 1000
) -> Tensor:
    """Thresholds float32 [B] at `timesteps` [B] in [0, num_timesteps] (Khrapov et al. 2024, section 3).

    `snr` needs the schedule's `alphas_cumprod` [B] at these timesteps and raises ValueError without it.
    """
    steps = timesteps.float()
    if config.schedule == "constant":
        return torch.full_like(steps, config.c * config.scale)
    if config.schedule == "exponential":
        return torch.exp(steps * (math.log(config.c) / num_timesteps)) * config.scale
    if alphas_cumprod is None:
        raise ValueError(
            "--huber_schedule snr needs a DDPM noise schedule; this model has none. "
            "Use --huber_schedule exponential or --huber_schedule constant."
        )
    sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod).sqrt()
    return ((1 - config.c) / (1 + sigmas) ** 2 + config.c) * config.scale


# --- masks -------------------------------------------------------------------------------------------------
def apply_mask(loss: Tensor, *, alpha_masks: Tensor | None = None, conditioning_images: Tensor | None = None) -> Tensor:
    """Element-wise loss [B,C,h,w] times a mask; without one, the loss as it is.

    The mask is the red channel of `conditioning_images` [B,3,H,W] in [-1,1] where given, else `alpha_masks` [B,H,W]
    in [0,1], averaged down to the latents' size. The mask's area does not renormalise the loss.
    """
    if conditioning_images is not None:
        mask = conditioning_images[:, :1].to(loss) / 2 + 0.5
    elif alpha_masks is not None:
        mask = alpha_masks[:, None].to(loss)
    else:
        return loss
    return loss * interpolate(mask, size=loss.shape[-2:], mode="area")


# --- weights from the signal-to-noise ratio ----------------------------------------------------------------
def min_snr_weights(snr: Tensor, gamma: float, *, v_parameterization: bool) -> Tensor:
    """min(SNR, gamma)/SNR, or over SNR + 1 for v-prediction (Hang et al. 2023, section 3.4). [B] -> [B]."""
    return snr.clamp(max=gamma) / (snr + 1 if v_parameterization else snr)


def v_prediction_scale(snr: Tensor) -> Tensor:
    """SNR/(SNR + 1): brings the scale of a v-prediction loss to that of a noise-prediction loss. [B] -> [B]."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1)


def v_prediction_like_factor(snr: Tensor, weight: float) -> Tensor:
    """1 + weight/`v_prediction_scale`: adds a v-prediction-like share to a noise-prediction loss. [B] -> [B]."""
    return 1 + weight / v_prediction_scale(snr)


def debiased_estimation_weights(snr: Tensor, *, v_parameterization: bool) -> Tensor:
    """1/sqrt(SNR), or 1/(SNR + 1) for v-prediction (Yu et al. 2023, "Debias the training"). [B] -> [B]."""
    snr = snr.clamp(max=MAX_SNR)
    return 1 / (snr + 1) if v_parameterization else snr.rsqrt()
