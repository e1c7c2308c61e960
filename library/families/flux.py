"""FLUX.1 dev and schnell: CLIP-L and T5-XXL, a 16-channel autoencoder, a transformer over packed latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import LatentSpec, TextCacheSpec
from library.families.autoencoder_family import AutoencoderFamily, attention_kind, compute_dtype
from library.families.base import Conditioning, ControlNet, SizeConditioning, Tokenize, cached_parts
from library.flux_model_util import (
    LATENT_CHANNELS,
    SCALE,
    SHIFT,
    FluxFacts,
    FluxLoadSpec,
    FluxModules,
    inspect,
    load_model,
    model_metadata,
    problems,
    save_diffusers_folder,
    save_transformer,
)
from library.losses import HuberConfig
from library.model_files import TEXT, VAE
from library.models.flux import FluxResiduals, image_ids, pack_latents, unpack_latents
from library.models.placement import a_tensor_of
from library.noise import NoiseConfig
from library.objectives import FlowConfig, RectifiedFlow
from library.options import Options
from library.sampling_spec import SamplingDefaults, SamplingSpec
from library.schedulers import DensityConfig, packed_tokens, resolution_shifted_inference_sigmas, shift_sigmas
from library.text import clip, t5
from library.text.clip import ClipTokenizer, PromptStyle
from library.text.t5 import T5Tokenizer

logger = logging.getLogger(__name__)

TEXT_LENGTHS = {False: 512, True: 256}  # T5 tokens of dev and of schnell
CLIP_PART, T5_PARTS = "l_pooled", ("t5_out", "txt_ids", "t5_attn_mask")
_SAMPLING = {"flux_shift": "resolution_shift"}  # names of `--timestep_sampling` that the objective calls differently
_NO_DDPM = "FLUX learns straight paths and has no noise schedule of this kind."
_PLAIN_NOISE = "FLUX is trained with plain Gaussian noise."


class FluxTokenize:
    """Captions -> {"clip_l": [B,77], "t5xxl": [B,T], "t5xxl_mask": [B,T]}, all int64; picklable."""

    def __init__(self, clip_l: ClipTokenizer, t5xxl: T5Tokenizer, length: int) -> None:
        self.clip_l = clip_l
        self.t5xxl = t5xxl
        self.length = length

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        ids, mask = self.t5xxl.ids_and_mask(captions, self.length)
        return {"clip_l": self.clip_l.windows(captions)[:, 0], "t5xxl": ids, "t5xxl_mask": mask}


class Flux(AutoencoderFamily):
    """FLUX.1. Conditioning: {"pooled": [B,d], "context": [B,T,D]}, with `--apply_t5_attn_mask` "mask" [B,T], and
    where somebody chose it "guidance" [B]; otherwise guidance is `--guidance_scale`."""

    latent = LatentSpec(
        LATENT_CHANNELS, 8, 16, SCALE, SHIFT, "_flux.npz", cache_keys_have_size=True, cache_is_scaled=True,
        pixel_unit=16,
    )  # fmt: skip
    text_encoder_names = ("clip_l", "t5xxl")
    opt_in_text_encoders = frozenset({"t5xxl"})
    reads_prompt_weights = False
    layouts = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
    trains_in_weight_dtype = True
    denoiser: Any  # models.flux.Flux
    text_encoders: list[Any]  # ClipTextEncoder, T5TextEncoder; None where released

    # --- loading -------------------------------------------------------------------------------------------
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.without_effect = MappingProxyType(_options_without_effect(options))
        self.encoder_dtypes: Mapping[str, torch.dtype] = {}  # of text encoders that shall have one of their own

    def check_options(self) -> list[str]:
        """Problems with the options that concern this family; looks at names and shapes in the files."""
        options, found = self.options, []
        if options.flux.model_type != "flux":
            found.append(f"--model_type {options.flux.model_type}: only flux can be used here.")
        if options.dataset.weighted_captions:
            found.append("--weighted_captions is not possible with FLUX: T5 takes no prompt weights. Leave it out.")
        length = options.encoders.t5xxl_max_token_length
        if length is not None and length < 1:
            found.append(f"--t5xxl_max_token_length {length}: it must be at least 1.")
        try:
            self._flow_config()
        except ValueError as error:
            found.append(str(error))
        if self._is_autoencoder_alone():
            return found
        if not options.model.pretrained_model_name_or_path:
            return [*found, f"{self.model_option} is missing."]
        in_files = problems(self._load_spec())
        return found + (in_files or self._problems_with_channels())

    def _is_autoencoder_alone(self) -> bool:
        """Whether nothing is needed but the file of `--ae`."""
        return self.parts == {VAE} and bool(self.options.flux.ae)

    def _problems_with_channels(self) -> list[str]:
        if not Path(self._load_spec().path).exists():
            return []
        facts, needed = self.facts, 4 * self.latent.channels
        if facts.in_channels == facts.out_channels == needed:
            return []
        return [
            f"{self.model_option} {self._load_spec().path} takes {facts.in_channels} channels per token and gives "
            f"{facts.out_channels} (a Fill, Canny or Depth model?); only models with {needed} work here."
        ]

    def _load_spec(self, **changes: Any) -> FluxLoadSpec:
        options = self.options
        return FluxLoadSpec(
            path=str(options.model.pretrained_model_name_or_path), vae=options.flux.ae, option=self.model_option,
            clip_l=options.encoders.clip_l, t5xxl=options.encoders.t5xxl, parts=self.parts, **changes,
        )  # fmt: skip

    @cached_property
    def facts(self) -> FluxFacts:
        """dev or schnell, and channels; from names and shapes in the model's file."""
        return inspect(self._load_spec())

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Reads transformer, autoencoder and text encoders; checks that the tokenizers fit."""
        from library.models.layers import set_attention

        if self._is_autoencoder_alone():
            self.load_vae_alone(str(self.options.flux.ae), option="--ae", dtype=vae_dtype, device=device)
            return
        wrong = self._problems_with_channels()
        if wrong:
            raise ValueError(wrong[0])
        self.modules: FluxModules = load_model(
            self._load_spec(
                dtype=weight_dtype, vae_dtype=vae_dtype, device=device, encoder_dtypes=self.encoder_dtypes
            )
        )
        self.denoiser, self.vae = self.modules.transformer, self.modules.ae
        self.text_encoders = [self.modules.encoders.get(name) for name in self.text_encoder_names]
        self._text_dtype = weight_dtype
        if TEXT in self.parts:
            self.clip_tokenizer.check_fits(self.text_encoders[0], self._origin("clip_l"))
            self.t5_tokenizer.check_fits(self.text_encoders[1], self._origin("t5xxl"))
        set_attention(self.denoiser, self.vae, attention_kind(self.options))

    def _origin(self, name: str) -> str:
        return f"--{name} {self.modules.encoder_sources[name].tensors.source}"

    def release_text_encoders(self, released: Sequence[bool]) -> None:
        """Forget encoders that are not needed any more."""
        super().release_text_encoders(released)
        self.modules.encoders = dict(zip(self.text_encoder_names, self.text_encoders, strict=True))

    # --- text ----------------------------------------------------------------------------------------------
    @cached_property
    def clip_tokenizer(self) -> ClipTokenizer:
        """CLIP-L's tokenizer; found without reading the model."""
        model = self.options.model
        return clip.load_tokenizer(
            clip.CLIP_L, model_path=model.pretrained_model_name_or_path, cache_dir=model.tokenizer_cache_dir
        )

    @cached_property
    def t5_tokenizer(self) -> T5Tokenizer:
        """T5's tokenizer; found without reading the model."""
        model = self.options.model
        return t5.load_tokenizer(model_path=model.pretrained_model_name_or_path, cache_dir=model.tokenizer_cache_dir)

    @property
    def text_length(self) -> int:
        """T5 tokens per caption: `--t5xxl_max_token_length`, or what the model was trained with."""
        return self.options.encoders.t5xxl_max_token_length or TEXT_LENGTHS[self.facts.is_schnell]

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> {"clip_l": [B,77], "t5xxl": [B,T], "t5xxl_mask": [B,T]}."""
        return FluxTokenize(self.clip_tokenizer, self.t5_tokenizer, self.text_length)

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Tokens -> {"pooled": [B,d], "context": [B,T,D]} (and "mask" [B,T]); released encoders' parts are cached."""
        clip_l, t5xxl = self.text_encoders
        device = a_tensor_of(self.denoiser).device
        if clip_l is not None:
            pooled = clip_l(tokens["clip_l"].to(clip_l.device)).pooler_output
        else:
            [pooled] = cached_parts(cached, CLIP_PART, device=device, dtype=self._text_dtype)
        if t5xxl is not None:
            context, mask = self._encode_t5(tokens)
        else:
            [context] = cached_parts(cached, "t5_out", device=device, dtype=self._text_dtype)
            [mask] = cached_parts(cached, "t5_attn_mask", device=device, dtype=torch.int64)
        tensors = {"pooled": pooled, "context": context}
        if self.options.encoders.apply_t5_attn_mask:
            tensors["mask"] = mask
        return Conditioning(tensors)

    def _encode_t5(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        encoder = self.text_encoders[1]
        ids, mask = tokens["t5xxl"].to(encoder.device), tokens["t5xxl_mask"].to(encoder.device)
        seen = mask if self.options.encoders.apply_t5_attn_mask else None
        return encoder(ids, seen).last_hidden_state, mask

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        """Raises ValueError: T5 takes no prompt weights."""
        raise ValueError("--weighted_captions is not possible with FLUX: T5 takes no prompt weights. Leave it out.")

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) conditioning; prompts are taken literally, without weights, cut at the T5 length."""
        both = self.encode_text(self.tokenize([*prompts, *negative_prompts]))
        rows = torch.arange(len(prompts) + len(negative_prompts))
        return both.select(rows[: len(prompts)]), both.select(rows[len(prompts) :])

    @property
    def text_cache(self) -> TextCacheSpec:
        """`_flux_te.npz`: pooled CLIP-L, T5 states, text positions (zeros), T5 mask."""
        return TextCacheSpec(
            "_flux_te.npz", (CLIP_PART, *T5_PARTS),
            flags={"apply_t5_attn_mask": self.options.encoders.apply_t5_attn_mask},
            lengths=dict.fromkeys(T5_PARTS, self.text_length),
        )  # fmt: skip

    def encode_text_for_cache(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of `text_cache`; all encoders must be present."""
        clip_l = self.text_encoders[0]
        pooled = clip_l(tokens["clip_l"].to(clip_l.device)).pooler_output
        context, mask = self._encode_t5(tokens)
        ids = torch.zeros(*context.shape[:2], 3, dtype=context.dtype, device=context.device)
        return {CLIP_PART: pooled, "t5_out": context, "txt_ids": ids, "t5_attn_mask": mask}

    def cached_text_encoders(self, trained: Sequence[bool]) -> list[bool]:
        """T5 always, CLIP-L unless it is trained. Raises ValueError if T5 is trained."""
        if trained[1]:
            raise ValueError(
                "--cache_text_encoder_outputs is not possible while T5 is trained (train_t5xxl): its output changes. "
                "Remove one of them."
            )
        return [not is_trained for is_trained in trained]

    # --- denoising -----------------------------------------------------------------------------------------
    def _flow_config(self) -> FlowConfig:
        flow, noise = self.options.flow, self.options.noise
        return FlowConfig(
            timestep_sampling=_SAMPLING.get(flow.timestep_sampling, flow.timestep_sampling),
            prediction_type=flow.model_prediction_type,
            density=DensityConfig(flow.weighting_scheme, flow.logit_mean, flow.logit_std, flow.mode_scale),
            sigmoid_scale=flow.sigmoid_scale,
            shift=flow.discrete_flow_shift,
            min_timestep=noise.min_timestep,
            max_timestep=noise.max_timestep,
            huber=HuberConfig.from_options(self.options.loss),
        )

    def make_objective(self) -> RectifiedFlow:
        """Velocity along straight paths, with the timesteps and the interpretation that the options ask for."""
        if self.options.flow.model_prediction_type == "sigma_scaled":
            logger.warning(
                "--model_prediction_type sigma_scaled (the default) compares an estimate of the image with the "
                "direction from image to noise, which is inconsistent: --model_prediction_type raw is recommended."
            )
        return RectifiedFlow(self._flow_config())

    def training_noise(self) -> NoiseConfig:
        """Gaussian noise; only the perturbation of the noisy input (`--ip_noise_gamma`) counts."""
        noise = self.options.noise
        return NoiseConfig(
            ip_noise_gamma=noise.ip_noise_gamma, ip_noise_gamma_random_strength=noise.ip_noise_gamma_random_strength
        )

    def sampling_spec(self) -> SamplingSpec:
        """Euler steps from pure noise; for dev shifted by the number of tokens, for schnell even."""
        is_schnell = self.facts.is_schnell

        def sigmas(steps: int, latent_hw: tuple[int, int], shift: float | None) -> Tensor:
            is_shifted = shift is None and not is_schnell
            even = resolution_shifted_inference_sigmas(steps, packed_tokens(latent_hw), shifted=is_shifted)
            return even if shift is None else shift_sigmas(even, shift)

        defaults = SamplingDefaults(
            size_multiple=16, steps=20, scale=1.0, guidance_scale=None if is_schnell else 3.5
        )  # fmt: skip
        return SamplingSpec(flow_sigmas=sigmas, defaults=defaults)

    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None = None,
        *, residuals: FluxResiduals | None = None,
    ) -> Tensor:
        """Velocity [B,16,h,w]; `residuals` are a ControlNet's."""
        inputs = self.denoiser_inputs(x_t, timesteps, conditioning)
        return unpack_latents(self.denoiser(**inputs, residuals=residuals), (x_t.shape[-2], x_t.shape[-1]))

    def denoiser_inputs(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None = None
    ) -> dict[str, Any]:
        """Noisy latents [B,16,h,w] and conditioning as the transformer, or a ControlNet of it, takes them."""
        dtype = compute_dtype(self.denoiser, x_t)
        guidance = conditioning.tensors.get("guidance")
        if guidance is None:
            guidance = torch.full((len(x_t),), self.options.flow.guidance_scale, device=x_t.device)
        return {
            "img": pack_latents(x_t.to(dtype)),
            "img_ids": image_ids(len(x_t), (x_t.shape[-2], x_t.shape[-1]), x_t.device),
            "txt": conditioning["context"].to(dtype),
            "timesteps": timesteps.float() / 1000,
            "y": conditioning["pooled"].to(dtype),
            "guidance": guidance,
            "text_mask": conditioning.tensors.get("mask"),
        }

    def make_control_net(self, path: str | None) -> ControlNet:
        """A ControlNet for this transformer."""
        from library.families.control_nets import flux_control_net

        return flux_control_net(self.denoiser, self.denoiser_inputs, path)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Double blocks, then single blocks."""
        model = self.denoiser
        blocks = [(f"double_blocks.{index}", block) for index, block in enumerate(model.double_blocks)]
        return blocks + [(f"single_blocks.{index}", block) for index, block in enumerate(model.single_blocks)]

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        """The transformer alone (layout "safetensors", "ckpt") or a folder ("diffusers", "diffusers_safetensors").

        `counters` = (epochs, steps) of this run; only pickles hold them.
        """
        if layout in ("safetensors", "ckpt"):
            save_transformer(path, self.modules, dtype=dtype, metadata=metadata, counters=counters)
        elif layout in ("diffusers", "diffusers_safetensors"):
            tokenizers = {"clip_l": self.clip_tokenizer, "t5xxl": self.t5_tokenizer}
            save_diffusers_folder(
                path, self.modules, dtype=dtype, use_safetensors=layout == "diffusers_safetensors",
                tokenizers=tokenizers,
            )  # fmt: skip
        else:
            raise ValueError(f"layout {layout!r}: allowed are {', '.join(self.layouts)}.")

    def model_metadata(self) -> dict[str, Any]:
        """Base version, architecture (dev or schnell as the model is), resolution, and how it was trained."""
        flow, options = self.options.flow, self.options
        names = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale", "timestep_sampling",
                 "sigmoid_scale", "model_prediction_type", "discrete_flow_shift")  # fmt: skip
        return {
            **model_metadata(is_schnell=self.facts.is_schnell),
            "ss_model_type": options.flux.model_type,
            "ss_apply_t5_attn_mask": options.encoders.apply_t5_attn_mask,
            **{f"ss_{name}": getattr(flow, name) for name in names},
        }


def _options_without_effect(options: Options) -> dict[str, str]:
    """Options that mean nothing for FLUX, or nothing together with the others -> why."""
    noise = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
             "multires_noise_discount")  # fmt: skip
    ddpm = ("zero_terminal_snr", "v_parameterization", "min_snr_gamma", "scale_v_pred_loss_like_noise_pred",
            "v_pred_like_loss", "debiased_estimation_loss")  # fmt: skip
    reasons = dict.fromkeys(noise, _PLAIN_NOISE) | dict.fromkeys(ddpm, _NO_DDPM)
    reasons |= {
        "v2": "it is for Stable Diffusion 2.",
        "vae": "FLUX's autoencoder is given with --ae.",
        "sample_sampler": "pictures are always drawn with Euler steps.",
        "clip_skip": "FLUX uses CLIP-L's pooled state and the last layer of T5.",
        "max_token_length": "FLUX reads --t5xxl_max_token_length tokens.",
    }
    return reasons | _flow_options_without_effect(options)


def _flow_options_without_effect(options: Options) -> dict[str, str]:
    flow, reasons = options.flow, {}
    sampling = flow.timestep_sampling
    with_density = sampling == "sigma"
    has_density = flow.weighting_scheme in ("logit_normal", "mode")
    if has_density and not with_density:
        reasons["weighting_scheme"] = f"{flow.weighting_scheme} needs --timestep_sampling sigma."
    if flow.weighting_scheme in ("sigma_sqrt", "cosmap") and flow.model_prediction_type != "sigma_scaled":
        reasons["weighting_scheme"] = f"{flow.weighting_scheme} needs --model_prediction_type sigma_scaled."
    if flow.weighting_scheme != "logit_normal" or not with_density:
        reasons |= dict.fromkeys(("logit_mean", "logit_std"), "it belongs to --weighting_scheme logit_normal.")
    if flow.weighting_scheme != "mode" or not with_density:
        reasons["mode_scale"] = "it belongs to --weighting_scheme mode."
    if sampling in ("sigma", "uniform"):
        reasons["sigmoid_scale"] = "it belongs to --timestep_sampling sigmoid, shift and flux_shift."
    if sampling not in ("shift", "sigma"):
        reasons["discrete_flow_shift"] = "it belongs to --timestep_sampling shift and sigma."
    return reasons
