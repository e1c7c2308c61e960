"""LoRA networks for diffusion transformers with CLIP and T5 encoders; a family names its layers and prefixes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from networks.adapter import Adapter, Dropouts
from networks.arguments import NetworkArguments, checked_rank
from networks.arguments import argument_problems as check_arguments
from networks.groups import PlusRatios
from networks.lora import LoRAInfModule, LoRAModule
from networks.network import (
    AdapterNetwork,
    NetworkSettings,
    RankAndAlpha,
    RankRule,
    check_left_over,
    encoder_adapters,
    given_weights,
    make_adapters,
)
from networks.targets import CLIP_CLASSES, Target, as_encoder_list, find_targets
from networks.translation import T5_PREFIX
from networks.unet_network import DEFAULT_RANK
from networks.weights_file import ranks_and_alphas

T5_CLASSES = ("T5Attention", "T5DenseGatedActDense")
#: values that leave an argument without effect
_NO_EFFECT = {"", "all", "none", "false", "0", "no"}


@dataclass(frozen=True)
class TransformerOptions:
    """The arguments of a transformer's network, read and checked."""

    settings: NetworkSettings
    dropouts: Dropouts
    trains_t5: bool

    @classmethod
    def read(
        cls, arguments: NetworkArguments, settings: NetworkSettings, neuron_dropout: float | None,
        unsupported: Sequence[str],
    ) -> TransformerOptions:
        """Raises ValueError that names the argument, also for those of `unsupported` and for unknown ones."""
        for name, value in arguments.select(*unsupported).items():
            if str(value).strip().lower() not in _NO_EFFECT:
                raise ValueError(f"network argument {name}={value}: {arguments.network} does not support it yet.")
        dropouts = Dropouts(
            neuron_dropout, arguments.probability("rank_dropout"), arguments.probability("module_dropout")
        )
        trains_t5 = arguments.flag("train_t5xxl")
        settings = replace(settings, plus=PlusRatios.read(arguments))
        arguments.ignore("conv_dim", "conv_alpha", reason="only Linear layers are adapted")
        arguments.refuse_unknown()
        return cls(settings, dropouts, trains_t5)


class TransformerNetwork(AdapterNetwork):
    """LoRA modules for a diffusion transformer, its CLIP encoders, and on request (`train_t5xxl`) its T5 encoder."""

    LORA_PREFIX_TEXT_ENCODER3 = T5_PREFIX

    #: the name of the module in messages
    module_name: ClassVar[str]
    #: all `Linear` layers inside modules of these classes are adapted
    denoiser_classes: ClassVar[tuple[str, ...]]
    #: name prefix of each text encoder, in the family's order
    encoder_prefixes: ClassVar[tuple[str, ...]]
    #: arguments that other programs know and that are refused for now
    unsupported_arguments: ClassVar[tuple[str, ...]] = ()

    numbers_text_encoders = True
    train_t5xxl = False  # trainers look at it

    @classmethod
    def create(
        cls, text_encoder: Any, denoiser: nn.Module, settings: NetworkSettings, neuron_dropout: float | None,
        arguments: NetworkArguments,
    ) -> Self:
        """A fresh network for training; raises ValueError for bad arguments or if there are no layers."""
        options = TransformerOptions.read(arguments, settings, neuron_dropout, cls.unsupported_arguments)
        targets = find_targets(denoiser, cls.LORA_PREFIX_UNET, cls.denoiser_classes)

        def same_for_all(target: Target) -> RankAndAlpha:
            return settings.rank, settings.alpha

        return cls._assemble(text_encoder, targets, options, same_for_all, LoRAModule)

    @classmethod
    def create_from_weights(
        cls, text_encoder: Any, denoiser: nn.Module, weights: Mapping[str, Tensor], multiplier: float,
        arguments: NetworkArguments, *, for_inference: bool,
    ) -> Self:
        """A network with exactly the modules, ranks and alphas of `weights`; nothing is loaded into it.

        A file may also hold layers of the denoiser that a fresh network does not adapt (embedders, output).
        """
        in_file = ranks_and_alphas(weights)
        if not in_file:
            raise ValueError("The network file has no LoRA modules: none of its keys ends with .lora_down.weight.")
        rank, alpha = max(in_file.values())
        neuron_dropout = arguments.probability("neuron_dropout")
        options = TransformerOptions.read(
            arguments, NetworkSettings(rank, alpha, multiplier), neuron_dropout, cls.unsupported_arguments
        )
        options = replace(options, trains_t5=any(name.startswith(f"{T5_PREFIX}_") for name in in_file))
        targets = find_targets(denoiser, cls.LORA_PREFIX_UNET, [type(denoiser).__name__])

        def from_file(target: Target) -> RankAndAlpha | None:
            return in_file.get(target.name)

        module_class = LoRAInfModule if for_inference else LoRAModule
        network = cls._assemble(text_encoder, targets, options, from_file, module_class)
        check_left_over(in_file, network)
        return network

    @classmethod
    def _assemble(
        cls, text_encoder: Any, denoiser_targets: Sequence[Target], options: TransformerOptions, rule: RankRule,
        module_class: type[LoRAModule],
    ) -> Self:
        """Text encoders first, then the denoiser: initial weights are drawn in this order."""

        def make(target: Target, choice: RankAndAlpha) -> Adapter:
            return module_class(target.name, target.layer, options.settings.multiplier, *choice, options.dropouts)

        modules = as_encoder_list(text_encoder)
        modules += [None] * (len(cls.encoder_prefixes) - len(modules))
        encoders = []
        for prefix, module in zip(cls.encoder_prefixes, modules, strict=False):
            classes = T5_CLASSES if prefix == T5_PREFIX else CLIP_CLASSES
            wanted = module if options.trains_t5 or prefix != T5_PREFIX else None
            encoders += encoder_adapters([(prefix, wanted)], classes, rule, make)[0]
        if not denoiser_targets:
            raise ValueError(
                f"The denoiser has no layers that {cls.module_name} can adapt: expected Linear layers inside "
                f"{', '.join(cls.denoiser_classes)}. Does the network module fit the model family?"
            )
        denoiser_adapters, _ = make_adapters(denoiser_targets, rule, make)
        network = cls(encoders, denoiser_adapters, options.settings)
        network.train_t5xxl = options.trains_t5
        return network

    # --- the functions that a network module offers -----------------------------------------------------------
    @classmethod
    def known_arguments(cls) -> frozenset[str]:
        """The names of the network arguments that are read, or refused because they do not work yet."""
        arguments = NetworkArguments({}, "")
        cls._read_arguments(arguments)
        return arguments.known - {"conv_dim", "conv_alpha"}

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any], *, lineage: str = "") -> list[str]:
        """What is wrong with `--network_args`, one sentence each; needs no models."""
        return check_arguments(cls._read_arguments, arguments, cls.module_name)

    @classmethod
    def _read_arguments(cls, arguments: NetworkArguments) -> TransformerOptions:
        settings = NetworkSettings(DEFAULT_RANK, 1.0)
        return TransformerOptions.read(arguments, settings, None, cls.unsupported_arguments)

    @classmethod
    def for_training(
        cls, multiplier: float, rank: int | None, alpha: float | None, text_encoder: Any, denoiser: nn.Module,
        neuron_dropout: float | None, arguments: Mapping[str, Any],
    ) -> Self:
        """What `create_network` returns: rank None means 4, alpha None 1; `arguments` are `--network_args`."""
        checked = checked_rank(DEFAULT_RANK if rank is None else rank, "--network_dim")
        settings = NetworkSettings(checked, 1.0 if alpha is None else float(alpha), multiplier)
        return cls.create(
            text_encoder, denoiser, settings, neuron_dropout, NetworkArguments(arguments, cls.module_name)
        )

    @classmethod
    def from_file(
        cls, multiplier: float, file: str | os.PathLike[str] | None, text_encoder: Any, denoiser: nn.Module,
        weights_sd: Mapping[str, Tensor] | None, arguments: Mapping[str, Any], *, for_inference: bool,
    ) -> tuple[Self, dict[str, Tensor]]:
        """What `create_network_from_weights` returns; `weights_sd` replaces the file."""
        weights = given_weights(file, weights_sd, cls.family, cls.encoder_prefixes)
        network = cls.create_from_weights(
            text_encoder, denoiser, weights, multiplier, NetworkArguments(arguments, cls.module_name),
            for_inference=for_inference,
        )
        return network, weights


def entry_points(
    network_class: type[TransformerNetwork],
) -> tuple[Callable[..., TransformerNetwork], Callable[..., tuple[TransformerNetwork, dict[str, Tensor]]]]:
    """The two functions that trainers and generators look for in a network module, for networks of this class."""

    def create_network(
        multiplier: float, network_dim: int | None, network_alpha: float | None, vae: nn.Module | None,
        text_encoder: Any, unet: nn.Module, neuron_dropout: float | None = None, **kwargs: Any,
    ) -> TransformerNetwork:
        """A fresh network: rank `network_dim` (None: 4), alpha `network_alpha` (None: 1); `kwargs` are
        `--network_args`.

        `text_encoder` is the list of all encoders; any may be None. Raises ValueError for arguments that cannot be
        used.
        """
        return network_class.for_training(
            multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
        )

    def create_network_from_weights(
        multiplier: float, file: str | os.PathLike[str] | None, vae: nn.Module | None, text_encoder: Any,
        unet: nn.Module, weights_sd: dict[str, Tensor] | None = None, for_inference: bool = False, **kwargs: Any,
    ) -> tuple[TransformerNetwork, dict[str, Tensor]]:
        """(network with exactly the modules, ranks and alphas of a file, the file's tensors); nothing is loaded.

        `weights_sd` replaces the file. `kwargs` are `--network_args`; those that choose ranks have no effect here.
        """
        return network_class.from_file(
            multiplier, file, text_encoder, unet, weights_sd, kwargs, for_inference=for_inference
        )

    return create_network, create_network_from_weights
