"""Options for how long training runs and how it uses memory."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class TrainingOptions:
    max_train_steps: int = option("optimizer steps to train", 1600, type="int")
    max_train_epochs: int | None = option("epochs to train; wins over --max_train_steps", type="int", off=(0,))
    seed: int | None = option("start value of all random numbers", type="int")
    gradient_checkpointing: bool = flag("recompute activations in the backward pass: less memory, slower")
    gradient_accumulation_steps: int = option("batches whose gradients are added up before each step", 1, type="int")
    cpu_offload_checkpointing: bool = flag("keep checkpointed activations in main memory")
    skip_until_initial_step: bool = flag("start counting at the initial step and skip the batches before it")
    initial_epoch: int | None = option("first epoch, counted from 1", type="int", off=(0,))
    initial_step: int | None = option("first step, counted over all epochs; wins over --initial_epoch", type="int")
    lowram: bool = flag("load models straight to the device, for machines with little main memory")
    highvram: bool = flag("do not empty the device's memory cache between steps of caching")
