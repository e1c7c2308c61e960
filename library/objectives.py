"""What a denoiser learns: which noise levels are drawn, how latents are corrupted, what the target and weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from library import losses
from library.losses import HuberConfig, huber_thresholds
from library.schedulers import (
    TRAINING_STEPS,
    DensityConfig,
    draw_density,
    flow_sigmas,
    packed_tokens,
    resolution_shift_mu,
    scaled_linear_schedule,
    shift_sigmas,
    sigma_weight,
    time_shift,
)

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions


@dataclass(frozen=True)
class NoiseLevel:
    """Where on the schedule each sample of a batch is."""

    timesteps: Tensor  # float32 [B] in [0, 1000]; what the denoiser gets
    sigmas: Tensor  # float32 [B] in [0, 1]; the factor of the noise in x_t

    def select(self, rows: Tensor) -> NoiseLevel:
        """The rows (index or boolean mask [B]) of a batch."""
        return NoiseLevel(self.timesteps[rows], self.sigmas[rows])


class Objective(Protocol):
    """One way to corrupt latents and to ask for them back. Tensors are [B,C,h,w], weights [B]."""

    #: Order of the two draws of a perturbation with random strength (`noise.perturb`); part of the contract.
    draws_strength_last: bool

    def sample_timesteps(self, count: int, latent_hw: Sequence[int], device: torch.device | str) -> NoiseLevel:
        """Draw noise levels for a training batch from torch's global generators."""
        ...

    def at(self, timesteps: Tensor, latent_hw: Sequence[int] | None = None) -> NoiseLevel:
        """The noise level at explicit timesteps [B]; draws nothing."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The noisy input x_t, in the dtype of `x0`."""
        ...

    def prediction(self, raw: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """The denoiser's raw output as the quantity that is compared with the target."""
        ...

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """What the prediction is compared with."""
        ...

    def weight(self, level: NoiseLevel) -> Tensor:
        """Factor [B] of the element-wise loss."""
        ...

    def post_weight(self, loss: Tensor, level: NoiseLevel) -> Tensor:
        """Per-sample losses [B], weighted after masks and sample weights have been applied."""
        ...

    def huber_threshold(self, level: NoiseLevel) -> Tensor | None:
        """Threshold [B] of the Huber losses; None where the loss has none."""
        ...


# --- denoising diffusion -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class DdpmConfig:
    """Choices of the DDPM objective; None, 0 and False switch a weight off. Timesteps are drawn from [min, max)."""

    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    huber: HuberConfig | None = None

    def __post_init__(self) -> None:
        _check_timestep_range(self.min_timestep, self.max_timestep)

    @classmethod
    def from_options(
        cls, noise_options: NoiseOptions, loss_options: LossOptions, *, v_parameterization: bool
    ) -> DdpmConfig:
        """The noise and loss options of a command line."""
        return cls(
            v_parameterization=v_parameterization,
            zero_terminal_snr=noise_options.zero_terminal_snr,
            min_timestep=noise_options.min_timestep,
            max_timestep=noise_options.max_timestep,
            min_snr_gamma=loss_options.min_snr_gamma,
            scale_v_pred_loss_like_noise_pred=loss_options.scale_v_pred_loss_like_noise_pred,
            v_pred_like_loss=loss_options.v_pred_like_loss,
            debiased_estimation_loss=loss_options.debiased_estimation_loss,
            huber=HuberConfig.from_options(loss_options),
        )


class DdpmObjective:
    """Predict the noise, or the velocity, of the scaled-linear DDPM schedule (Ho et al. 2020; Salimans & Ho 2022)."""

    draws_strength_last = False

    def __init__(self, config: DdpmConfig) -> None:
        self.config = config
        self.schedule = scaled_linear_schedule(zero_terminal_snr=config.zero_terminal_snr)
        self._tables: dict[tuple[int, torch.device], Tensor] = {}  # the schedule's tensors on the devices in use

    def sample_timesteps(self, count: int, latent_hw: Sequence[int], device: torch.device | str) -> NoiseLevel:
        """Uniform whole timesteps in [min, max) from the CPU generator; all max, without a draw, if min >= max."""
        low = self.config.min_timestep or 0
        high = self.schedule.num_timesteps if self.config.max_timestep is None else self.config.max_timestep
        if low < high:
            steps = torch.randint(low, high, (count,))
        else:
            steps = torch.full((count,), min(high, self.schedule.num_timesteps - 1))
        return self.at(steps.to(device))

    def at(self, timesteps: Tensor, latent_hw: Sequence[int] | None = None) -> NoiseLevel:
        """The noise level at timesteps [B]; fractions are cut off."""
        return NoiseLevel(timesteps.float(), self._at(self.schedule.noise_scales, timesteps))

    def corrupt(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """sqrt(abar) * x0 + sqrt(1 - abar) * noise."""
        signal = self._at(self.schedule.signal_scales, level.timesteps)
        return (_spread(signal) * x0 + _spread(level.sigmas) * noise).to(x0.dtype)

    def prediction(self, raw: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """The raw output: it already is the noise or the velocity."""
        return raw

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The noise, or with v-prediction sqrt(abar) * noise - sqrt(1 - abar) * x0."""
        if not self.config.v_parameterization:
            return noise
        signal = self._at(self.schedule.signal_scales, level.timesteps)
        return (_spread(signal) * noise - _spread(level.sigmas) * x0).to(x0.dtype)

    def weight(self, level: NoiseLevel) -> Tensor:
        """Ones: the weights of this objective are applied per sample, by `post_weight`."""
        return torch.ones_like(level.timesteps)

    def post_weight(self, loss: Tensor, level: NoiseLevel) -> Tensor:
        """Losses [B] times min-SNR, v-prediction scale, v-prediction-like and debiasing factors, as configured."""
        config, snr = self.config, self._at(self.schedule.snr, level.timesteps)
        if config.min_snr_gamma:
            loss = loss * losses.min_snr_weights(
                snr, config.min_snr_gamma, v_parameterization=config.v_parameterization
            )
        if config.scale_v_pred_loss_like_noise_pred:
            loss = loss * losses.v_prediction_scale(snr)
        if config.v_pred_like_loss:
            loss = loss * losses.v_prediction_like_factor(snr, config.v_pred_like_loss)
        if config.debiased_estimation_loss:
            loss = loss * losses.debiased_estimation_weights(snr, v_parameterization=config.v_parameterization)
        return loss

    def huber_threshold(self, level: NoiseLevel) -> Tensor | None:
        """Thresholds [B] at these timesteps; `snr` uses the schedule that corrupts (zero-terminal or not)."""
        if self.config.huber is None:
            return None
        alphas_cumprod = self._at(self.schedule.alphas_cumprod, level.timesteps)
        return huber_thresholds(self.config.huber, level.timesteps, alphas_cumprod, self.schedule.num_timesteps)

    def _at(self, table: Tensor, timesteps: Tensor) -> Tensor:
        """Entries [B] of one of the schedule's tables, on the device of the timesteps."""
        key = (id(table), timesteps.device)
        if key not in self._tables:
            self._tables[key] = table.to(timesteps.device)
        return self._tables[key][timesteps.long()]


# --- rectified flow ----------------------------------------------------------------------------------------
TIMESTEP_SAMPLING = ("uniform", "sigmoid", "shift", "resolution_shift", "sigma", "whole_steps")
PREDICTION_TYPES = ("raw", "additive", "sigma_scaled", "denoised")


@dataclass(frozen=True)
class FlowConfig:
    """Choices of the rectified-flow objective.

    `timestep_sampling`:
      uniform           sigma uniform in [0,1)
      sigmoid           sigmoid(sigmoid_scale * normal)
      shift             the same, then `shift_sigmas` by `shift`
      resolution_shift  the same, then `time_shift` for the latent's number of patches
      sigma             a position from `density` in the 1000 training sigmas with `shift`
      whole_steps       a position from `density`, shifted by `shift`, rounded down to a whole timestep
    All but the last two draw on the latents' device.

    `prediction_type` (p raw output, y noisy input): raw p; additive p + y; sigma_scaled y - sigma*p; all three are
    compared with noise - x0. denoised: y - sigma*p, compared with x0. The last two are weighted by
    `density.weighting_scheme`.
    """

    timestep_sampling: str = "uniform"
    prediction_type: str = "raw"
    density: DensityConfig = field(default_factory=DensityConfig)
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    min_timestep: int | None = None
    max_timestep: int | None = None
    huber: HuberConfig | None = None

    def __post_init__(self) -> None:
        _check_choice("timestep sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        _check_choice("prediction type", self.prediction_type, PREDICTION_TYPES)
        _check_timestep_range(self.min_timestep, self.max_timestep)
        if not self.shift > 0:
            raise ValueError(f"The shift of a flow schedule must be greater than 0, not {self.shift}.")
        if self.huber is not None and self.huber.schedule == "snr":
            raise ValueError(
                "--huber_schedule snr needs a DDPM noise schedule; flow-matching models have none. "
                "Use --huber_schedule exponential or --huber_schedule constant."
            )


class RectifiedFlow:
    """Predict along the straight line x_sigma = (1 - sigma) * x0 + sigma * noise (Liu et al. 2022)."""

    draws_strength_last = True

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        self._training_sigmas = flow_sigmas(TRAINING_STEPS, config.shift)

    def sample_timesteps(self, count: int, latent_hw: Sequence[int], device: torch.device | str) -> NoiseLevel:
        """Sigmas as `FlowConfig.timestep_sampling` says, within [min, max] timesteps; timesteps are 1000 * sigma."""
        if self.config.timestep_sampling == "whole_steps":
            return self.at(self._whole_steps(count).to(device))
        sigmas = self._draw_sigmas(count, latent_hw, device)
        if self.config.min_timestep is not None or self.config.max_timestep is not None:
            low, high = self._timestep_range()
            sigmas = (low + sigmas * (high - low)) / TRAINING_STEPS
        return NoiseLevel(sigmas * TRAINING_STEPS, sigmas)

    def at(self, timesteps: Tensor, latent_hw: Sequence[int] | None = None) -> NoiseLevel:
        """sigma = timestep / 1000, whatever the shift."""
        return NoiseLevel(timesteps.float(), timesteps.float() / TRAINING_STEPS)

    def corrupt(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """(1 - sigma) * x0 + sigma * noise."""
        sigmas = _spread(level.sigmas)
        return ((1.0 - sigmas) * x0 + sigmas * noise).to(x0.dtype)

    def prediction(self, raw: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """The velocity itself, plus the noisy input, or the estimate of x0 that follows from it."""
        if self.config.prediction_type == "raw":
            return raw
        if self.config.prediction_type == "additive":
            return raw + x_t
        return (x_t - _spread(level.sigmas) * raw).to(raw.dtype)

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The velocity noise - x0; x0 for prediction type `denoised`."""
        return x0 if self.config.prediction_type == "denoised" else noise - x0

    def weight(self, level: NoiseLevel) -> Tensor:
        """The weighting scheme's weight at sigma, for the prediction types that estimate x0; else 1."""
        if self.config.prediction_type in ("raw", "additive"):
            return torch.ones_like(level.sigmas)
        return sigma_weight(level.sigmas, self.config.density.weighting_scheme)

    def post_weight(self, loss: Tensor, level: NoiseLevel) -> Tensor:
        """The losses as they are: signal-to-noise weights belong to DDPM schedules."""
        return loss

    def huber_threshold(self, level: NoiseLevel) -> Tensor | None:
        """Thresholds [B] at these timesteps."""
        return None if self.config.huber is None else huber_thresholds(self.config.huber, level.timesteps)

    def _draw_sigmas(self, count: int, latent_hw: Sequence[int], device: torch.device | str) -> Tensor:
        config = self.config
        if config.timestep_sampling == "uniform":
            return torch.rand(count, device=device)
        if config.timestep_sampling == "sigma":
            indices = (draw_density(count, config.density) * TRAINING_STEPS).long().clamp(0, TRAINING_STEPS - 1)
            return self._training_sigmas[indices].to(device)
        sigmas = torch.sigmoid(config.sigmoid_scale * torch.randn(count, device=device))
        if config.timestep_sampling == "shift":
            return shift_sigmas(sigmas, config.shift)
        if config.timestep_sampling == "resolution_shift":
            return time_shift(resolution_shift_mu(packed_tokens(latent_hw)), sigmas)
        return sigmas

    def _whole_steps(self, count: int) -> Tensor:
        low, high = self._timestep_range()
        positions = shift_sigmas(draw_density(count, self.config.density), self.config.shift)
        return (positions * (high - low) + low).floor()

    def _timestep_range(self) -> tuple[int, int]:
        """(min, max); both max if they are the wrong way round, as in the DDPM objective."""
        high = TRAINING_STEPS if self.config.max_timestep is None else self.config.max_timestep
        return min(self.config.min_timestep or 0, high), high


# --- shared ------------------------------------------------------------------------------------------------
def _spread(values: Tensor) -> Tensor:
    """[B] -> [B,1,1,1]."""
    return values[:, None, None, None]


def _check_choice(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"The {what} {value!r} is unknown; choose one of {', '.join(allowed)}.")


def _check_timestep_range(low: int | None, high: int | None) -> None:
    for option, value in (("--min_timestep", low), ("--max_timestep", high)):
        if value is not None and not 0 <= value <= TRAINING_STEPS:
            raise ValueError(f"{option} must be between 0 and {TRAINING_STEPS}, not {value}.")
