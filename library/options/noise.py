"""Options for the noise that is added to latents and for the timesteps."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class NoiseOptions:
    noise_offset: float | None = option("shift each channel's noise by this much times a random number", type="float")
    noise_offset_random_strength: bool = flag("multiply the noise offset by a random number in 0..1")
    multires_noise_iterations: int | None = option("add this many coarser layers of noise (pyramid noise)", type="int")
    multires_noise_discount: float = option("strength of a coarser layer relative to the one before", 0.3, type="float")
    ip_noise_gamma: float | None = option("perturb the noised input by this much, e.g. 0.1", type="float")
    ip_noise_gamma_random_strength: bool = flag("multiply the input perturbation by a random number in 0..1")
    adaptive_noise_scale: float | None = option(
        "add this much times the latents' mean to the noise offset (needs --noise_offset)", type="float"
    )
    zero_terminal_snr: bool = flag("change the noise schedule so that the last step is pure noise")
    min_timestep: int | None = option("smallest timestep (default: 0)", type="int")
    max_timestep: int | None = option("upper end of the timesteps, itself not used (default: 1000)", type="int")
