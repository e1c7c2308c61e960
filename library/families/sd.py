"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a 4-channel VAE, diffusers' U-Net."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import LatentSpec
from library.families.autoencoder_family import attention_kind, compute_dtype
from library.families.base import Conditioning, ControlNet, EmbeddingTable, SizeConditioning, Tokenize
from library.families.unet_family import UNetFamily
from library.model_files import recorded_noise
from library.options import Options
from library.text import clip
from library.text.clip import ClipTokenizer, PromptStyle

logger = logging.getLogger(__name__)


class SdTokenize:
    """Captions -> {"input_ids": int64 [B,n,77]}; picklable."""

    def __init__(self, tokenizer: ClipTokenizer, max_token_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_token_length = max_token_length

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer.windows(captions, self.max_token_length)}


class StableDiffusion(UNetFamily):
    """SD 1.x, or with `--v2` SD 2.x. Conditioning: {"context": [B,S,d]}."""

    latent = LatentSpec(4, 8, 64, 0.18215, 0.0, "_sd.npz")

    # --- loading -------------------------------------------------------------------------------------------
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.v2 = options.model.v2

    def check_options(self) -> list[str]:
        """Problems with the options that concern this family."""
        problems = []
        clip_skip = self.options.model.clip_skip
        if clip_skip is not None and clip_skip < 1:
            problems.append(f"--clip_skip {clip_skip}: it counts layers from the end, so it is 1 or more.")
        if self.options.cache.cache_text_encoder_outputs:
            problems.append("--cache_text_encoder_outputs does not work with Stable Diffusion 1 and 2; leave it out.")
        return problems

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Reads the model of `--pretrained_model_name_or_path` (and `--vae`); checks that the tokenizer fits."""
        from library.model_util import LoadSpec, load_model

        self._warn()
        model = self.options.model
        self.modules = load_model(
            LoadSpec(
                path=str(model.pretrained_model_name_or_path), v2=self.v2, dtype=weight_dtype, vae_dtype=vae_dtype,
                device=device, vae=model.vae, option=self.model_option, parts=self.parts,
            )
        )  # fmt: skip
        self.denoiser, self.vae = self.modules.unet, self.modules.vae
        self.text_encoders = [self.modules.text_encoder]
        source = self.modules.source
        self._finish_loading(source, recorded_noise(source))

    @property
    def text_encoder(self) -> Any:
        """The text encoder itself. Raises RuntimeError when it has been released."""
        return self.encoder(0)

    def _warn(self) -> None:
        model = self.options.model
        if self.v2 and model.clip_skip is not None:
            logger.warning("--clip_skip with --v2 counts from the penultimate layer, which is the usual one already.")
        if model.v_parameterization and not self.v2:
            logger.warning("--v_parameterization without --v2: the model must be a v-prediction variant of SD 1.")

    # --- text ----------------------------------------------------------------------------------------------
    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        """The model's tokenizer; found without reading the model."""
        model = self.options.model
        return clip.load_tokenizer(
            clip.CLIP_H if self.v2 else clip.CLIP_L,
            model_path=model.pretrained_model_name_or_path,
            cache_dir=model.tokenizer_cache_dir,
        )

    @property
    def tokenizers(self) -> list[ClipTokenizer]:
        """The one tokenizer."""
        return [self.tokenizer]

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> {"input_ids": [B,n,77]}."""
        return SdTokenize(self.tokenizer, self.options.model.max_token_length)

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """{"input_ids": [B,n,77]} -> {"context": [B,S,d]}, S = 77 or 75n+2; cached contexts are taken as they are."""
        if cached is not None and "context" in cached:
            return Conditioning({"context": cached["context"]})
        context = clip.encode_captions(self.text_encoder, tokens["input_ids"], clip_skip=self.options.model.clip_skip)
        return Conditioning({"context": context})

    def embedding_tables(self) -> list[EmbeddingTable]:
        """The one text encoder's."""
        [encoder] = getattr(self, "text_encoders", [None])
        return [EmbeddingTable("clip_l", self.tokenizer, encoder)]

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        """Captions with prompt weights -> {"context": [B,S,d]}; hidden states times weights."""
        model = self.options.model
        ids, weights = self.tokenizer.weighted_windows(captions, model.max_token_length)
        context = clip.encode_captions(self.text_encoder, ids, clip_skip=model.clip_skip, weights=weights)
        return Conditioning({"context": context})

    def encode_prompts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        *,
        clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) contexts [B,77n,d], n windows for the longest prompt of both lists."""
        style = style or PromptStyle()
        ids, weights = clip.tokenize_prompts(self.tokenizer, [*prompts, *negative_prompts], style)
        clip_skip = clip_skip or self.options.model.clip_skip
        context = clip.encode_prompts(self.text_encoder, ids, weights, clip_skip=clip_skip, emphasis=style.emphasis)
        positive, negative = context.split([len(prompts), len(negative_prompts)])
        return Conditioning({"context": positive}), Conditioning({"context": negative})

    # --- denoising -----------------------------------------------------------------------------------------
    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning | None = None,
        *,
        residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Noise or velocity [B,4,h,w]. `residuals`: a ControlNet's (one per skip connection, one for the middle)."""
        dtype = compute_dtype(self.denoiser, x_t)
        down, middle = residuals or (None, None)
        return self.denoiser(
            x_t.to(dtype),
            timesteps.float(),
            conditioning["context"].to(dtype),
            down_block_additional_residuals=None if down is None else tuple(r.to(dtype) for r in down),
            mid_block_additional_residual=None if middle is None else middle.to(dtype),
            return_dict=False,
        )[0]

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Encoder levels, middle, decoder levels of the U-Net."""
        unet = self.denoiser
        blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
        if unet.mid_block is not None:
            blocks.append(("mid_block", unet.mid_block))
        return blocks + [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]

    def unused_text_encoder_parameters(self, index: int) -> list[nn.Parameter]:
        """The layers that `--clip_skip` leaves out."""
        layers = self.text_encoder.text_model.encoder.layers
        used = len(layers) + 1 - max(1, self.options.model.clip_skip or 1)
        return [parameter for layer in layers[used:] for parameter in layer.parameters()]

    def make_control_net(self, path: str | None) -> ControlNet:
        """A ControlNet for this U-Net."""
        from library.families.control_nets import stable_diffusion_control_net

        return stable_diffusion_control_net(self.denoiser, path, attention_kind(self.options))

    # --- networks and saving -------------------------------------------------------------------------------
    def network_text_encoders(self) -> Any:
        """The bare encoder: LyCORIS names its keys `lora_te_` only then."""
        return self.text_encoders[0]

    def _save_file(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int]
    ) -> None:
        from library.model_util import save_checkpoint

        save_checkpoint(path, self.modules, v2=self.v2, dtype=dtype, metadata=metadata, counters=counters)

    def _save_folder(self, path: Path, *, dtype: torch.dtype | None, use_safetensors: bool) -> None:
        from library.model_util import save_diffusers_folder, scheduler_config

        save_diffusers_folder(
            path, self.modules, scheduler=scheduler_config(v_parameterization=self.options.model.v_parameterization),
            dtype=dtype, use_safetensors=use_safetensors, tokenizer=self.tokenizer,
        )  # fmt: skip

    def model_metadata(self) -> dict[str, Any]:
        """Base version, architecture, default resolution and prediction type."""
        from library.model_util import model_metadata

        return model_metadata(v2=self.v2, v_parameterization=self.options.model.v_parameterization)
