"""Networks for the U-Nets and CLIP encoders of SD 1, SD 2 and SDXL, whatever the adapter algorithm is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from networks import blocks
from networks.adapter import Adapter, Dropouts
from networks.arguments import NetworkArguments, checked_rank
from networks.groups import OptimizerGroups, PlusRatios
from networks.network import (
    AdapterNetwork,
    EncoderAdapters,
    NetworkSettings,
    RankAndAlpha,
    RankRule,
    check_left_over,
    encoder_adapters,
    given_weights,
    make_adapters,
)
from networks.targets import (
    CLIP_CLASSES,
    UNET_CONV_CLASSES,
    UNET_TRANSFORMER_CLASSES,
    Target,
    as_encoder_list,
    find_targets,
    is_sdxl_unet,
)
from networks.translation import OWN_NAMES
from networks.weights_file import ranks_and_alphas

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4


@dataclass(frozen=True)
class UnetOptions:
    """The arguments of a U-Net network, read and checked."""

    settings: NetworkSettings
    dropouts: Dropouts
    block_ranks: blocks.BlockRanks | None
    block_lr_weight: list[float] | None
    is_sdxl: bool

    @classmethod
    def read(
        cls, arguments: NetworkArguments, settings: NetworkSettings, neuron_dropout: float | None, *, is_sdxl: bool
    ) -> UnetOptions:
        """Raises ValueError that names the argument, also for unknown ones."""
        conv_rank = arguments.integer("conv_dim")
        conv_alpha = arguments.number("conv_alpha", 1.0)
        if conv_rank is not None:
            conv_rank = checked_rank(conv_rank, "network argument conv_dim") or None
        settings = replace(
            settings,
            conv_rank=conv_rank,
            conv_alpha=conv_alpha if conv_rank else None,
            plus=PlusRatios.read(arguments),
        )
        rank_dropout = arguments.probability("rank_dropout")
        dropouts = Dropouts(neuron_dropout, rank_dropout, arguments.probability("module_dropout"))
        lr_weight = blocks.parse_block_lr_kwargs(is_sdxl, arguments.select(*blocks.LR_KEYS))
        block_ranks = blocks.read_block_ranks(arguments, settings, lr_weight, is_sdxl=is_sdxl)
        arguments.refuse_unknown()
        return cls(settings, dropouts, block_ranks, lr_weight, is_sdxl)

    @property
    def adapts_conv(self) -> bool:
        """Whether resnets and resamplers are adapted too."""
        if self.block_ranks is not None:
            return self.block_ranks.conv_ranks is not None
        return self.settings.conv_rank is not None

    def encoder_rank(self, target: Target) -> RankAndAlpha:
        """Text encoders always use the network's own rank and alpha."""
        return self.settings.rank, self.settings.alpha

    def denoiser_rank(self, target: Target) -> RankAndAlpha | None:
        """Rank and alpha of a U-Net layer; convolutions larger than 1x1 have their own, None means not adapted."""
        if self.block_ranks is not None:
            index = blocks.require_block_index(target.name, self.is_sdxl)
            return self.block_ranks.at(index, is_spatial=target.is_spatial)
        if not target.is_spatial:
            return self.settings.rank, self.settings.alpha
        if self.settings.conv_rank is None:
            return None
        return self.settings.conv_rank, 1.0 if self.settings.conv_alpha is None else self.settings.conv_alpha


class UnetNetwork(AdapterNetwork):
    """Adapters for an SD or SDXL U-Net and its CLIP encoders; a subclass names the adapter's classes."""

    #: called as (name, layer, multiplier, rank, alpha, dropouts)
    module_class: ClassVar[type[Adapter]]
    inference_module_class: ClassVar[type[Adapter]]

    UNET_TARGET_REPLACE_MODULE = UNET_TRANSFORMER_CLASSES
    UNET_TARGET_REPLACE_MODULE_CONV2D_3X3 = UNET_CONV_CLASSES
    TEXT_ENCODER_TARGET_REPLACE_MODULE = CLIP_CLASSES
    NUM_OF_BLOCKS = blocks.NUM_OF_BLOCKS
    NUM_OF_MID_BLOCKS = blocks.NUM_OF_MID_BLOCKS
    SDXL_NUM_OF_BLOCKS = blocks.SDXL_NUM_OF_BLOCKS
    SDXL_NUM_OF_MID_BLOCKS = blocks.SDXL_NUM_OF_MID_BLOCKS

    def __init__(
        self, encoders: Sequence[EncoderAdapters], denoiser_adapters: Sequence[Adapter], options: UnetOptions
    ) -> None:
        super().__init__(encoders, denoiser_adapters, options.settings)
        self.is_sdxl = options.is_sdxl
        self.family = "sdxl" if options.is_sdxl else "sd"
        self.block_lr_weight = options.block_lr_weight

    # --- before there are models ---------------------------------------------------------------------------
    @classmethod
    def known_arguments(cls) -> frozenset[str]:
        """The names of the network arguments that are read."""
        arguments = NetworkArguments({}, "")
        cls.read_arguments(arguments, is_sdxl=False)
        return arguments.known

    @classmethod
    def read_arguments(cls, arguments: NetworkArguments, *, is_sdxl: bool) -> UnetOptions:
        """The arguments alone, beside default rank and alpha."""
        return UnetOptions.read(arguments, NetworkSettings(DEFAULT_RANK, 1.0), None, is_sdxl=is_sdxl)

    # --- creating ------------------------------------------------------------------------------------------
    @classmethod
    def create(
        cls, text_encoder: Any, unet: nn.Module, settings: NetworkSettings, neuron_dropout: float | None,
        arguments: NetworkArguments,
    ) -> Self:
        """A fresh network for training; raises ValueError for bad arguments or if no layer is chosen."""
        options = UnetOptions.read(arguments, settings, neuron_dropout, is_sdxl=is_sdxl_unet(unet))
        classes = [*cls.UNET_TARGET_REPLACE_MODULE]
        if options.adapts_conv:
            classes += cls.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3
        targets = find_targets(unet, cls.LORA_PREFIX_UNET, classes)
        rules = (options.encoder_rank, options.denoiser_rank)
        return cls._assemble(text_encoder, targets, options, rules, cls.module_class)

    @classmethod
    def create_from_weights(
        cls, text_encoder: Any, unet: nn.Module, weights: Mapping[str, Tensor], multiplier: float,
        arguments: NetworkArguments, *, for_inference: bool,
    ) -> Self:
        """A network with exactly the modules, ranks and alphas of `weights`; nothing is loaded into it."""
        in_file = ranks_and_alphas(weights)
        if not in_file:
            raise ValueError("The network file has no LoRA modules: none of its keys ends with .lora_down.weight.")
        rank, alpha = max(in_file.values())
        neuron_dropout = arguments.probability("neuron_dropout")
        settings = NetworkSettings(rank, alpha, multiplier)
        options = UnetOptions.read(arguments, settings, neuron_dropout, is_sdxl=is_sdxl_unet(unet))
        classes = [*cls.UNET_TARGET_REPLACE_MODULE, *cls.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3]
        targets = find_targets(unet, cls.LORA_PREFIX_UNET, classes)

        def from_file(target: Target) -> RankAndAlpha | None:
            return in_file.get(target.name)

        module_class = cls.inference_module_class if for_inference else cls.module_class
        network = cls._assemble(text_encoder, targets, options, (from_file, from_file), module_class)
        check_left_over(in_file, network)
        return network

    @classmethod
    def _assemble(
        cls, text_encoder: Any, unet_targets: Sequence[Target], options: UnetOptions,
        rank_rules: tuple[RankRule, RankRule], module_class: Callable[..., Adapter],
    ) -> Self:
        """Text encoders first, then the U-Net: initial weights are drawn in this order."""

        def make(target: Target, choice: RankAndAlpha) -> Adapter:
            return module_class(target.name, target.layer, options.settings.multiplier, *choice, options.dropouts)

        encoder_rule, denoiser_rule = rank_rules
        modules = as_encoder_list(text_encoder)
        named = [(cls._encoder_prefix(index, len(modules)), module) for index, module in enumerate(modules)]
        encoders, skipped = encoder_adapters(named, cls.TEXT_ENCODER_TARGET_REPLACE_MODULE, encoder_rule, make)
        if not unet_targets:
            raise ValueError(
                "The denoiser has no layers that this network can adapt: expected Linear and Conv2d layers inside "
                f"{', '.join(cls.UNET_TARGET_REPLACE_MODULE)}. Does the network module fit the model family?"
            )
        denoiser_adapters, names = make_adapters(unet_targets, denoiser_rule, make)
        skipped += names
        if skipped and options.block_ranks is not None:
            logger.warning("%d layers have rank 0 and are not trained: %s", len(skipped), ", ".join(skipped))
        return cls(encoders, denoiser_adapters, options)

    @classmethod
    def _encoder_prefix(cls, index: int, count: int) -> str:
        if count == 1:
            return cls.LORA_PREFIX_TEXT_ENCODER
        return (cls.LORA_PREFIX_TEXT_ENCODER1, cls.LORA_PREFIX_TEXT_ENCODER2)[index]

    # --- using ---------------------------------------------------------------------------------------------
    def add_denoiser_groups(self, groups: OptimizerGroups, lr: float | None) -> None:
        """One group (and one LoRA+ group) for the U-Net, or one per block when blocks have factors."""
        if self.block_lr_weight is None:
            super().add_denoiser_groups(groups, lr)
            return
        by_block: dict[int, list[Adapter]] = {}
        for adapter in self.unet_loras:
            by_block.setdefault(blocks.require_block_index(adapter.lora_name, self.is_sdxl), []).append(adapter)
        for index, adapters in by_block.items():
            rate = None if lr is None else lr * self.block_lr_weight[index]
            groups.add(adapters, rate, self.settings.plus.for_denoiser, f"unet_block{index}")


def read_weights(
    file: str | os.PathLike[str] | None, weights_sd: Mapping[str, Tensor] | None, unet: nn.Module
) -> dict[str, Tensor]:
    """A copy of `weights_sd`, or the tensors of `file`, under our key names (SDXL: in original naming)."""
    family = family_of(unet)
    return given_weights(file, weights_sd, family, OWN_NAMES[family].encoder_prefixes)


def family_of(unet: nn.Module) -> str:
    """The family in `networks.recognition` that a U-Net belongs to."""
    return "sdxl" if is_sdxl_unet(unet) else "sd"
