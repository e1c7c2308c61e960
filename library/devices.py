"""The devices of this machine: seeds of all random generators, and giving cached memory back."""

from __future__ import annotations

import gc
import random


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and every torch generator. `seed` is in [0, 2**32 - 1], else ValueError."""
    if not 0 <= seed <= 2**32 - 1:
        raise ValueError(f"--seed {seed} is not allowed: it must be between 0 and {2**32 - 1}.")
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # seeds the accelerators' generators too


def empty_cache() -> None:
    """Free unreachable objects and give the device's cached memory back to the system; harmless on a CPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()


def preferred_device() -> str:
    """The device for a script that uses one: cuda, xpu or mps where there is one, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"
