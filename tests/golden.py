"""Access to the recorded runs in `tests/data/golden`: options, per-step records, stored tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class GoldenRun:
    """One recorded run; `tensors` holds `latents.<key>`, `noise.<i>`, `timesteps.<i>`."""

    name: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.record["steps"]

    @property
    def initial_weights(self) -> dict[str, Tensor]:
        """The network's lora_down tensors before the first step."""
        return load_file(FOLDER / "runs" / "init" / self.record["initial_lora_down_file"])


def golden_run(name: str) -> GoldenRun:
    """Read one run."""
    folder = FOLDER / "runs"
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return GoldenRun(name, record, load_file(folder / f"{name}.safetensors"))
