"""Step hooks: what may look at, and change, a batch while it is denoised. All of them have one signature.

The engine asks every `HookFactory` once per batch for a `StepHook` and calls the hooks, in order, at three moments of
every model call:

* "before" the model is called: `x` is the state (switching parts of a model by `timestep` belongs here);
* "predicted": `prediction` is the guided prediction, both may be replaced (guidance by a loss, growing latents);
* "after" the sampler's step: `x` is the new state (blending with a known image).

A hook returns the state it was given, or a copy with another `x` or `prediction` (`dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from library.families.base import Conditioning, ModelFamily, SizeConditioning
from library.generation.request import ImageRequest
from library.generation.samplers import Sampler


@dataclass(frozen=True)
class Drawing:
    """One batch that is being drawn: what stays the same in all of its steps."""

    family: ModelFamily
    requests: Sequence[ImageRequest]  # one per image
    sampler: Sampler
    conditioning: Conditioning  # all rows of guidance
    sizes: SizeConditioning
    predict: Callable[..., Tensor]  # `engine.Predict`
    generators: Sequence[Generator]  # of sampler noise, one per image
    dtype: torch.dtype  # what the denoiser gets


@dataclass(frozen=True)
class StepState:
    """A moment of one model call; `x` and `prediction` are float32 [B,C,h,w]."""

    moment: Literal["before", "predicted", "after"]
    drawing: Drawing
    call: int  # index of the model call, from 0
    step: int  # the step that the call belongs to, counted from 0 over all steps that were asked for
    timestep: float
    is_last_call: bool  # of its step
    x: Tensor
    prediction: Tensor | None = None


StepHook = Callable[[StepState], StepState]
HookFactory = Callable[[Drawing], StepHook | None]  # None: nothing to do for this batch


def run_hooks(hooks: Sequence[StepHook], state: StepState) -> StepState:
    """`state` after all hooks."""
    for hook in hooks:
        state = hook(state)
    return state


class KeepOutsideMask:
    """Inpainting: after every step the kept area becomes the original image at the noise level of the next step.

    After the last step that is the image itself. `latents` and `noise` are float32 [B,C,h,w]; `keep` [B,1,h,w] in
    [0,1] is 1 where the image is kept.
    """

    def __init__(self, latents: Tensor, noise: Tensor, keep: Tensor) -> None:
        self.latents = latents
        self.noise = noise
        self.keep = keep

    def __call__(self, state: StepState) -> StepState:
        if state.moment != "after" or not state.is_last_call:
            return state
        known = state.drawing.sampler.noised(self.latents, self.noise, state.step + 1)
        return replace(state, x=torch.lerp(state.x, known, self.keep))


def state_of_call(drawing: Drawing, call: int, x: Tensor) -> StepState:
    """The moment before model call `call`."""
    steps = drawing.sampler.step_of_call
    is_last = call + 1 == len(steps) or steps[call + 1] != steps[call]
    fields: dict[str, Any] = {"step": steps[call], "timestep": drawing.sampler.timesteps[call], "is_last_call": is_last}
    return StepState("before", drawing, call, x=x, **fields)
