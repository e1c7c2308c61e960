"""Options that trade speed for memory."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class MemoryOptions:
    blocks_to_swap: int | None = option("keep this many blocks in main memory and swap them in when used", type="int")
    double_blocks_to_swap: int | None = option("old form of --blocks_to_swap: double blocks", type="int")
    single_blocks_to_swap: int | None = option("old form of --blocks_to_swap: single blocks", type="int")
    mem_eff_save: bool = flag("write the model tensor by tensor: needs less memory")
    blockwise_fused_optimizers: bool = flag("one optimizer per block, stepped during the backward pass")
    fused_optimizer_groups: int | None = option(
        "this many optimizers, each stepped during the backward pass as soon as its gradients are there", type="int",
        off=(0,),
    )
