"""What a training method must answer, and the one diffusion loss that every method shares."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.records import Batch
from library.families.base import Conditioning, ModelFamily, SizeConditioning, Tokenize
from library.losses import apply_mask, elementwise_loss
from library.noise import NoiseConfig, draw_noise, perturb

if TYPE_CHECKING:
    from library.generation.engine import Predict
    from library.generation.request import ImageRequest
    from library.objectives import NoiseLevel, Objective
    from library.options import Options


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where and in which dtype the frozen and the trained parts live."""

    device: torch.device
    weight_dtype: torch.dtype  # frozen weights
    trained_dtype: torch.dtype  # weights that the optimizer steps


@dataclass(frozen=True)
class ParameterGroup:
    """One optimizer group; `name` appears in the logs as `lr/<name>`. `lr` None means the optimizer's default."""

    name: str
    parameters: list[nn.Parameter]
    lr: float | None = None

    def for_optimizer(self) -> dict[str, Any]:
        """The group as torch optimizers take it."""
        return {"params": self.parameters} | ({} if self.lr is None else {"lr": self.lr})


@dataclass(frozen=True)
class LossRecipe:
    """The choices of the diffusion loss that do not depend on family or method."""

    objective: Objective
    noise: NoiseConfig
    loss_type: str = "l2"
    masked_loss: bool = False
    weighted_captions: bool = False
    vae_batch_size: int | None = None  # pictures that are encoded at once; None: the whole batch

    @classmethod
    def from_options(cls, options: Options, family: ModelFamily, *, encodes_singly: bool = False) -> LossRecipe:
        """What the options ask for, with the family's objective.

        Pictures without cached latents are encoded a batch at once, or with `encodes_singly` one by one; another
        `--vae_batch_size` than 1 says how many. The random draws of the VAE depend on it.
        """
        size = options.cache.vae_batch_size
        return cls(
            objective=family.make_objective(), noise=family.training_noise(),
            loss_type=options.loss.loss_type, masked_loss=options.dataset.masked_loss,
            weighted_captions=options.dataset.weighted_captions,
            vae_batch_size=size if encodes_singly or size > 1 else None,
        )


class TrainingMethod(ABC):
    """What is trained, with which loss, and how it is saved; never asks which family it has.

    Life: construct (cheap) -> `check_options` -> `prepare_text` -> data -> family.load -> `before_caching` -> caches
    -> `attach` -> cached text encoders released -> loop -> `save`.
    """

    #: default of `--log_tracker_name`
    tracker_name: str
    #: whether `ss_*` training metadata belongs into the saved file
    writes_training_metadata: bool = False
    #: whether the saved file is the whole model, with the parts that are not trained
    writes_whole_model: bool = False

    #: options that are accepted and mean nothing for this method -> why (they warn once when set)
    without_effect: Mapping[str, str] = MappingProxyType({})

    trainable: nn.ModuleDict  # after `attach`: what accelerate wraps, clips and what a state holds
    recipe: LossRecipe  # after `attach`

    def __init__(self, options: Options, family: ModelFamily) -> None:
        self.options = options
        self.family = family

    # --- before anything is loaded -------------------------------------------------------------------------
    @abstractmethod
    def check_options(self) -> list[str]:
        """Problems with the options that concern this method, one sentence each."""

    def trained_text_encoders(self) -> list[bool]:
        """Which of the family's text encoders this run trains; known before models are loaded."""
        return [False] * len(self.family.text_encoder_names)

    def prepare_text(self) -> None:
        """Changes to the family's tokenizers that data workers must see (new words); called once."""

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> the token tensors of a batch."""
        return self.family.tokenize

    @property
    def caption_replacements(self) -> Mapping[str, str | list[str]]:
        """Text in captions -> what stands there instead, or a list to choose from; "" replaces whole captions."""
        return {}

    @property
    def bucket_step(self) -> int:
        """The `bucket_reso_steps` of a dataset must be a multiple of it."""
        return self.family.latent.bucket_step

    def prompt_text(self, prompt: str) -> str:
        """The text of a sample prompt as the trained model should read it."""
        return prompt

    # --- set-up --------------------------------------------------------------------------------------------
    def loading_dtype(self, placement: Placement) -> torch.dtype:
        """The dtype in which the family loads denoiser and text encoders."""
        return placement.weight_dtype

    def before_caching(self, placement: Placement) -> None:
        """Changes to the loaded models that caches must already see (base weights merged in)."""

    @abstractmethod
    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Patch or unfreeze modules, place them, set `trainable` and `recipe`; returns the optimizer's groups."""

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """What gradient clipping covers."""

    # --- the step ------------------------------------------------------------------------------------------
    def on_start(self, step: int) -> None:
        """Called once before the first batch; `step` optimizer steps are done already (a resumed run)."""

    def on_epoch_start(self, epoch: int) -> None:
        """Called with the 1-based epoch before its first batch."""

    def on_step_start(self) -> None:
        """Called before every forward pass that trains."""

    def before_optimizer_step(self) -> None:
        """Called when gradients are complete, after clipping."""

    def after_step(self, *, synced: bool) -> Mapping[str, float]:
        """Called after every batch (max-norm, embedding restore, text-encoder stop); returns scalars for the logs."""
        return {}

    def conditioning(self, batch: Batch) -> Conditioning:
        """Text conditioning of a batch; differentiable where a text encoder is trained."""
        if self.recipe.weighted_captions and batch.text_outputs is None:
            return self.family.encode_weighted_captions(batch.captions)
        conditioning = self.family.encode_text(batch.tokens or {}, batch.text_outputs)
        is_training = any(module.training for module in self.trainable.values())
        return self.family.drop_text(conditioning) if is_training else conditioning

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """Raw prediction [B,C,h,w] of the trained model. ControlNet-like methods override this."""
        return self.family.predict(x_t, timesteps, conditioning, size_conditioning(batch))

    def base_prediction(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
        """Raw prediction [B,C,h,w] without the trained part (differential output preservation)."""
        raise ValueError("custom_attributes.diff_output_preservation: this method has no untrained prediction.")

    def loss(self, batch: Batch, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Per-sample loss [B]. Validation passes explicit `timesteps` [B]; comparisons pass `noise` [B,C,h,w] too."""
        return diffusion_loss(self, batch, self.recipe, timesteps, noise)

    # --- inference and saving ------------------------------------------------------------------------------
    @contextmanager
    def inference(self) -> Iterator[None]:
        """The trained parts in eval mode, restored afterwards (samples, validation, saving)."""
        modes = [(module, module.training) for module in self.trainable.values()]
        try:
            for module, _ in modes:
                module.eval()
            yield
        finally:
            for module, was_training in modes:
                module.train(was_training)

    def predict_for(self, request: ImageRequest) -> Predict | None:
        """What predicts in place of the family for a sample image (ControlNet hints); None is the family itself.

        Raises ValueError where the request lacks something.
        """
        return None

    @abstractmethod
    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """Write the result atomically to `path`; `counters` = (epochs, steps) of this run."""

    def companion_files(self, path: Path) -> list[Path]:
        """Files that `save` may have written beside `path`; they are deleted together with it."""
        return []

    @property
    @abstractmethod
    def file_extension(self) -> str:
        """With the dot; empty for a folder."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What this method adds to the metadata: `ss_*` values and the modelspec's `model_type`."""


def size_conditioning(batch: Batch) -> SizeConditioning:
    """The pixel sizes of a batch."""
    return SizeConditioning(batch.original_sizes_hw, batch.crop_top_lefts, batch.target_sizes_hw)


def batch_latents(family: ModelFamily, batch: Batch, vae_batch_size: int | None) -> Tensor:
    """Model latents [B,C,h,w] of a batch: from its cache, or encoded now in chunks of `vae_batch_size`, or at once."""
    spec = family.latent
    if batch.latents is not None:
        return batch.latents if spec.cache_is_scaled else spec.normalize(batch.latents)
    if batch.images is None:
        raise ValueError("A batch carries neither images nor latents.")
    with torch.no_grad():
        chunks = batch.images.split(len(batch.images) if vae_batch_size is None else max(1, vae_batch_size))
        latents = torch.cat([family.encode_images(chunk) for chunk in chunks])
    if not latents.isfinite().all():
        logger.warning("NaN in latents, replaced by zeros: %s. --no_half_vae may help.", ", ".join(batch.image_keys))
        latents = latents.nan_to_num(0.0, 0.0, 0.0)
    return latents if spec.cache_is_scaled else spec.normalize(latents)


def diffusion_loss(
    method: TrainingMethod, batch: Batch, recipe: LossRecipe, timesteps: Tensor | None, noise: Tensor | None
) -> Tensor:
    """Weighted loss per sample [B]; the draws keep the order VAE sample, noise, timesteps, perturbation."""
    objective = recipe.objective
    x0 = batch_latents(method.family, batch, recipe.vae_batch_size).float()
    conditioning = method.conditioning(batch)
    if noise is None:
        noise = draw_noise(x0, recipe.noise)
    if timesteps is None:
        level = objective.sample_timesteps(len(x0), x0.shape[-2:], x0.device)
    else:
        level = objective.at(timesteps, x0.shape[-2:])
    perturbed = perturb(noise, recipe.noise, draws_strength_last=objective.draws_strength_last)
    x_t = objective.corrupt(x0, perturbed, level)

    prediction = objective.prediction(method.predict(x_t, level.timesteps, conditioning, batch).float(), x_t, level)
    target = objective.target(x0, noise, level).float()
    target = _with_preserved_outputs(method, target, x_t, level, conditioning, batch, objective.prediction)

    loss = elementwise_loss(prediction, target, recipe.loss_type, objective.huber_threshold(level))
    loss = loss * objective.weight(level).to(loss)[:, None, None, None]
    if recipe.masked_loss or batch.alpha_masks is not None:
        loss = apply_mask(loss, alpha_masks=batch.alpha_masks, conditioning_images=batch.conditioning_images)
    loss = loss.mean(dim=(1, 2, 3)) * batch.loss_weights.to(loss)
    return objective.post_weight(loss, level)


def _with_preserved_outputs(
    method: TrainingMethod, target: Tensor, x_t: Tensor, level: NoiseLevel, conditioning: Conditioning, batch: Batch,
    interpret: Callable[[Tensor, Tensor, NoiseLevel], Tensor],
) -> Tensor:
    """`target` with the base model's own prediction for samples that ask for differential output preservation."""
    wanted = [bool(attributes.get("diff_output_preservation")) for attributes in batch.custom_attributes]
    if not any(wanted):
        return target
    rows = torch.tensor(wanted, device=target.device).nonzero().flatten()
    with torch.no_grad():
        raw = method.base_prediction(x_t[rows], level.timesteps[rows], conditioning.select(rows), batch.select(rows))
        target = target.clone()
        target[rows] = interpret(raw.float(), x_t[rows], level.select(rows)).to(target)
    return target
