"""Full training: the denoiser itself and, where asked for, the text encoders (fine-tuning and DreamBooth)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from library.checkpoints.stored import forget_stored
from library.families.base import ModelFamily
from library.methods.base import LossRecipe, ParameterGroup, Placement, TrainingMethod
from library.options import Options
from library.saving import write_model_folder

logger = logging.getLogger(__name__)

EXTENSIONS = MappingProxyType({"safetensors": ".safetensors", "ckpt": ".ckpt"})  # every other layout is a folder
SAFETENSORS = MappingProxyType({"ckpt": "safetensors", "diffusers": "diffusers_safetensors"})


class FullTraining(TrainingMethod):
    """Trains the weights of the model itself. A learning rate of 0 leaves its part frozen, in the frozen dtype."""

    tracker_name = "finetuning"
    writes_whole_model = True
    without_effect: Mapping[str, str] = MappingProxyType(
        {"diffusers_xformers": "--xformers already covers the VAE as well as the denoiser."}
    )

    def __init__(self, options: Options, family: ModelFamily) -> None:
        super().__init__(options, family)
        self._parameters: list[nn.Parameter] = []

    # --- before anything is loaded -------------------------------------------------------------------------
    def check_options(self) -> list[str]:
        """Something is trained, in a dtype that can be trained, and saved in a form that there is."""
        device, problems = self.options.device, []
        chosen = self.options.saving.save_model_as
        if chosen is not None and chosen not in self.family.layouts:
            problems.append(f"--save_model_as {chosen}: choose one of {', '.join(self.family.layouts)}.")
        if not self._trains_denoiser() and not any(self.trained_text_encoders()):
            problems.append(
                "There is nothing to train: every learning rate is 0. Raise --learning_rate, or one of a part of the "
                "model (--block_lr, or --train_text_encoder with a learning rate of the text encoder)."
            )
        if self.family.trains_in_weight_dtype and device.mixed_precision == "fp16" and not device.full_fp16:
            problems.append(
                "--mixed_precision fp16 needs --full_fp16 when this kind of model is trained as a whole: its weights "
                "are kept in fp16. bf16 is the better choice."
            )
        return problems

    def _trains_denoiser(self) -> bool:
        return any(self.options.full.block_lr or (self.options.optimizer.learning_rate,))

    def asks_for_text_encoders(self) -> bool:
        """Whether the options want text encoders trained at all."""
        return self.options.full.train_text_encoder

    def trained_text_encoders(self) -> list[bool]:
        """Those that are asked for, unless their learning rate is 0."""
        if not self.asks_for_text_encoders():
            return [False] * len(self.family.text_encoder_names)
        asked = self.options.flat()
        return [
            self._text_encoder_rate(index) != 0
            and (name not in self.family.opt_in_text_encoders or bool(asked.get(f"train_{name}")))
            for index, name in enumerate(self.family.text_encoder_names)
        ]

    def _text_encoder_rate(self, index: int) -> float:
        own = self._own_text_encoder_rate(index)
        return self.options.optimizer.learning_rate if own is None else own

    def _own_text_encoder_rate(self, index: int) -> float | None:
        full = self.options.full
        numbered = (full.learning_rate_te1, full.learning_rate_te2, full.learning_rate_te3)[index]
        return full.learning_rate_te if numbered is None else numbered

    # --- set-up --------------------------------------------------------------------------------------------
    def loading_dtype(self, placement: Placement) -> torch.dtype:
        """That of the trained weights: casting down and up again would cost their precision."""
        return placement.weight_dtype if self.family.trains_in_weight_dtype else placement.trained_dtype

    def before_caching(self, placement: Placement) -> None:
        """Frozen text encoders get the dtype of frozen parts (those that were loaded in one of their own keep it)."""
        loaded = self.loading_dtype(placement)
        for encoder, is_trained in zip(self.family.text_encoders, self.trained_text_encoders(), strict=True):
            if encoder is not None and not is_trained and next(encoder.parameters()).dtype == loaded:
                encoder.to(placement.weight_dtype)

    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Unfreeze what is trained; groups: `unet` or `block<i>`, then `text_encoder<n>`."""
        family = self.family
        self.trainable = nn.ModuleDict()
        groups = [*self._attach_denoiser(placement), *self._attach_text_encoders()]
        groups = [group for group in groups if group.parameters]
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        for module in self.trainable.values():  # the others are written as they were read
            forget_stored(module)
        if self.options.training.gradient_checkpointing:
            family.enable_gradient_checkpointing()
        self.recipe = LossRecipe.from_options(self.options, family)
        return groups

    def _attach_denoiser(self, placement: Placement) -> list[ParameterGroup]:
        family, denoiser = self.family, self.family.denoiser
        trains = self._trains_denoiser()
        if not trains:
            nn.Module.to(denoiser, placement.weight_dtype)  # diffusers' own `to` warns about casts
        denoiser.to(placement.device)
        denoiser.train(trains or self.options.training.gradient_checkpointing)
        if not trains:
            return []
        self.trainable["denoiser"] = denoiser
        frozen = family.frozen_parameters()
        rates = self.options.full.block_lr
        if not rates:
            return [ParameterGroup("unet", unfreeze(denoiser.parameters(), frozen))]
        blocks = [parameters for _, parameters in family.block_learning_rate_groups()]
        if len(blocks) != len(rates):
            raise ValueError(
                f"--block_lr has {len(rates)} learning rates, but this model's denoiser has {len(blocks)} blocks that "
                "take one: use --learning_rate."
            )
        return [
            ParameterGroup(f"block{index}", unfreeze(parameters, frozen), rate)
            for index, (rate, parameters) in enumerate(zip(rates, blocks, strict=True))
            if rate
        ]

    def _attach_text_encoders(self) -> list[ParameterGroup]:
        groups = []
        for index, is_trained in enumerate(self.trained_text_encoders()):
            encoder = self.family.text_encoders[index]
            if encoder is None:
                continue
            encoder.train(is_trained or self.options.training.gradient_checkpointing)
            if is_trained:
                self.trainable[f"text_encoder{index + 1}"] = encoder
                parameters = unfreeze(encoder.parameters(), self.family.unused_text_encoder_parameters(index))
                rate = self._own_text_encoder_rate(index)
                groups.append(ParameterGroup(f"text_encoder{index + 1}", parameters, rate))
        return groups

    def trained_parameters(self) -> list[nn.Parameter]:
        """Everything in the optimizer."""
        return self._parameters

    # --- inference and saving ------------------------------------------------------------------------------
    @contextmanager
    def inference(self) -> Iterator[None]:
        """The whole model in eval mode; frozen parts may be in train mode for gradient checkpointing."""
        encoders = [encoder for encoder in self.family.text_encoders if encoder is not None]
        modes = [(module, module.training) for module in (self.family.denoiser, *encoders)]
        try:
            for module, _ in modes:
                module.eval()
            yield
        finally:
            for module, was_training in modes:
                module.train(was_training)

    @property
    def layout(self) -> str:
        """`--save_model_as`, else the family's own choice; as safetensors with `--use_safetensors`."""
        saving = self.options.saving
        chosen = saving.save_model_as or self.family.default_layout
        return SAFETENSORS.get(chosen, chosen) if saving.use_safetensors else chosen

    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """The whole model; a folder appears under its name only when complete."""
        def write(place: Path) -> None:
            self.family.save(place, layout=self.layout, dtype=dtype, metadata=metadata, counters=counters)

        if self.file_extension:
            write(path)
        else:
            write_model_folder(path, write)

    def companion_files(self, path: Path) -> list[Path]:
        """What the family writes beside its model file."""
        return self.family.companion_files(path) if self.file_extension else []

    @property
    def file_extension(self) -> str:
        """Of the layout; none for folders."""
        return EXTENSIONS.get(self.layout, "")

    def metadata(self) -> dict[str, Any]:
        """Nothing but the modelspec of a whole checkpoint."""
        return {}


def unfreeze(parameters: Iterable[nn.Parameter], frozen: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `parameters` that are not in `frozen`, with gradients switched on."""
    excluded = {id(parameter) for parameter in frozen}
    chosen = [parameter for parameter in parameters if id(parameter) not in excluded]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


class DreamBoothTraining(FullTraining):
    """Trains denoiser and text encoder; `--stop_text_encoder_training` N leaves the encoder as step N made it."""

    tracker_name = "dreambooth"
    without_effect = MappingProxyType({
        **FullTraining.without_effect,
        "no_token_padding": "text encoders always see captions padded to whole windows, as in their own training.",
    })  # fmt: skip

    def __init__(self, options: Options, family: ModelFamily) -> None:
        super().__init__(options, family)
        self._steps = 0
        self._is_stopped = False

    def asks_for_text_encoders(self) -> bool:
        """Unless they are stopped before they start."""
        stop = self.options.full.stop_text_encoder_training
        return stop is None or stop > 0

    def on_start(self, step: int) -> None:
        """A resumed run may be past the stop."""
        self._steps = step
        self._stop_if_due()

    def after_step(self, *, synced: bool) -> Mapping[str, float]:
        """Count optimizer steps, and stop the text encoders when their time has come."""
        self._steps += synced
        self._stop_if_due()
        return {}

    def _stop_if_due(self) -> None:
        stop = self.options.full.stop_text_encoder_training
        if self._is_stopped or stop is None or self._steps < stop or not self.asks_for_text_encoders():
            return
        logger.info("the text encoder is not trained any more after step %d", self._steps)
        self._is_stopped = True
        stopped = self._trained_encoders()
        parameters = {id(parameter) for encoder in stopped for parameter in encoder.parameters()}
        self._parameters = [parameter for parameter in self._parameters if id(parameter) not in parameters]
        for encoder in stopped:
            encoder.train(self.options.training.gradient_checkpointing)
            if not torch.distributed.is_initialized():  # processes that train together wait for every gradient
                encoder.requires_grad_(False)

    def before_optimizer_step(self) -> None:
        """Gradients of stopped encoders do not reach the optimizer."""
        if self._is_stopped:
            for encoder in self._trained_encoders():
                encoder.zero_grad(set_to_none=True)

    def _trained_encoders(self) -> list[nn.Module]:
        return [module for name, module in self.trainable.items() if name != "denoiser"]
