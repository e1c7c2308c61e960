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
from library.families.base import Conditioning, ModelFamily, SizeConditioning, Tokenize
from library.objectives import DdpmConfig, DdpmObjective
from library.options import Options
from library.sampling_spec import SamplingSpec
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


class StableDiffusion(ModelFamily):
    """SD 1.x, or with `--v2` SD 2.x. Conditioning: {"context": [B,S,d]}."""

    latent = LatentSpec(4, 8, 64, 0.18215, 0.0, "_sd.npz")
    denoiser: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoders: list[Any]  # one ClipTextEncoder, or None
    model_option = "--pretrained_model_name_or_path"  # the script's option for the model, in messages

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
        if self.options.device.xformers:
            problems += _xformers_problems()
        if self.options.cache.cache_text_encoder_outputs:
            problems.append("--cache_text_encoder_outputs does not work with Stable Diffusion 1 and 2; leave it out.")
        return problems

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Reads the model of `--pretrained_model_name_or_path` (and `--vae`); checks that the tokenizer fits."""
        from library.model_util import LoadSpec, load_model
        from library.models.layers import set_attention

        self._warn()
        model = self.options.model
        self.modules = load_model(
            LoadSpec(
                path=str(model.pretrained_model_name_or_path), v2=self.v2, dtype=weight_dtype, vae_dtype=vae_dtype,
                device=device, vae=model.vae, option=self.model_option,
            )
        )  # fmt: skip
        self.denoiser = self.modules.unet
        self._check_input_channels()
        self.vae = self.modules.vae
        self.text_encoders = [self.modules.text_encoder]
        self.tokenizer.check_fits(self.text_encoder, str(self.modules.source))
        self._warn_about_prediction_type()
        set_attention(self.denoiser, self.vae, attention_kind(self.options))

    def _check_input_channels(self) -> None:
        found = self.denoiser.config.in_channels
        if found != self.latent.channels:
            raise ValueError(
                f"{self.model_option} {self.modules.source}: the U-Net has {found} input channels (an inpainting or "
                f"upscaling model?); only models with {self.latent.channels} work here."
            )

    def _warn(self) -> None:
        model = self.options.model
        if self.v2 and model.clip_skip is not None:
            logger.warning("--clip_skip with --v2 counts from the penultimate layer, which is the usual one already.")
        if model.v_parameterization and not self.v2:
            logger.warning("--v_parameterization without --v2: the model must be a v-prediction variant of SD 1.")

    def _warn_about_prediction_type(self) -> None:
        from library.model_util import recorded_prediction_type

        recorded = recorded_prediction_type(self.modules.source)
        wanted = "v" if self.options.model.v_parameterization else "epsilon"
        if recorded and recorded != wanted:
            advice = "remove --v_parameterization" if wanted == "v" else "add --v_parameterization"
            logger.warning("%s says that it predicts %s: %s?", self.modules.source, recorded, advice)

    @property
    def text_encoder(self) -> Any:
        """The text encoder itself. Raises RuntimeError when it has been released."""
        if self.text_encoders[0] is None:
            raise RuntimeError("the text encoder has been released")
        return self.text_encoders[0]

    @property
    def vae_identity(self) -> str:
        """What latent caches record about the VAE."""
        return self.vae.weights_digest

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; takes effect in train mode."""
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.text_encoders:
            if encoder is not None:
                encoder.gradient_checkpointing_enable()

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
    def tokenize(self) -> Tokenize:
        """Captions -> {"input_ids": [B,n,77]}."""
        return SdTokenize(self.tokenizer, self.options.model.max_token_length)

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """{"input_ids": [B,n,77]} -> {"context": [B,S,d]}, S = 77 or 75n+2; cached contexts are taken as they are."""
        if cached is not None and "context" in cached:
            return Conditioning({"context": cached["context"]})
        context = clip.encode_captions(self.text_encoder, tokens["input_ids"], clip_skip=self.options.model.clip_skip)
        return Conditioning({"context": context})

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

    # --- latents -------------------------------------------------------------------------------------------
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B,3,H,W] in [-1,1] -> an unscaled posterior sample [B,4,H/8,W/8] in the VAE's dtype.

        A VAE that overflows in half precision gives NaN; the caller decides what that means.
        """
        images = images.to(device=self.vae.device, dtype=self.vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(images).latent_dist.sample(generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Model latents [B,4,h,w] -> images [B,3,8h,8w] around [-1,1] in the VAE's dtype."""
        z = self.latent.denormalize(latents).to(device=self.vae.device, dtype=self.vae.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return self.vae.decode(z).sample

    # --- denoising -----------------------------------------------------------------------------------------
    def make_objective(self) -> DdpmObjective:
        """Noise prediction, or velocity prediction with `--v_parameterization`."""
        options = self.options
        return DdpmObjective(
            DdpmConfig.from_options(options.noise, options.loss, v_parameterization=options.model.v_parameterization)
        )

    def sampling_spec(self) -> SamplingSpec:
        """The DDPM table that training uses, zero terminal SNR included."""
        velocity = self.options.model.v_parameterization
        betas = self.make_objective().schedule.betas
        return SamplingSpec(betas=betas, prediction_type="v_prediction" if velocity else "epsilon")

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
        weight = self.denoiser.conv_in.weight
        dtype = weight.dtype if weight.dtype.itemsize > 1 else x_t.dtype  # 8-bit weights compute in the input's dtype
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

    # --- networks and saving -------------------------------------------------------------------------------
    def network_text_encoders(self) -> Any:
        """The bare encoder: LyCORIS names its keys `lora_te_` only then."""
        return self.text_encoders[0]

    def save(
        self,
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        """A single file (layout "safetensors", "ckpt") or a folder ("diffusers", "diffusers_safetensors").

        `counters` = (epochs, steps) of this run; only pickles hold them.
        """
        from library.model_util import save_checkpoint, save_diffusers_folder, scheduler_config

        if layout in ("safetensors", "ckpt"):
            save_checkpoint(path, self.modules, v2=self.v2, dtype=dtype, metadata=metadata, counters=counters)
        elif layout in ("diffusers", "diffusers_safetensors"):
            scheduler = scheduler_config(v_parameterization=self.options.model.v_parameterization)
            save_diffusers_folder(
                path, self.modules, scheduler=scheduler, dtype=dtype, tokenizer=self.tokenizer,
                use_safetensors=layout == "diffusers_safetensors",
            )  # fmt: skip
        else:
            raise ValueError(f"layout {layout!r}: allowed are safetensors, ckpt, diffusers, diffusers_safetensors.")

    def model_metadata(self) -> dict[str, Any]:
        """Base version, architecture, default resolution and prediction type."""
        from library.model_util import model_metadata

        return model_metadata(v2=self.v2, v_parameterization=self.options.model.v_parameterization)


def _xformers_problems() -> list[str]:
    """One sentence if xformers does not work on the device that will be used."""
    from library.models.layers import XFORMERS_ADVICE, xformers_problem

    problem = xformers_problem("cuda" if torch.cuda.is_available() else "cpu")
    return [f"--xformers cannot be used here ({problem}). {XFORMERS_ADVICE}"] if problem else []


def attention_kind(options: Options) -> str | None:
    """The attention that the options ask for (`set_attention`'s kinds); None is the default."""
    device = options.device
    if device.xformers:
        return "xformers"
    if device.mem_eff_attn:
        return "mem_eff_attn"
    return "sdpa" if device.sdpa else None
