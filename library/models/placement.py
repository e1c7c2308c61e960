"""Where a module lies and in which number format, whatever a network has taken out of it."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


def a_tensor_of(module: nn.Module) -> Tensor:
    """The first parameter (or buffer) that a module has now, which tells its device and number format.

    Networks may take the weight of any single layer away (LyCORIS' `full` does), so no layer is asked by name.
    """
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        raise ValueError(f"{type(module).__name__} has no weights left that tell its device and number format.")
    return tensor
