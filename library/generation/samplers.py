"""Samplers: a table name -> diffusers scheduler, and the loop's view of all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from library.sampling_spec import SamplingSpec


class Sampler(Protocol):
    """One run backwards through a noise process; holds the state of multistep methods."""

    timesteps: list[float]  # what the denoiser is told, one per model call, in [0, 1000]
    initial_sigma: float  # factor of the starting noise

    def model_input(self, x: Tensor, index: int) -> Tensor:
        """`x` scaled as the denoiser expects it at model call `index`."""

    def step(self, prediction: Tensor, x: Tensor, index: int, generators: Sequence[Generator]) -> Tensor:
        """The state after model call `index`; noise for row i comes from generators[i]."""


@dataclass(frozen=True)
class SamplerChoice:
    """A diffusers scheduler class (by name, so that nothing is imported early) and its arguments."""

    scheduler: str
    arguments: dict[str, Any] = field(default_factory=dict)


_STEPS_OFFSET = {"steps_offset": 1}
_LMS = SamplerChoice("LinearMultistepScheduler")
_EULER = SamplerChoice("EulerDiscreteScheduler", _STEPS_OFFSET)
_EULER_ANCESTRAL = SamplerChoice("EulerAncestralDiscreteScheduler", _STEPS_OFFSET)
_KDPM2 = SamplerChoice("KDPM2DiscreteScheduler", _STEPS_OFFSET)
_KDPM2_ANCESTRAL = SamplerChoice("KDPM2AncestralDiscreteScheduler", _STEPS_OFFSET)

SAMPLERS: dict[str, SamplerChoice] = {
    "ddim": SamplerChoice("DDIMScheduler", {**_STEPS_OFFSET, "clip_sample": False}),
    "pndm": SamplerChoice("PNDMScheduler", _STEPS_OFFSET),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_ANCESTRAL,
    "heun": SamplerChoice("HeunDiscreteScheduler", _STEPS_OFFSET),
    "dpm_2": _KDPM2,
    "dpm_2_a": _KDPM2_ANCESTRAL,
    # the first algorithm divides by the last sigma, so it cannot end at zero
    "dpmsolver": SamplerChoice(
        "DPMSolverMultistepScheduler",
        {**_STEPS_OFFSET, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": SamplerChoice("DPMSolverMultistepScheduler", {**_STEPS_OFFSET, "algorithm_type": "dpmsolver++"}),
    "dpmsingle": SamplerChoice("DPMSolverSinglestepScheduler", {"lower_order_final": True}),  # needed to end at zero
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_ANCESTRAL,
    "k_dpm_2": _KDPM2,
    "k_dpm_2_a": _KDPM2_ANCESTRAL,
}


def check_sampler(name: str, origin: str) -> None:
    """Raise ValueError unless `name` is in the table; `origin` says where it was given."""
    if name not in SAMPLERS:
        raise ValueError(f"{origin}: there is no sampler '{name}'. Choose one of {', '.join(SAMPLERS)}")


def make_sampler(
    name: str, spec: SamplingSpec, steps: int, latent_hw: tuple[int, int], *,
    flow_shift: float | None = None, device: torch.device | str = "cpu",
) -> Sampler:
    """A fresh sampler for `steps` steps. Rectified flow has one sampler (Euler), whatever the name.

    Raises ValueError for an unknown name, or for one that cannot run the model's noise schedule.
    """
    if spec.betas is None:
        return FlowEulerSampler(spec.flow_sigmas(steps, latent_hw, flow_shift))
    check_sampler(name, "sampler")
    return DiffusersSampler(_make_scheduler(name, spec), steps, device)


def _make_scheduler(name: str, spec: SamplingSpec) -> Any:
    choice = SAMPLERS[name]
    constructor = _constructor(choice)
    betas = spec.betas.tolist()
    arguments = {**choice.arguments, "trained_betas": betas, "prediction_type": spec.prediction_type}
    if spec.has_zero_terminal_snr:
        if not _knows_zero_terminal_snr(constructor):
            able = [other for other, choice in SAMPLERS.items() if _knows_zero_terminal_snr(_constructor(choice))]
            raise ValueError(f"sampler '{name}' cannot start from zero terminal SNR. Choose one of {', '.join(able)}")
        arguments["rescale_betas_zero_snr"] = True  # does not move betas that are rescaled already
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers would like to drop the algorithm "dpmsolver"
        return constructor(num_train_timesteps=len(betas), **arguments)


def _constructor(choice: SamplerChoice) -> Any:
    if choice is _LMS:
        return LinearMultistepScheduler
    import diffusers

    return getattr(diffusers, choice.scheduler)


def _knows_zero_terminal_snr(constructor: Any) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(constructor.__init__).parameters


class DiffusersSampler:
    """A diffusers scheduler behind the `Sampler` interface; computes in float32."""

    def __init__(self, scheduler: Any, steps: int, device: torch.device | str) -> None:
        scheduler.set_timesteps(steps, device=device)
        self.scheduler = scheduler
        self._timesteps = list(scheduler.timesteps)
        self.timesteps = [float(t) for t in self._timesteps]
        self.initial_sigma = float(scheduler.init_noise_sigma)
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return self.scheduler.scale_model_input(x, self._timesteps[index])

    def step(self, prediction: Tensor, x: Tensor, index: int, generators: Sequence[Generator]) -> Tensor:
        arguments = {"generator": list(generators)} if self._takes_generator else {}
        return self.scheduler.step(prediction, self._timesteps[index], x, return_dict=False, **arguments)[0]


class FlowEulerSampler:
    """Euler's method on dx/dsigma = v for rectified flow (Liu et al. 2022); timesteps are 1000 * sigma."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.timesteps = [1000.0 * sigma for sigma in self.sigmas[:-1]]
        self.initial_sigma = self.sigmas[0]

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return x

    def step(self, prediction: Tensor, x: Tensor, index: int, generators: Sequence[Generator]) -> Tensor:
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * prediction


class LinearMultistepScheduler:
    """Linear multistep (Adams-Bashforth) of order 4 over sigmas, as in k-diffusion's `sample_lms`.

    Has the interface of a diffusers scheduler. (The one in diffusers needs scipy for its integrals; here the
    Lagrange polynomials are integrated exactly.)
    """

    order = 4

    def __init__(self, num_train_timesteps: int, trained_betas: list[float], prediction_type: str) -> None:
        alphas_cumprod = np.cumprod(1.0 - np.asarray(trained_betas, dtype=np.float64))
        self._all_sigmas = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
        self._is_v = prediction_type == "v_prediction"
        self._derivatives: list[Tensor] = []

    def set_timesteps(self, steps: int, device: torch.device | str) -> None:
        timesteps = np.linspace(0, len(self._all_sigmas) - 1, steps)[::-1].copy()
        self._sigmas = np.append(np.interp(timesteps, np.arange(len(self._all_sigmas)), self._all_sigmas), 0.0)
        self._index_of = {float(np.float32(t)): index for index, t in enumerate(timesteps)}
        self.timesteps = torch.from_numpy(timesteps).to(device=device, dtype=torch.float32)
        self.init_noise_sigma = float(self._sigmas[0])

    def scale_model_input(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x / float(self._sigmas[self._index_of[float(timestep)]] ** 2 + 1) ** 0.5

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        index = self._index_of[float(timestep)]
        sigma = float(self._sigmas[index])
        if self._is_v:  # epsilon in terms of v and of the unscaled state: x = x0 + sigma * epsilon
            scale = (sigma**2 + 1) ** 0.5
            prediction = prediction / scale + x * (sigma / scale**2)
        self._derivatives = [prediction, *self._derivatives][: self.order]
        weights = self._weights(index, len(self._derivatives))
        return (x + sum(w * d for w, d in zip(weights, self._derivatives, strict=True)),)

    def _weights(self, index: int, order: int) -> list[float]:
        """Integrals over [sigma_i, sigma_(i+1)] of the Lagrange basis through the last `order` sigmas."""
        nodes = [self._sigmas[index - k] for k in range(order)]
        weights = []
        for k, node in enumerate(nodes):
            others = [other for j, other in enumerate(nodes) if j != k]
            numerator = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
            integral = (numerator / np.prod([node - other for other in others])).integ()
            weights.append(float(integral(self._sigmas[index + 1]) - integral(self._sigmas[index])))
        return weights
