"""Samplers: a table name -> diffusers scheduler, and the loop's view of all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from library.sampling_spec import SamplingSpec


class Sampler(Protocol):
    """One run backwards through a noise process; holds the state of multistep methods.

    A step is one of the steps that were asked for, numbered from 0; some methods call the model more than once in it.
    """

    timesteps: list[float]  # what the denoiser is told, one per model call that is left, in [0, 1000]
    step_of_call: list[int]  # the step that each of these calls belongs to
    initial_sigma: float  # factor of the starting noise

    def noised(self, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        """The state in which `step` begins if `x0` is the image; after the last step that is `x0` itself."""

    def model_input(self, x: Tensor, index: int) -> Tensor:
        """`x` scaled as the denoiser expects it at model call `index`."""

    def step(self, prediction: Tensor, x: Tensor, index: int, generators: Sequence[Generator]) -> Tensor:
        """The state after model call `index`; noise for row i comes from generators[i]."""


@dataclass(frozen=True)
class SamplerChoice:
    """A diffusers scheduler class (by name, so that nothing is imported early) and its arguments."""

    scheduler: str
    arguments: dict[str, Any] = field(default_factory=dict)
    noises_per_step: int = 1  # set aside in an image's stream of noise, whether they are used or not
    steps_offset: int = 1  # of image to image: steps between the noise level of the start and the first step


_STEPS_OFFSET = {"steps_offset": 1}
_LMS = SamplerChoice("LinearMultistepScheduler")
_EULER = SamplerChoice("EulerDiscreteScheduler", _STEPS_OFFSET)
_EULER_ANCESTRAL = SamplerChoice("EulerAncestralDiscreteScheduler", _STEPS_OFFSET)
_KDPM2 = SamplerChoice("KDPM2DiscreteScheduler", _STEPS_OFFSET)
_KDPM2_ANCESTRAL = SamplerChoice("KDPM2AncestralDiscreteScheduler", _STEPS_OFFSET, noises_per_step=2)

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
    # lower_order_final is needed to end at zero
    "dpmsingle": SamplerChoice("DPMSolverSinglestepScheduler", {"lower_order_final": True}, steps_offset=0),
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


def sampler_name(name: str, spec: SamplingSpec) -> str:
    """What really draws when `name` is asked for: rectified flow is always followed in Euler steps."""
    return name if spec.flow_sigmas is None else "euler"


@dataclass(frozen=True)
class Start:
    """Where sampling begins: its first step, and how noisy the image is that it starts from."""

    first_step: int = 0
    noise_step: int = 0  # the step whose noise level the starting image has
    zero_offset: bool = False  # timesteps counted from 0 instead of 1 (`--force_scheduler_zero_steps_offset`)


def start_from_image(name: str, steps: int, strength: float, *, zero_offset: bool = False) -> Start:
    """Where image to image begins: about steps * strength steps are left, none for strength 0.

    The noise level lies one step before the first step, unless `zero_offset`.
    """
    offset = 0 if zero_offset else SAMPLERS[name].steps_offset
    noisy_steps = min(int(steps * strength) + offset, steps)
    return Start(max(steps - noisy_steps + offset, 0), steps - noisy_steps, zero_offset)


def make_sampler(
    name: str, spec: SamplingSpec, steps: int, latent_hw: tuple[int, int], *,
    flow_shift: float | None = None, device: torch.device | str = "cpu", start: Start = Start(),  # noqa: B008
) -> Sampler:
    """A fresh sampler for the steps from `start` to `steps`. Rectified flow has one sampler (Euler), whatever the name.

    Raises ValueError for an unknown name, or for one that cannot run the model's noise schedule.
    """
    if spec.flow_sigmas is not None:
        return FlowEulerSampler(spec.flow_sigmas(steps, latent_hw, flow_shift), start.first_step)
    check_sampler(name, "sampler")
    # Runge-Kutta steps cannot begin in the middle, and need a fourth step to go on from
    changes: dict[str, Any] = {"skip_prk_steps": True} if name == "pndm" and (start.first_step or steps < 4) else {}
    takes_all = spec.betas is not None and steps >= len(spec.betas)  # no timestep is left above the last one
    if (start.zero_offset or takes_all) and "steps_offset" in SAMPLERS[name].arguments:
        changes["steps_offset"] = 0
    return DiffusersSampler(_make_scheduler(name, spec, changes), steps, device, start.first_step)


def _make_scheduler(name: str, spec: SamplingSpec, changes: Mapping[str, Any]) -> Any:
    choice = SAMPLERS[name]
    constructor = _constructor(choice)
    betas = [] if spec.betas is None else spec.betas.tolist()
    arguments = {**choice.arguments, **changes, "trained_betas": betas, "prediction_type": spec.prediction_type}
    if spec.has_zero_terminal_snr:
        if not _knows_zero_terminal_snr(constructor):
            able = [other for other, choice in SAMPLERS.items() if _knows_zero_terminal_snr(_constructor(choice))]
            raise ValueError(f"sampler '{name}' cannot start from zero terminal SNR. Choose one of {', '.join(able)}")
        arguments["rescale_betas_zero_snr"] = True  # does not move betas that are rescaled already
        if spec.prediction_type == "v_prediction":  # a prediction of noise says nothing at the last step
            arguments["timestep_spacing"] = "trailing"  # begins at the last step (Lin et al. 2023, section 3.3)
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

    def __init__(self, scheduler: Any, steps: int, device: torch.device | str, first_step: int = 0) -> None:
        scheduler.set_timesteps(steps, device=device)
        self.scheduler = scheduler
        self.initial_sigma = float(scheduler.init_noise_sigma)
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        steps_of_all_calls = _steps_of_calls(scheduler, steps)
        starts = [steps_of_all_calls.index(step) for step in range(steps)]
        self._levels = [*(_level(scheduler, call) for call in starts), (1.0, 0.0)]
        first_call = starts[first_step]
        self._timesteps = list(scheduler.timesteps)[first_call:]
        self.step_of_call = steps_of_all_calls[first_call:]
        if first_step and hasattr(scheduler, "plms_timesteps") and len(self._timesteps) > 1:
            self._timesteps.insert(1, self._timesteps[1])  # its second call corrects the first step
            self.step_of_call.insert(1, first_step)
        if first_step and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_call)
        self.timesteps = [float(t) for t in self._timesteps]

    def noised(self, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        signal, amount = self._levels[step]
        return signal * x0 + amount * noise

    def model_input(self, x: Tensor, index: int) -> Tensor:
        return self.scheduler.scale_model_input(x, self._timesteps[index])

    def step(self, prediction: Tensor, x: Tensor, index: int, generators: Sequence[Generator]) -> Tensor:
        arguments = {"generator": list(generators)} if self._takes_generator else {}
        return self.scheduler.step(prediction, self._timesteps[index], x, return_dict=False, **arguments)[0]


def _steps_of_calls(scheduler: Any, steps: int) -> list[int]:
    """The step of each of a scheduler's timesteps."""
    if hasattr(scheduler, "plms_timesteps"):
        warm_up = [step for step in range(3) for _ in range(4)] if len(scheduler.prk_timesteps) else [0][: steps - 1]
        return warm_up + list(range(3 if len(scheduler.prk_timesteps) else 0, steps))
    calls = 2 if getattr(type(scheduler), "order", 1) == 2 else 1
    return [call // calls for call in range(calls * steps)][: len(scheduler.timesteps)]


def _level(scheduler: Any, call: int) -> tuple[float, float]:
    """(factor of the image, factor of the noise) in the state of a scheduler before a model call."""
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[call])
        return float(alpha), float(sigma)
    if hasattr(scheduler, "sigmas"):
        return 1.0, float(scheduler.sigmas[call])
    abar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[call])])
    return abar**0.5, (1 - abar) ** 0.5


class FlowEulerSampler:
    """Euler's method on dx/dsigma = v for rectified flow (Liu et al. 2022); timesteps are 1000 * sigma."""

    def __init__(self, sigmas: Tensor, first_step: int = 0) -> None:
        self._all_sigmas = [float(sigma) for sigma in sigmas]
        self.sigmas = self._all_sigmas[first_step:]
        self.timesteps = [1000.0 * sigma for sigma in self.sigmas[:-1]]
        self.step_of_call = list(range(first_step, len(self._all_sigmas) - 1))
        self.initial_sigma = self._all_sigmas[0]

    def noised(self, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        return torch.lerp(x0, noise, self._all_sigmas[step])

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
        self.sigmas = np.append(np.interp(timesteps, np.arange(len(self._all_sigmas)), self._all_sigmas), 0.0)
        self._index_of = {float(np.float32(t)): index for index, t in enumerate(timesteps)}
        self.timesteps = torch.from_numpy(timesteps).to(device=device, dtype=torch.float32)
        self.init_noise_sigma = float(self.sigmas[0])

    def scale_model_input(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x / float(self.sigmas[self._index_of[float(timestep)]] ** 2 + 1) ** 0.5

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        index = self._index_of[float(timestep)]
        sigma = float(self.sigmas[index])
        if self._is_v:  # epsilon in terms of v and of the unscaled state: x = x0 + sigma * epsilon
            scale = (sigma**2 + 1) ** 0.5
            prediction = prediction / scale + x * (sigma / scale**2)
        self._derivatives = [prediction, *self._derivatives][: self.order]
        weights = self._weights(index, len(self._derivatives))
        return (x + sum(w * d for w, d in zip(weights, self._derivatives, strict=True)),)

    def _weights(self, index: int, order: int) -> list[float]:
        """Integrals over [sigma_i, sigma_(i+1)] of the Lagrange basis through the last `order` sigmas."""
        nodes = [self.sigmas[index - k] for k in range(order)]
        weights = []
        for k, node in enumerate(nodes):
            others = [other for j, other in enumerate(nodes) if j != k]
            numerator = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
            integral = (numerator / np.prod([node - other for other in others])).integ()
            weights.append(float(integral(self.sigmas[index + 1]) - integral(self.sigmas[index])))
        return weights
