"""Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and an optional T5, a 16-channel VAE, the MMDiT on a rectified flow."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from library.config_util import SupportedKinds, load_data_config
from library.data.records import LatentSpec, TextCacheSpec
from library.families.autoencoder_family import AutoencoderFamily, attention_kind, compute_dtype
from library.families.base import Conditioning, SizeConditioning, Tokenize, cached_parts
from library.families.sd3_text import DropRates, Sd3Tokenize, clip_places, dropped
from library.losses import HuberConfig
from library.model_files import DENOISER, TEXT
from library.models.mmdit import MMDiT, ScaledPositions
from library.noise import NoiseConfig
from library.objectives import FlowConfig, RectifiedFlow
from library.options import Options
from library.sampling_spec import SamplingDefaults, SamplingSpec
from library.schedulers import DensityConfig, shifted_inference_sigmas
from library.sd3_model_util import (
    LATENT_CHANNELS,
    SAMPLING_SHIFT,
    SCALE,
    SHIFT,
    Sd3LoadSpec,
    companion,
    has_t5,
    load_model,
    model_metadata,
    problems_with_files,
    save_checkpoint,
    save_diffusers_folder,
)
from library.text import clip, t5
from library.text.chunking import WINDOW
from library.text.clip import PromptStyle

logger = logging.getLogger(__name__)

T5_LENGTH = 256  # tokens, unless an option says otherwise
EMPTY_T5_LENGTH = 77  # zeros in the place of a T5 that is not there
_NO_NOISE = "Stable Diffusion 3 is trained with plain noise."
_NO_SNR = "signal-to-noise weights belong to the noise schedules of Stable Diffusion 1, 2 and XL."
_WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
            "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength",
        ),
        _NO_NOISE,
    ),
    **dict.fromkeys(
        ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss"), _NO_SNR
    ),
    "zero_terminal_snr": "the noise of Stable Diffusion 3 ends pure anyway.",
    "v_parameterization": "Stable Diffusion 3 always predicts the velocity of its flow.",
    "v2": "the model is a Stable Diffusion 3.",
    "sample_sampler": "pictures are always drawn with Euler steps.",
    "clip_skip": "Stable Diffusion 3 always reads the second to last layer of its CLIP encoders.",
    "max_token_length": "CLIP captions of Stable Diffusion 3 have 75 tokens; for T5 use --t5xxl_max_token_length.",
    "save_clip": "CLIP encoders are saved beside the model when they are trained.",
    "save_t5xxl": "T5 is saved beside the model when it is trained.",
    "t5xxl_device": "text encoders run on the device of the training.",
    "t5xxl_dtype": "text encoders run in the number format of --mixed_precision.",
}  # fmt: skip


class StableDiffusion3(AutoencoderFamily):
    """SD3 medium, SD3.5 medium and large. Conditioning: {"context": [B,77+T,w], "vector": [B,v]}.

    The context is CLIP-L beside CLIP-G, widened with zeros, and then T5; the vector their projected end states.
    """

    latent = LatentSpec(LATENT_CHANNELS, 8, 8, SCALE, SHIFT, "_sd3.npz", cache_keys_have_size=True, pixel_unit=16)
    text_encoder_names = ("clip_l", "clip_g", "t5xxl")
    opt_in_text_encoders = frozenset({"t5xxl"})
    reads_prompt_weights = False
    without_effect = MappingProxyType(_WITHOUT_EFFECT)
    layouts = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
    denoiser: MMDiT
    text_encoders: list[Any]  # CLIP-L, CLIP-G, T5; None where released, or where there is no T5
    noise_on_cpu = True  # whether starting noise for drawing comes from the CPU, in float32

    # --- loading -------------------------------------------------------------------------------------------
    def __init__(self, options: Options) -> None:
        super().__init__(options)
        length = options.encoders.t5xxl_max_token_length
        self.t5_length = T5_LENGTH if length is None else length

    def check_options(self) -> list[str]:
        """Problems with the options that concern this family."""
        encoders, problems = self.options.encoders, []
        for name in ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"):
            rate = getattr(encoders, name)
            if not 0 <= rate <= 1:
                problems.append(f"--{name} {rate}: a dropout probability lies between 0 and 1.")
        if not 0 <= self.options.sd3.pos_emb_random_crop_rate <= 1:
            problems.append(
                f"--pos_emb_random_crop_rate {self.options.sd3.pos_emb_random_crop_rate}: a probability lies between "
                "0 and 1."
            )
        if self.t5_length < 1:
            problems.append(f"--t5xxl_max_token_length {self.t5_length}: it must be 1 or more.")
        if self.options.dataset.dataset_class and self.options.sd3.enable_scaled_pos_embed:
            problems.append("--enable_scaled_pos_embed needs resolutions, which --dataset_class does not name.")
        if self.options.dataset.weighted_captions:
            problems.append("--weighted_captions does not work with Stable Diffusion 3; leave it out.")
        count = self.options.full.num_last_block_to_freeze
        if count is not None and count < 0:
            problems.append(f"--num_last_block_to_freeze {count}: it must be 0 or more.")
        try:
            self.make_objective()
        except ValueError as error:
            problems.append(str(error))
        if not self.options.model.pretrained_model_name_or_path:
            return [*problems, f"{self.model_option} is missing."]
        return problems + problems_with_files(self._load_spec())

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        """Reads the model and the files of encoders and VAE that options name; checks that the tokenizers fit."""
        from library.models.layers import set_attention

        self.modules = load_model(self._load_spec(dtype=weight_dtype, vae_dtype=vae_dtype, device=device))
        self.denoiser, self.vae = self.modules.mmdit, self.modules.vae
        self.text_encoders = [self.modules.encoders.get(name) for name in self.text_encoder_names]
        self._text_dtype = weight_dtype
        if TEXT in self.parts:
            self._clip_places = clip_places([self.modules.encoders[name].config for name in ("clip_l", "clip_g")])
            for name, tokenizer in self.tokenizers.items():
                tokenizer.check_fits(self.modules.encoders[name], self.modules.encoder_sources[name].tensors.source)
        self.scaled_positions = self._scaled_positions() if DENOISER in self.parts else None
        set_attention(self.denoiser, self.vae, attention_kind(self.options))

    def _load_spec(self, **changes: Any) -> Sd3LoadSpec:
        model, encoders = self.options.model, self.options.encoders
        return Sd3LoadSpec(
            path=str(model.pretrained_model_name_or_path), vae=model.vae, option=self.model_option,
            encoders={"clip_l": encoders.clip_l, "clip_g": encoders.clip_g, "t5xxl": encoders.t5xxl},
            parts=self.parts, **changes,
        )  # fmt: skip

    def _scaled_positions(self) -> ScaledPositions | None:
        """`--enable_scaled_pos_embed`: a position table for each resolution of the datasets."""
        if not self.options.sd3.enable_scaled_pos_embed:
            return None
        config = load_data_config(self.options.dataset, SupportedKinds(controlnet=True), bucket_step=1)
        lengths = [round(math.sqrt(math.prod(dataset.resolution))) for dataset in config.datasets]
        sizes = [length // self.latent.downsample for length in lengths]
        parameters = self.denoiser.params
        return ScaledPositions(sizes, hidden_size=parameters.hidden_size, patch_size=parameters.patch_size)

    # --- text ----------------------------------------------------------------------------------------------
    @cached_property
    def has_t5(self) -> bool:
        """Whether the model has a T5 encoder; found without reading weights."""
        return has_t5(self._load_spec())

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of every encoder that the model has, by name."""
        model = self.options.model
        places: dict[str, Any] = {
            "model_path": model.pretrained_model_name_or_path, "cache_dir": model.tokenizer_cache_dir
        }  # fmt: skip
        found: dict[str, Any] = {
            "clip_l": clip.load_tokenizer(clip.CLIP_L, **places), "clip_g": clip.load_tokenizer(clip.CLIP_G, **places)
        }  # fmt: skip
        if self.has_t5:
            found["t5xxl"] = t5.load_tokenizer(t5.T5_XXL_AS_THIRD, **places)
        return found

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> {"clip_l", "clip_g", "t5xxl"} and their masks; see `Sd3Tokenize`."""
        clips = {name: self.tokenizers[name] for name in ("clip_l", "clip_g")}
        return Sd3Tokenize(clips, self.tokenizers.get("t5xxl"), self.t5_length)

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Tokens of `Sd3Tokenize` -> {"context", "vector"}; the parts of released encoders come from `cached`."""
        place: dict[str, Any] = {"device": self.denoiser.device, "dtype": self._text_dtype}
        if self._has_live_clips():
            states, vector = self._encode_clips(tokens)
        else:
            states, vector = cached_parts(cached, "lg_out", "lg_pooled", **place)
        if self.text_encoders[2] is not None:
            t5_states = self._encode_t5(tokens)
        elif self.has_t5:
            [t5_states] = cached_parts(cached, "t5_out", **place)
        else:
            t5_states = self._empty_t5(len(states), EMPTY_T5_LENGTH)
        missing = self.denoiser.params.context_size - states.shape[-1]
        states = nn.functional.pad(states, (0, missing))
        return Conditioning({"context": torch.cat([states, t5_states.to(states)], dim=1), "vector": vector})

    def _has_live_clips(self) -> bool:
        present = [encoder is not None for encoder in self.text_encoders[:2]]
        if any(present) and not all(present):
            raise RuntimeError("CLIP-L and CLIP-G can only be released together")
        return all(present)

    def _encode_clips(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(states [B,77,l+g], projected end states [B,l+g])."""
        states, pooled = [], []
        for name, encoder in zip(("clip_l", "clip_g"), self.text_encoders, strict=False):
            windows = tokens[name][:, None]
            mask = tokens[f"{name}_mask"][:, None] if self.options.encoders.apply_lg_attn_mask else None
            inner, last = clip.encode_inner(encoder, windows, mask=mask)
            states.append(inner)
            pooled.append(clip.pooled_text(encoder, last, windows, self.tokenizers[name].special.end))
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    def _encode_t5(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """T5's states [B,T,w]."""
        encoder = self.text_encoders[2]
        mask = tokens["t5xxl_mask"].to(encoder.device) if self.options.encoders.apply_t5_attn_mask else None
        return encoder(tokens["t5xxl"].to(encoder.device), attention_mask=mask).last_hidden_state

    def _empty_t5(self, count: int, length: int) -> Tensor:
        return torch.zeros(count, length, self.modules.context_size)

    def drop_text(self, conditioning: Conditioning) -> Conditioning:
        """`--clip_l_dropout_rate`, `--clip_g_dropout_rate`, `--t5_dropout_rate`: zeros in the place of an encoder."""
        encoders = self.options.encoders
        rates = DropRates(encoders.clip_l_dropout_rate, encoders.clip_g_dropout_rate, encoders.t5_dropout_rate)
        return dropped(conditioning, rates, self._clip_places)

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        """Not possible with this family; `check_options` says so before."""
        raise ValueError("--weighted_captions does not work with Stable Diffusion 3.")

    def encode_prompts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        *,
        clip_skip: int | None = None,
        style: PromptStyle | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """(positive, negative) conditioning; prompts are read as captions are: no weights, 75 CLIP tokens."""
        both = self.encode_text(self.tokenize([*prompts, *negative_prompts]))
        rows = torch.arange(len(prompts) + len(negative_prompts))
        return both.select(rows[: len(prompts)]), both.select(rows[len(prompts) :])

    @property
    def text_cache(self) -> TextCacheSpec:
        """One entry per caption; without a T5 its part is zeros."""
        encoders = self.options.encoders
        return TextCacheSpec(
            "_sd3_te.npz",
            ("lg_out", "t5_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"),
            flags={
                "apply_lg_attn_mask": encoders.apply_lg_attn_mask, "apply_t5_attn_mask": encoders.apply_t5_attn_mask
            },
            lengths={"lg_out": WINDOW, "t5_out": self.t5_length},
        )  # fmt: skip

    def encode_text_for_cache(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arrays of `text_cache` for the tokens of `Sd3Tokenize`."""
        states, vector = self._encode_clips(tokens)
        empty = self._empty_t5(len(states), self.t5_length).to(states)
        return {
            "lg_out": states,
            "t5_out": empty if self.text_encoders[2] is None else self._encode_t5(tokens),
            "lg_pooled": vector,
            "clip_l_attn_mask": tokens["clip_l_mask"],
            "clip_g_attn_mask": tokens["clip_g_mask"],
            "t5_attn_mask": tokens.get("t5xxl_mask", torch.zeros(len(states), self.t5_length, dtype=torch.int64)),
        }

    def cached_text_encoders(self, trained: Sequence[bool]) -> list[bool]:
        """T5 always; both CLIP encoders unless one is trained, or `--use_t5xxl_cache_only` wants them live.

        Raises ValueError if T5 is trained.
        """
        if trained[2]:
            raise ValueError(
                "--cache_text_encoder_outputs cannot be combined with training T5 (train_t5xxl): its cached outputs "
                "would never change. Remove one of them."
            )
        has_live_clips = any(trained) or self.options.full.use_t5xxl_cache_only
        return [not has_live_clips, not has_live_clips, True]

    def release_text_encoders(self, released: Sequence[bool]) -> None:
        """Forget encoders that are not needed any more; only their place in the model's files stays known."""
        super().release_text_encoders(released)
        for name, is_released in zip(self.text_encoder_names, released, strict=True):
            if is_released:
                self.modules.encoders.pop(name, None)

    # --- denoising -----------------------------------------------------------------------------------------
    def make_objective(self) -> RectifiedFlow:
        """Whole timesteps from the density that the options choose; the estimate of the clean latents is compared."""
        flow, noise = self.options.flow, self.options.noise
        return RectifiedFlow(
            FlowConfig(
                timestep_sampling="whole_steps", prediction_type="denoised", shift=flow.training_shift,
                density=DensityConfig(flow.weighting_scheme, flow.logit_mean, flow.logit_std, flow.mode_scale),
                min_timestep=noise.min_timestep, max_timestep=noise.max_timestep,
                huber=HuberConfig.from_options(self.options.loss),
            )
        )  # fmt: skip

    def training_noise(self) -> NoiseConfig:
        """Gaussian noise, whatever the noise options say."""
        return NoiseConfig()

    def sampling_spec(self) -> SamplingSpec:
        """Euler steps along the flow, shifted by 3 unless a prompt says otherwise."""
        defaults = SamplingDefaults(size_multiple=self.latent.pixel_unit)
        return SamplingSpec(flow_sigmas=_flow_sigmas, defaults=defaults, noise_on_cpu=self.noise_on_cpu)

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: SizeConditioning | None = None,
        *,
        residuals: Any = None,
    ) -> Tensor:
        """The flow's velocity [B,16,h,w]. Only steps with gradients take random places of the position table."""
        dtype = compute_dtype(self.denoiser, x_t)
        x_t = without_nan("the noisy latents", x_t).to(dtype)
        context = without_nan("the text", conditioning["context"]).to(dtype)
        vector = without_nan("the pooled text", conditioning["vector"]).to(dtype)
        rate = self.options.sd3.pos_emb_random_crop_rate if torch.is_grad_enabled() else 0.0
        return self.denoiser(
            x_t, timesteps.float(), context, vector, scaled_positions=self.scaled_positions, random_crop_rate=rate
        )

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The joint blocks."""
        return [(f"joint_blocks.{index}", block) for index, block in enumerate(self.denoiser.joint_blocks)]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """`--num_last_block_to_freeze` n: the image side of the last n joint blocks."""
        count = self.options.full.num_last_block_to_freeze or 0
        blocks: list[Any] = list(self.denoiser.joint_blocks)[len(self.denoiser.joint_blocks) - count :] if count else []
        return [parameter for block in blocks for parameter in block.x_block.parameters()]

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self,
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        """Transformer and VAE as a file ("safetensors", "ckpt") with trained text encoders in files of their own
        beside it, or everything as a folder ("diffusers", "diffusers_safetensors")."""
        if layout in ("safetensors", "ckpt"):
            save_checkpoint(
                path, self.modules, dtype=dtype, metadata=metadata, counters=counters,
                with_encoders=self._trained_text_encoders(),
            )  # fmt: skip
        elif layout in ("diffusers", "diffusers_safetensors"):
            save_diffusers_folder(
                path, self.modules, dtype=dtype, use_safetensors=layout == "diffusers_safetensors",
                tokenizers=self.tokenizers,
            )  # fmt: skip
        else:
            raise ValueError(f"layout {layout!r}: allowed are {', '.join(self.layouts)}.")

    def _trained_text_encoders(self) -> list[str]:
        """Names of the encoders that changed; the two CLIPs always go together."""
        trained = {
            name
            for name, encoder in self.modules.encoders.items()
            if any(parameter.requires_grad for parameter in encoder.parameters())
        }
        if trained & {"clip_l", "clip_g"}:
            trained |= {"clip_l", "clip_g"}
        return [name for name in self.text_encoder_names if name in trained]

    def companion_files(self, path: Path) -> list[Path]:
        """The files of text encoders that may stand beside the model file `path`."""
        return [companion(path, name) for name in self.text_encoder_names]

    def model_metadata(self) -> dict[str, Any]:
        """Base version, architecture, default resolution, and how text and timesteps were treated."""
        encoders, flow = self.options.encoders, self.options.flow
        return {
            **model_metadata(self.modules.model_type),
            "ss_apply_lg_attn_mask": encoders.apply_lg_attn_mask,
            "ss_apply_t5_attn_mask": encoders.apply_t5_attn_mask,
            "ss_weighting_scheme": flow.weighting_scheme,
            "ss_logit_mean": flow.logit_mean,
            "ss_logit_std": flow.logit_std,
            "ss_mode_scale": flow.mode_scale,
        }


def without_nan(name: str, tensor: Tensor) -> Tensor:
    """`tensor` with zeros in the place of NaN, and then a warning."""
    bad = tensor.isnan()
    if not bad.any():
        return tensor
    logger.warning("NaN in %s, replaced by zeros", name)
    return tensor.masked_fill(bad, 0)


def _flow_sigmas(steps: int, latent_hw: tuple[int, int], shift: float | None) -> Tensor:
    """Sampling sigmas float32 [steps + 1]; they do not depend on the size."""
    return shifted_inference_sigmas(steps, SAMPLING_SHIFT if shift is None else shift)
