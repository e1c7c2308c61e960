"""Reading and writing network files: casts, hashes in the metadata, ranks, and what in a file cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.file_kind import read_json_table
from library.checkpoints.tensors import is_safetensors, load_tensors, read_metadata, save_pickle, save_tensors
from library.hashes import sshs_hashes
from networks.peft_names import PeftSettings, has_other_names, settings_in, to_own_names

logger = logging.getLogger(__name__)

#: parts of keys that belong to algorithms which LoRA modules cannot express
FOREIGN_PARTS = ("lora_mid", "dora_scale", "hada_", "lokr_", "oft_", "glora", "lora_A", "lora_B")
_FACTORS = ("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight")


def save_network_file(
    path: str | Path, state: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write a network's tensors atomically, cast to `dtype` if given.

    A safetensors file gets `metadata` and the hashes `sshs_model_hash` and `sshs_legacy_hash` of the cast tensors;
    any other extension is a torch pickle without metadata.
    """
    tensors = {key: _for_file(value, dtype) for key, value in state.items()}
    if not is_safetensors(path):
        save_pickle(path, tensors)
        return
    texts = dict(metadata or {})
    hashes = sshs_hashes(tensors, texts)
    texts |= {"sshs_model_hash": hashes.model_hash, "sshs_legacy_hash": hashes.legacy_hash}
    save_tensors(path, tensors, metadata=texts)


def _for_file(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    copy = value.detach().to("cpu", dtype if value.is_floating_point() else None)
    return copy.clone() if copy.data_ptr() == value.data_ptr() else copy


def load_network_file(
    path: str | Path, *, encoder_prefixes: Sequence[str] = ("lora_te",), option: str = "--network_weights"
) -> dict[str, Tensor]:
    """All tensors of a network file. Raises FileNotFoundError that names the option.

    Files in the naming of diffusers or PEFT get our names (`encoder_prefixes`: ours of the model's text encoders) and
    the strengths of their settings, which stand in the metadata or in `adapter_config.json` beside the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: {path} does not exist.")
    weights = _in_their_forms(load_tensors(path), source=str(path))
    if not has_other_names(weights):
        return weights
    return to_own_names(weights, encoder_prefixes, _peft_settings(Path(path)))


def _in_their_forms(weights: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same with single numbers as alphas. Raises ValueError for an alpha of many and a factor without sides."""
    for key, value in weights.items():
        if key.endswith(".alpha"):
            if value.numel() != 1:
                raise ValueError(f"{source}: {key} has the shape {list(value.shape)}; it must be one number.")
            weights[key] = value.reshape(())
        elif key.endswith(_FACTORS) and value.dim() < 2:
            raise ValueError(
                f"{source}: {key} has the shape {list(value.shape)}; factors are matrices or convolutions."
            )
    return weights


def _peft_settings(path: Path) -> dict[str, PeftSettings]:
    config = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and config.is_file():
        return {"": PeftSettings.read(read_json_table(config))}
    return settings_in(read_metadata(path))


def ranks_and_alphas(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Module name -> (rank, alpha) of the LoRA modules in a file; a module without alpha has alpha = rank."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, value in weights.items():
        module, dot, parameter = key.partition(".")
        if not dot:
            continue
        if parameter == "alpha":
            alphas[module] = float(value.float())
        elif parameter == "lora_down.weight":
            ranks[module] = value.shape[0]
    return {module: (rank, alphas.get(module) or float(rank)) for module, rank in ranks.items()}


def with_alphas(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with alpha = rank added for modules of old files that have none."""
    complete = dict(weights)
    for module, (_, alpha) in ranks_and_alphas(weights).items():
        complete.setdefault(f"{module}.alpha", torch.tensor(alpha))
    return complete


def check_usable(weights: Mapping[str, Any], expected: Collection[str], *, source: str) -> None:
    """One warning about the keys of a file that fit nowhere; ValueError if none fits."""
    unused = [key for key in weights if key not in expected]
    if len(unused) == len(weights):
        example = next(iter(weights), "no keys at all")
        raise ValueError(
            f"{source}: none of its {len(weights)} tensors belongs to this network (first key: {example}). "
            "Is it a file for another model family or another kind of network?"
        )
    if not unused:
        return
    modules = sorted({key.partition(".")[0] for key in unused})
    foreign = sorted({part for key in unused for part in FOREIGN_PARTS if part in key.partition(".")[2]})
    reason = f" (parts of other algorithms: {', '.join(foreign)})" if foreign else ""
    logger.warning(
        "%s: %d tensors of %d modules are not used%s, for example %s",
        source, len(unused), len(modules), reason, ", ".join(modules[:5]),
    )  # fmt: skip


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str) -> None:
    """ValueError that names the first tensor with another size than the network's; ranks must agree already."""
    wrong = [key for key, value in weights.items() if key in expected and _sides(value) != _sides(expected[key])]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{source}: {len(wrong)} tensors do not fit the layers of this model, for example {key}: "
            f"{list(weights[key].shape)} in the file, {list(expected[key].shape)} needed. Is it for another model "
            "(version)?"
        )


def _sides(tensor: Tensor) -> list[int]:
    """A shape without sides of 1: matrices and 1x1 convolutions stand for each other."""
    return [side for side in tensor.shape if side != 1]


def check_ranks(weights: Mapping[str, Tensor], ranks: Mapping[str, int], *, source: str) -> None:
    """ValueError that names the first module whose rank in the file differs from the network's."""
    wrong = [
        (module, rank, ranks[module])
        for module, (rank, _) in ranks_and_alphas(weights).items()
        if module in ranks and ranks[module] != rank
    ]
    if wrong:
        module, in_file, in_network = wrong[0]
        raise ValueError(
            f"{source}: {len(wrong)} modules have another rank than the network, for example {module}: {in_file} in "
            f"the file, {in_network} in the network. Use --dim_from_weights, or set --network_dim and --network_args "
            "to match."
        )
