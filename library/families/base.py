"""What a model family must answer. Nothing here, and nothing in a family, knows what is being trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.data.records import LatentSpec, TextCacheSpec
from library.hashes import sshs_hashes
from library.sampling_spec import SamplingSpec

if TYPE_CHECKING:
    from library.objectives import Objective
    from library.options import Options
    from library.text.clip import ClipTokenizer, PromptStyle


@dataclass(frozen=True)
class Conditioning:
    """Named tensors that condition the denoiser; the first dimension of each is the batch."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def select(self, rows: Tensor) -> Conditioning:
        """The rows (index or boolean mask [B]) of every tensor."""
        return Conditioning({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved; only floating tensors change their dtype."""
        return Conditioning(
            {n: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for n, v in self.tensors.items()}
        )


@dataclass(frozen=True)
class SizeConditioning:
    """Pixel sizes for families that are conditioned on them; each int64 [B,2] in (height, width)/(top, left)."""

    original_hw: Tensor
    crop_top_left: Tensor
    target_hw: Tensor


class ControlNet(nn.Module, ABC):
    """A side network that turns a hint picture into residuals for the denoiser; families make it, methods train it."""

    @abstractmethod
    def residuals(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None, hint: Tensor
    ) -> Any:
        """What `ModelFamily.predict(residuals=...)` takes; `hint` is [B,3,H,W] in [-1,1], the pixels of `x_t`."""

    @abstractmethod
    def save(self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the side network alone, atomically, in the form that other programs read."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass (train mode only)."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A text encoder whose token embeddings can be trained. `name` is the key in SDXL embedding files."""

    name: str  # "clip_l", "clip_g"
    tokenizer: ClipTokenizer
    encoder: Any  # None before `load`


class Tokenize(Protocol):
    """Picklable: runs in data workers."""

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]: ...


class ModelFamily(ABC):
    """A model: its files, its text path, its latents, its forward pass.

    Life: construct from options (cheap: no weights are read; option errors raise here) -> `load` -> use.
    After `load`: `denoiser`, `vae`, `text_encoders` hold modules in the dtype asked for, on the device asked for,
    in eval mode, with `requires_grad` off. `text_encoders` entries may be None when cached outputs replace them.
    """

    latent: LatentSpec
    #: one name per text encoder, as in logs and option names, e.g. ("clip_l", "t5xxl")
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    #: text encoders that are trained only when an option or network argument `train_<name>` asks for it
    opt_in_text_encoders: frozenset[str] = frozenset()
    #: options that are accepted and mean nothing for this family -> why (they warn once when set)
    without_effect: Mapping[str, str] = MappingProxyType({})

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: list[Any]  # modules in the order of `text_encoder_names`; None once released

    def __init__(self, options: Options) -> None:
        self.options = options

    # --- loading -------------------------------------------------------------------------------------------
    @abstractmethod
    def check_options(self) -> list[str]:
        """Problems with the options that concern this family (one sentence each), before anything is loaded."""

    @abstractmethod
    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Files -> modules. Raises ValueError/FileNotFoundError that names file, component and keys."""

    # --- text ----------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def tokenize(self) -> Tokenize:
        """Captions -> dict of tensors [B,...]; available before `load`."""

    @abstractmethod
    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Token tensors (and, where present, cached encoder outputs) -> conditioning. Differentiable."""

    @abstractmethod
    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        """Captions with `(word:1.2)` syntax -> conditioning (training: `--weighted_captions`)."""

    @abstractmethod
    def encode_prompts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) conditioning of equal length for generation, with weights and long prompts."""

    @property
    def text_cache(self) -> TextCacheSpec | None:
        """How text-encoder outputs are cached under these options; None where they cannot be. Needs no models."""
        return None

    def encode_text_for_cache(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of `text_cache`, each with the batch in front. No dropout; for frozen encoders."""
        raise NotImplementedError

    def cached_text_encoders(self, trained: Sequence[bool]) -> list[bool]:
        """Which encoders' outputs come from the cache (`--cache_text_encoder_outputs`) when `trained` are trained.

        Needs no models. Raises ValueError for combinations that cannot work.
        """
        return [not is_trained for is_trained in trained]

    def release_text_encoders(self, released: Sequence[bool]) -> None:
        """Forget encoders that are not needed any more: from now on `encode_text` takes their part from the cache."""
        self.text_encoders = [
            None if is_released else encoder
            for encoder, is_released in zip(self.text_encoders, released, strict=True)
        ]

    @property
    def text_identity(self) -> str:
        """What text caches remember of the encoders: a hash of their weights in the dtype that encodes."""
        hashes = [sshs_hashes(e.state_dict()).model_hash[:16] for e in self.text_encoders if e is not None]
        return "-".join(hashes)

    def embedding_tables(self) -> list[EmbeddingTable]:
        """The encoders that Textual Inversion trains. Tokenizers are there before `load`, encoders after it."""
        raise ValueError("Textual Inversion is not possible with this kind of model.")

    # --- latents -------------------------------------------------------------------------------------------
    @abstractmethod
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B,3,H,W] in [-1,1] -> a posterior sample [B,C,h,w] as it is cached (`latent.normalize` makes it model
        input unless `latent.cache_is_scaled`). Draws from torch's global generator if none is given."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Model latents [B,C,h,w] -> images [B,3,H,W] in [-1,1]."""

    @property
    def vae_identity(self) -> str:
        """What latent caches remember of the VAE: a hash of its weights in the dtype that encodes."""
        return sshs_hashes(self.vae.state_dict()).model_hash[:16]

    # --- denoising -----------------------------------------------------------------------------------------
    @abstractmethod
    def make_objective(self) -> Objective:
        """The objective (schedule, target, weights) that the options ask for."""

    @abstractmethod
    def sampling_spec(self) -> SamplingSpec:
        """The noise process run backwards, and what prompts start from."""

    @abstractmethod
    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None = None,
        *, residuals: Any = None,
    ) -> Tensor:
        """Raw denoiser output [B,C,h,w]; `timesteps` are float32 [B] in [0, 1000), `residuals` a ControlNet's."""

    @abstractmethod
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks of the denoiser in forward order (swap, fused groups, block learning rates)."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in the denoiser and the text encoders (train mode only)."""

    def block_learning_rate_groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The denoiser's parameters in the groups of `--block_lr`, in order; empty where there is no such option."""
        return []

    def unused_text_encoder_parameters(self, index: int) -> list[nn.Parameter]:
        """Parameters of text encoder `index` that have no part in the conditioning (they get no gradient)."""
        return []

    def make_control_net(self, path: str | None) -> ControlNet:
        """A ControlNet from a file or folder, or without `path` a new one grown from the loaded denoiser; float32."""
        raise ValueError("ControlNet is not possible with this kind of model.")

    # --- networks and saving -------------------------------------------------------------------------------
    def network_text_encoders(self) -> Any:
        """What third-party network modules receive as `text_encoder`: a list, or the bare encoder (SD 1/2)."""
        return self.text_encoders

    @abstractmethod
    def save(
        self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        """The whole checkpoint, written atomically. `layout`: safetensors, ckpt, diffusers, diffusers_safetensors.

        `counters` = (epochs, steps) of this run; only pickles hold them.
        """

    @abstractmethod
    def model_metadata(self) -> dict[str, Any]:
        """Family entries: `ss_base_model_version`, `ss_v2`, extra `ss_*` keys, and what modelspec needs
        (`architecture`, `default_resolution`, `prediction_type`)."""
