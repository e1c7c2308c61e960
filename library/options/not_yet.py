"""The options that are declared but do not work yet; using one ends the script with status 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from library.options import Options, non_default
from library.options.declare import specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.hub import HubOptions
from library.options.validation import ValidationOptions


@dataclass(frozen=True)
class NotYet:
    """Why an option does not work yet; `values` limits that to some values (default: all but the default value)."""

    reason: str
    values: tuple[Any, ...] | None = None


NOT_YET: Mapping[str, NotYet] = MappingProxyType(
    {
        **{spec.name: NotYet("DeepSpeed is not supported yet") for spec in specs_of(DeepSpeedOptions)},
        **{spec.name: NotYet("the Hugging Face hub is not supported yet") for spec in specs_of(HubOptions)},
        **{spec.name: NotYet("validation is not supported yet") for spec in specs_of(ValidationOptions)},
        "fp8_base": NotYet("8-bit base weights are not supported yet"),
        "fp8_base_unet": NotYet("8-bit base weights are not supported yet"),
        "torch_compile": NotYet("compiling the model is not supported yet"),
        "dynamo_backend": NotYet("compiling the model is not supported yet"),
        "cpu_offload_checkpointing": NotYet("moving activations to main memory is not supported yet"),
        "log_with": NotYet("Weights & Biases is not supported yet; use tensorboard", values=("wandb", "all")),
        "wandb_run_name": NotYet("Weights & Biases is not supported yet"),
        "wandb_api_key": NotYet("Weights & Biases is not supported yet"),
        "fused_backward_pass": NotYet("stepping inside the backward pass is not supported yet"),
        "in_json": NotYet("metadata files are not supported yet; use caption files"),
        "dataset_class": NotYet("dataset classes of your own are not supported yet"),
    }
)


def unsupported(options: Options, table: Mapping[str, NotYet] = NOT_YET) -> list[str]:
    """One sentence for each option of `table` whose value differs from the script's default."""
    return [
        f"--{name}: {table[name].reason}."
        for name, value in non_default(options).items()
        if name in table and (table[name].values is None or value in table[name].values)
    ]
