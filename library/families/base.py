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
from library.model_files import ALL_PARTS
from library.noise import NoiseConfig
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

    def added_parameters(self) -> list[nn.Parameter]:
        """What the denoiser does not have and `--control_net_lr` is for; empty where there is no such option."""
        return []

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no residual depends on (they get no gradient and stay as they are)."""
        return []

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass (train mode only)."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A text encoder whose token embeddings can be trained. `name` is the key in SDXL embedding files."""

    name: str  # "clip_l", "clip_g"
    tokenizer: ClipTokenizer
    encoder: Any  # None before `load`

    def add_words(self, words: Sequence[str]) -> list[int]:
        """Adds new words to the tokenizer; returns their consecutive ids. Raises ValueError if one is known already."""
        ids = [self.tokenizer.add_token(word) for word in words]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(f"the tokenizer from {self.tokenizer.source} numbers new words with gaps: {ids}.")
        return ids

    def set_rows(self, first: int, rows: Tensor) -> None:
        """Sets the embeddings of the ids from `first` on to `rows` [k,d]; the table becomes longer as needed.

        Raises ValueError if the encoder's embeddings have another width.
        """
        table = self.encoder.get_input_embeddings()
        if rows.shape[1] != table.embedding_dim:
            raise ValueError(
                f"the embeddings for {self.name} have width {rows.shape[1]}, this model's text encoder has "
                f"{table.embedding_dim}: they belong to another kind of model."
            )
        end = first + len(rows)
        if end > table.num_embeddings:
            table = self.encoder.resize_token_embeddings(end)
        table.weight.detach()[first:end] = rows.detach().to(table.weight)


def cached_parts(
    cached: Mapping[str, Tensor] | None, *names: str, device: torch.device | str, dtype: torch.dtype
) -> list[Tensor]:
    """Arrays of `Batch.text_outputs` (float32) as the released encoder would have given them: in `dtype` on `device`.

    For `encode_text(tokens, cached)` wherever `text_encoders[i]` is None: hidden states and pooled vectors in the
    dtype that the live encoder computes in, masks with `torch.int64`. Raises RuntimeError when an array is not there.
    """
    missing = [name for name in names if name not in (cached or {})]
    if missing or cached is None:
        raise RuntimeError(f"a text encoder has been released and its cached outputs are missing: {', '.join(missing)}")
    return [cached[name].to(device=device, dtype=dtype) for name in names]


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
    reads_prompt_weights = True  # whether `(word:1.2)` in a prompt means something; otherwise it is plain text
    wide_vae_option = "--no_half_vae"  # what runs the VAE in float32
    #: what `save` can write
    layouts: tuple[str, ...] = ("safetensors",)
    #: whether full training keeps the denoiser in the dtype of the computation, even without `--full_fp16/bf16`
    trains_in_weight_dtype: bool = False

    #: what `load` reads and `check_options` asks for; caching and tools need less than training. The others are None
    parts: frozenset[str] = ALL_PARTS

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

    def drop_text(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning of a training batch with text encoders left out by chance, where options ask for it.

        Draws from Python's global generator. Not called for validation, samples and caches.
        """
        return conditioning

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

    def encode_prompts_with_cached(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], cached: Mapping[str, Tensor]
    ) -> tuple[Conditioning, Conditioning]:
        """`encode_prompts` once some encoders are released and others are live (sample images while those train).

        `cached`: what `encode_text_for_cache` gave for [*prompts, *negative_prompts]; live encoders replace their part.
        """
        tokens = self.tokenize([*prompts, *negative_prompts])
        with torch.no_grad():
            both = self.encode_text(tokens, cached)
        rows = torch.arange(len(prompts) + len(negative_prompts))
        return both.select(rows[: len(prompts)]), both.select(rows[len(prompts) :])

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

    def training_noise(self) -> NoiseConfig:
        """The noise options that count for this family."""
        return NoiseConfig.from_options(self.options.noise)

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

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters of the denoiser that the options exclude from full training."""
        return []

    def unused_text_encoder_parameters(self, index: int) -> list[nn.Parameter]:
        """Parameters of text encoder `index` that have no part in the conditioning (they get no gradient)."""
        return []

    def make_control_net(self, path: str | None) -> ControlNet:
        """A ControlNet from a file or folder, or without `path` a new one grown from the loaded denoiser; float32."""
        raise ValueError("ControlNet is not possible with this kind of model.")

    # --- networks and saving -------------------------------------------------------------------------------
    @property
    def default_layout(self) -> str:
        """After `load`: what full training writes where nobody chooses (`--use_safetensors` apart)."""
        return "safetensors"

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

    def companion_files(self, path: Path) -> list[Path]:
        """Files that `save` may write beside the file `path`; they are deleted together with it."""
        return []

    @abstractmethod
    def model_metadata(self) -> dict[str, Any]:
        """Family entries: `ss_base_model_version`, `ss_v2`, extra `ss_*` keys, and what modelspec needs
        (`architecture`, `default_resolution`, `prediction_type`)."""
