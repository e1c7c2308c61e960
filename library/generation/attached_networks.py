"""LoRA and other networks in a script that draws: merged into the model, hooked in, or folded in before each batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.tensors import read_metadata
from library.families.base import ModelFamily
from library.options.generation import AttachedNetworkOptions
from library.options.generation_checks import network_arguments
from networks import contract

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkFile:
    """One network of the command line."""

    module: str
    path: str
    multiplier: float = 1.0
    arguments: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.path} (x {self.multiplier:g})"


def network_files(options: AttachedNetworkOptions) -> list[NetworkFile]:
    """The networks that the options name; the n-th entries of all lists belong together."""
    multipliers, arguments = options.network_mul or (), options.network_args or ()
    return [
        NetworkFile(
            module, path,
            multipliers[index] if index < len(multipliers) else 1.0,
            tuple(network_arguments(arguments[index]).items()) if index < len(arguments) else (),
        )
        for index, (module, path) in enumerate(
            zip(options.network_module or (), options.network_weights or (), strict=True)
        )
    ]  # fmt: skip


class AttachedNetworks:
    """The networks of a run: `merged` ones have become part of the model, `hooked` ones follow the multipliers."""

    def __init__(self) -> None:
        self.merged: list[NetworkFile] = []
        self.hooked: list[NetworkFile] = []
        self.networks: list[Any] = []  # of `hooked`; modules with the members that `networks.contract` names
        self._folded: list[Any] = []
        self._multipliers: tuple[float, ...] | None = None

    @property
    def default_multipliers(self) -> tuple[float, ...] | None:
        """The multipliers of the command line, one per network that is not merged; None without any."""
        return tuple(file.multiplier for file in self.hooked) or None

    def add_merged(self, file: NetworkFile) -> None:
        """Note a network whose change is in the model's weights."""
        self.merged.append(file)

    def add_hooked(self, file: NetworkFile, network: Any) -> None:
        """Note a network that is hooked into the model."""
        self.hooked.append(file)
        self.networks.append(network)

    def fold_in(self) -> None:
        """From now on add all changes to the model's weights before each batch, instead of running hooks."""
        for network, file in zip(self.networks, self.hooked, strict=True):
            if hasattr(network, "pre_calculation"):
                network.backup_weights()
                self._folded.append(network)
            else:
                logger.warning("--network_pre_calc has no effect on %s: %s cannot do it", file.path, file.module)

    def set_multipliers(self, multipliers: Sequence[float] | None) -> None:
        """Give the networks the strengths of the next batch (None: those of the command line)."""
        wanted = tuple(multipliers) if multipliers is not None else self.default_multipliers
        if wanted is None or wanted == self._multipliers:
            return
        for network in self._folded:
            network.restore_weights()
        for network, multiplier in zip(self.networks, wanted, strict=True):
            network.set_multiplier(multiplier)
        for network in self._folded:
            network.pre_calculation()
        self._multipliers = wanted

    def described(self, multipliers: Sequence[float] | None) -> str:
        """All networks with their strengths, as image files record them."""
        strengths = tuple(multipliers) if multipliers is not None else self.default_multipliers or ()
        files = [(file.path, file.multiplier) for file in self.merged]
        files += [(file.path, strength) for file, strength in zip(self.hooked, strengths, strict=True)]
        return ", ".join(f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{strength:g}" for path, strength in files)


def attach_networks(
    options: AttachedNetworkOptions, family: ModelFamily, *, device: torch.device | str, dtype: torch.dtype
) -> AttachedNetworks:
    """Load all networks of the options into a loaded family.

    With `--network_merge` all, with `--network_merge_n_models` n the first n become part of the model's weights (in
    float32, kept in `dtype`); the others are hooked in, or with `--network_pre_calc` folded in before each batch.
    Raises ValueError or FileNotFoundError that names the module or file.
    """
    attached = AttachedNetworks()
    files = network_files(options)
    merged_count = len(files) if options.network_merge else options.network_merge_n_models or 0
    models = contract.HostModels(family.vae, family.network_text_encoders(), family.denoiser)
    for index, file in enumerate(files):
        logger.info("network: %s", file)
        if options.network_show_meta:
            print(f"metadata of {file.path}: {json.dumps(read_metadata(file.path), indent=4, ensure_ascii=False)}")
        network: Any
        network, weights = contract.create_for_generation(
            file.module, file.path, models, file.multiplier, dict(file.arguments)
        )
        if index < merged_count and _can_merge(network, file):
            network.merge_to(models.text_encoder, models.unet, weights, dtype, device)
            attached.add_merged(file)
        else:
            _hook_in(network, weights, file, models)
            attached.add_hooked(file, network.to(device, dtype).eval().requires_grad_(False))
    if options.network_pre_calc:
        attached.fold_in()
    return attached


def _can_merge(network: Any, file: NetworkFile) -> bool:
    """Whether a network can be merged so that it draws as if it were hooked in; warns if not.

    Only networks with the whole interface of generation do so: LyCORIS's merge ignores the multiplier, and its LoKr
    (4.1) applies alpha / rank twice.
    """
    if hasattr(network, "merge_to") and hasattr(network, "pre_calculation") and contract.is_mergeable(network):
        return True
    logger.warning("%s is not merged but hooked in: networks of %s cannot be merged exactly", file.path, file.module)
    return False


def _hook_in(network: Any, weights: dict[str, Tensor], file: NetworkFile, models: contract.HostModels) -> None:
    contract.apply(network, models, True, True)
    if hasattr(network, "load_weights"):
        report = contract.load_weights(network, file.path)
    else:
        report = network.load_state_dict(weights, strict=False)
    unused = contract.check_loaded(network, weights, report)
    if unused and not hasattr(network, "convert_weights"):  # networks of this project have said so themselves
        logger.warning(
            "%s: %d of %d tensors are not used: %s", file.path, len(unused), len(weights), ", ".join(unused[:5])
        )
