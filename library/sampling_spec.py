"""What drawing images must know about a model: its noise process and the values its prompts start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# (steps, latent height and width, shift or None for the model's own) -> sigmas [steps + 1], falling to 0
FlowSigmas = Callable[[int, tuple[int, int], "float | None"], "Tensor"]


@dataclass(frozen=True)
class SamplingDefaults:
    """What a prompt gets that says nothing else; sizes are pixels."""

    width: int = 512
    height: int = 512
    size_multiple: int = 8  # sizes are rounded down to it
    steps: int = 30
    scale: float = 7.5  # classifier-free guidance
    guidance_scale: float | None = None  # embedded guidance; None: the model has none

    def request_fields(self) -> dict[str, Any]:
        """The starting values of an image request."""
        return {
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "scale": self.scale,
            "guidance_scale": self.guidance_scale,
        }


@dataclass(frozen=True)
class SamplingSpec:
    """A model's noise process, to be run backwards. Exactly one of `betas` and `flow_sigmas` is given.

    With `betas` [T] the denoiser predicts what `prediction_type` says ("epsilon" or "v_prediction") at timesteps
    0..T-1. With `flow_sigmas` it predicts the velocity noise - x0 at timesteps 1000 * sigma.
    """

    betas: Tensor | None = None
    prediction_type: str = "epsilon"
    flow_sigmas: FlowSigmas | None = None
    defaults: SamplingDefaults = SamplingDefaults()
    uses_sizes: bool = False  # whether the model is conditioned on sizes and crops
    noise_on_cpu: bool = False  # starting noise from a CPU generator in float32, whatever the device

    def __post_init__(self) -> None:
        if (self.betas is None) == (self.flow_sigmas is None):
            raise ValueError("A sampling spec needs either betas (DDPM) or flow sigmas (rectified flow), not both")

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last step of the DDPM table is pure noise."""
        return self.betas is not None and float(self.betas[-1]) >= 1.0 - 1e-6
