"""A network: all adapters of one model together, as trainers and generators use them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.finite import check_finite
from networks.adapter import Adapter
from networks.groups import OptimizerGroups, PlusRatios, rates_per_encoder
from networks.targets import Target, find_targets
from networks.weights_file import (
    as_own_lora,
    check_denoiser_fits,
    check_ranks,
    check_shapes,
    check_usable,
    load_network_file,
    save_network_file,
    with_alphas,
)

logger = logging.getLogger(__name__)

RankAndAlpha = tuple[int, float]
RankRule = Callable[[Target], RankAndAlpha | None]
MakeAdapter = Callable[[Target, RankAndAlpha], Adapter]


@dataclass(frozen=True)
class NetworkSettings:
    """What the adapters of a network share; ranks and alphas here are the defaults that were asked for."""

    rank: int
    alpha: float
    multiplier: float = 1.0
    conv_rank: int | None = None
    conv_alpha: float | None = None
    plus: PlusRatios = PlusRatios()


@dataclass(frozen=True)
class EncoderAdapters:
    """The adapters of one text encoder, whose names all begin with `prefix`."""

    prefix: str
    adapters: list[Adapter]


def make_adapters(targets: Sequence[Target], rank_of: RankRule, make: MakeAdapter) -> tuple[list[Adapter], list[str]]:
    """(adapters in the order of `targets`, names of the targets whose rank is None or 0)."""
    adapters: list[Adapter] = []
    skipped: list[str] = []
    for target in targets:
        choice = rank_of(target)
        if choice is None or choice[0] == 0:
            skipped.append(target.name)
        else:
            adapters.append(make(target, choice))
    return adapters, skipped


def encoder_adapters(
    encoders: Sequence[tuple[str, nn.Module | None]], class_names: Collection[str], rank_of: RankRule, make: MakeAdapter
) -> tuple[list[EncoderAdapters], list[str]]:
    """(adapters per (name prefix, text encoder), names of the layers that got none); an encoder may be None.

    Raises ValueError for an encoder that has no layers in modules of these classes.
    """
    result, skipped = [], []
    for prefix, encoder in encoders:
        targets = [] if encoder is None else find_targets(encoder, prefix, class_names)
        if encoder is not None and not targets:
            raise ValueError(
                f"{type(encoder).__name__} has no layers that a network can adapt: expected Linear layers inside "
                f"{', '.join(class_names)}."
            )
        adapters, names = make_adapters(targets, rank_of, make)
        result.append(EncoderAdapters(prefix, adapters))
        skipped += names
    return result, skipped


def given_weights(
    file: str | os.PathLike[str] | None, weights_sd: Mapping[str, Tensor] | None, family: str | None,
    encoder_prefixes: Sequence[str],
) -> dict[str, Tensor]:
    """A copy of `weights_sd`, or the tensors of `file`, under our key names.

    Raises ValueError for files of other algorithms, and of other families than the model's.
    """
    if weights_sd is not None:
        return as_own_lora(weights_sd, family, encoder_prefixes=encoder_prefixes, source="the network")
    if file is not None:
        return load_network_file(Path(file), family, encoder_prefixes=encoder_prefixes, option="the network file")
    raise ValueError("Neither a network file nor its tensors were given.")


def check_left_over(in_file: Collection[str], network: AdapterNetwork) -> None:
    """One warning about the modules of a file that have no layer in this model.

    Raises ValueError if the file is for a denoiser and nothing of it fits this one.
    """
    check_denoiser_fits(in_file, {adapter.lora_name for adapter in network.unet_loras})
    left = sorted(set(in_file) - {adapter.lora_name for adapter in network.adapters})
    if left:
        logger.warning("%d modules of the file have no layer in this model: %s", len(left), ", ".join(left[:10]))


class AdapterNetwork(nn.Module):
    """Adapters for text encoders and a denoiser.

    The members are the interface that trainers expect of any network (`networks.contract`). Subclasses are one
    algorithm for one family: they find targets, decide ranks, and may refine the groups of the denoiser.
    """

    LORA_PREFIX_UNET = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER = "lora_te"
    LORA_PREFIX_TEXT_ENCODER1 = "lora_te1"
    LORA_PREFIX_TEXT_ENCODER2 = "lora_te2"

    #: the model's family in `networks.recognition`; None: one that is not known there
    family: str | None = None
    #: number the text encoders in log names even when all share one learning rate
    numbers_text_encoders = False
    #: how messages call the weights that are merged: the file, once it is known
    weights_source = "weights to merge"

    def __init__(
        self, encoders: Sequence[EncoderAdapters], denoiser_adapters: Sequence[Adapter], settings: NetworkSettings
    ) -> None:
        super().__init__()
        self.settings = settings
        self.multiplier = settings.multiplier
        self.lora_dim = settings.rank
        self.alpha = settings.alpha
        self.conv_lora_dim = settings.conv_rank
        self.conv_alpha = settings.conv_alpha
        self._encoder_prefixes = [encoder.prefix for encoder in encoders]
        self.text_encoder_loras: list[Adapter] = [item for encoder in encoders for item in encoder.adapters]
        self.unet_loras: list[Adapter] = list(denoiser_adapters)
        self._untrained: set[str] = set()
        if not self.adapters:
            raise ValueError(
                "The network has no modules: --network_dim and --network_args choose no layer of this model, or the "
                "network file has none of its layers (is it for another model family?)."
            )
        for adapter in self.adapters:
            self.add_module(adapter.lora_name, adapter)
        logger.info(
            "network: %d modules for the text encoders, %d for the denoiser",
            len(self.text_encoder_loras), len(self.unet_loras),
        )  # fmt: skip

    @property
    def adapters(self) -> list[Adapter]:
        """Text-encoder adapters, then denoiser adapters."""
        return [*self.text_encoder_loras, *self.unet_loras]

    def of_encoder(self, index: int) -> list[Adapter]:
        """The adapters of one text encoder."""
        prefix = f"{self._encoder_prefixes[index]}_"
        return [adapter for adapter in self.text_encoder_loras if adapter.lora_name.startswith(prefix)]

    # --- attaching -----------------------------------------------------------------------------------------
    def apply_to(
        self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Hook the adapters into their layers; a part that is not wanted is dropped from the network for good."""
        if not apply_text_encoder:
            self._drop(self.text_encoder_loras)
        if not apply_unet:
            self._drop(self.unet_loras)
        if not self.adapters:
            raise ValueError("The network has no modules left: neither text encoders nor denoiser have any to train.")
        for adapter in self.adapters:
            adapter.apply_to()

    def _drop(self, adapters: list[Adapter]) -> None:
        for adapter in adapters:
            del self._modules[adapter.lora_name]
        adapters.clear()

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of all adapters."""
        self.multiplier = multiplier
        for adapter in self.adapters:
            adapter.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        """Switch all adapters on or off without unhooking them."""
        for adapter in self.adapters:
            adapter.enabled = is_enabled

    # --- training ------------------------------------------------------------------------------------------
    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(optimizer groups, their names) with one learning rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(optimizer groups, their names); a rate of None is replaced by `default_lr`, a rate of 0 freezes its part.

        Raises ValueError if nothing is left to train.
        """
        groups = OptimizerGroups()
        self._add_encoder_groups(groups, text_encoder_lr, default_lr)
        self.add_denoiser_groups(groups, default_lr if unet_lr is None else unet_lr)
        if not groups.groups:
            raise ValueError(
                "Nothing of the network has a learning rate: set --learning_rate, --unet_lr or --text_encoder_lr."
            )
        self._freeze(groups.untrained)
        return groups.groups, groups.descriptions

    def _add_encoder_groups(
        self, groups: OptimizerGroups, rates: float | Sequence[float] | None, default_lr: float | None
    ) -> None:
        count = len(self._encoder_prefixes)
        if not self.text_encoder_loras:
            return
        per_encoder, left_over = rates_per_encoder(rates, default_lr, count)
        if left_over:
            logger.warning("--text_encoder_lr has %d values more than the model has text encoders", left_over)
        ratio = self.settings.plus.for_text_encoder
        if not self.numbers_text_encoders and len(set(per_encoder)) == 1:
            groups.add(self.text_encoder_loras, per_encoder[0], ratio, "textencoder")
            return
        for index, rate in enumerate(per_encoder):
            groups.add(self.of_encoder(index), rate, ratio, f"textencoder {index + 1}")

    def add_denoiser_groups(self, groups: OptimizerGroups, lr: float | None) -> None:
        """Groups of the denoiser; subclasses split them by block or name."""
        groups.add(self.unet_loras, lr, self.settings.plus.for_denoiser, "unet")

    def _freeze(self, parameters: Sequence[nn.Parameter]) -> None:
        frozen = {id(parameter) for parameter in parameters}
        self._untrained = {name for name, parameter in self.named_parameters() if id(parameter) in frozen}
        self._set_requires_grad()
        if frozen:
            logger.warning("%d parameters of the network have no learning rate and stay as they are", len(frozen))

    def _set_requires_grad(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._untrained)

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """Let gradients flow into everything that has a learning rate."""
        self._set_requires_grad()

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Training mode (dropouts)."""
        self.train()

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters run inside the checkpointed blocks of their model."""

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """The parameters that get gradients (for clipping)."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Shrink adapters whose change is stronger than `max_norm_value` in Frobenius norm.

        Returns (how many were scaled, mean norm, largest norm), norms after scaling; (0, 0, 0) without adapters.
        """
        if not self.adapters:
            return 0, 0.0, 0.0
        before = torch.stack([adapter.weight_norm() for adapter in self.adapters]).tolist()
        after, scaled_count = [], 0
        for adapter, norm in zip(self.adapters, before, strict=True):
            clamped = max(norm, max_norm_value / 2)
            factor = min(clamped, max_norm_value) / clamped
            if factor != 1.0:
                adapter.scale_weight_(factor)
                scaled_count += 1
            after.append(norm * factor)
        return scaled_count, sum(after) / len(after), max(after)

    # --- files ---------------------------------------------------------------------------------------------
    def convert_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file, of whatever naming, under this network's key names, with all alphas."""
        return with_alphas(
            as_own_lora(weights, self.family, encoder_prefixes=self._encoder_prefixes, source="the network")
        )

    def load_weights(self, file: str | Path) -> Any:
        """Load a file's tensors into the adapters and return torch's report of missing and unexpected keys.

        Raises FileNotFoundError, or ValueError if nothing in the file fits or ranks differ.
        """
        weights = with_alphas(load_network_file(file, self.family, encoder_prefixes=self._encoder_prefixes))
        self._check(weights, source=str(file))
        return self.load_state_dict(weights, strict=False)

    def _check(self, weights: Mapping[str, Tensor], *, source: str) -> None:
        """Raises ValueError if nothing fits, or if something has another rank or size."""
        state = self.state_dict()
        if self.unet_loras:
            names = {adapter.lora_name for adapter in self.unet_loras}
            check_denoiser_fits({key.partition(".")[0] for key in weights}, names, source=source)
        check_usable(weights, state.keys(), source=source)
        check_ranks(weights, self._ranks(), source=source)
        check_shapes(weights, state, source=source)
        check_finite(source, {key: value for key, value in weights.items() if key in state})

    def _ranks(self) -> dict[str, int]:
        ranks = {adapter.lora_name: getattr(adapter, "lora_dim", None) for adapter in self.adapters}
        return {name: rank for name, rank in ranks.items() if rank is not None}

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write all tensors, cast to `dtype` if given; a safetensors file gets the metadata and its hashes."""
        save_network_file(file, self.state_dict(), dtype=dtype, metadata=metadata)

    # --- merging -------------------------------------------------------------------------------------------
    def is_mergeable(self) -> bool:
        """True: the change can be written into the model's weights."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Write the change that `weights_sd` describes into the weights of the model; only modules in it take part."""
        weights = self.convert_weights(weights_sd)
        self._check(weights, source=self.weights_source)
        self.load_state_dict(weights, strict=False)
        in_file = {key.partition(".")[0] for key in weights}
        merged = [adapter for adapter in self.adapters if adapter.lora_name in in_file]
        for adapter in merged:
            if device is not None:
                adapter.to(device)
            adapter.merge_to_host(dtype, device)
        logger.info("merged %d modules into the model", len(merged))

    def backup_weights(self) -> None:
        """Keep a copy of every adapted weight, once."""
        for adapter in self.adapters:
            adapter.backup_weight()

    def restore_weights(self) -> None:
        """Bring every adapted weight back. With several networks: restore all of them before pre-calculating any."""
        for adapter in self.adapters:
            adapter.restore_weight()

    def pre_calculation(self) -> None:
        """Merge every adapter at its current multiplier and switch the hooks off."""
        for adapter in self.adapters:
            adapter.pre_calculate()
