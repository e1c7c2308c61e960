"""Options for training a ControlNet or ControlNet-LLLite."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True)
class ControlNetOptions:
    controlnet_model_name_or_path: str | None = option(
        "ControlNet to start from, file or Diffusers folder (default: a copy of the base model)"
    )
    controlnet_model_path: str | None = option("old name of --controlnet_model_name_or_path; wins when given")
    control_net_lr: float = option(
        "learning rate of the parts that the base model does not have", 1e-4, type="float"
    )
    cond_emb_dim: int | None = option("size of the embedding of the conditioning image (default: 32)", type="int")
