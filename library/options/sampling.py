"""Options for pictures drawn during training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option

SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingOptions:
    sample_every_n_steps: int | None = option("draw sample pictures every n steps", type="int")
    sample_at_first: bool = flag("draw sample pictures before the first step")
    sample_every_n_epochs: int | None = option("draw sample pictures every n epochs", type="int")
    sample_prompts: str | None = option("file with the prompts of sample pictures (.txt, .toml or .json)")
    sample_sampler: str = option("sampler of sample pictures", "ddim", choices=SAMPLERS)
