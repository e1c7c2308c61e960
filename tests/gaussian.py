"""A complete model family whose images are Gaussian: every noise process has a closed-form best denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.records import LatentSpec
from library.families.base import Conditioning, ModelFamily, SizeConditioning
from library.sampling_spec import SamplingDefaults, SamplingSpec
from library.schedulers import scaled_linear_schedule, shift_sigmas

STD = 0.6


class GaussianDenoiser(nn.Module):
    """E[noise | x_t] (or E[v | x_t], E[noise - x0 | x_t]) for latents distributed as N(mean, STD^2)."""

    def __init__(self, prediction_type: str, alphas_cumprod: Tensor | None) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.register_buffer("alphas_cumprod", alphas_cumprod)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, timesteps: Tensor, mean: Tensor) -> Tensor:
        t = timesteps.double()[:, None, None, None]
        if self.alphas_cumprod is None:
            signal, noise = 1 - t / 1000, t / 1000
        else:  # between whole timesteps, sigma is interpolated as the schedulers do it
            low = t.floor().long()
            abar = self.alphas_cumprod.double()
            sigmas = ((1 - abar) / abar).sqrt().clamp(max=4096).log()
            sigma = torch.lerp(sigmas[low], sigmas[(low + 1).clamp(max=len(abar) - 1)], t - low).exp()
            signal, noise = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        residual = (x_t.double() - signal * mean) / (signal**2 * STD**2 + noise**2)
        best_noise, best_x0 = noise * residual, mean + signal * STD**2 * residual
        best = {
            "epsilon": best_noise,
            "v_prediction": signal * best_noise - noise * best_x0,
            "velocity": best_noise - best_x0,
        }
        return best[self.prediction_type].to(x_t.dtype)


class GaussianFamily(ModelFamily):
    """Latents of 4 channels at 1/8 size. The prompt is the mean of the distribution, as a number; "" is 0."""

    latent = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_gaussian.npz")

    def __init__(
        self, prediction_type: str = "epsilon", *, zero_terminal_snr: bool = False, with_flow: bool = False,
        guidance_scale: float | None = None,
    ) -> None:
        schedule = scaled_linear_schedule(zero_terminal_snr=zero_terminal_snr)
        self.prediction_type = "velocity" if with_flow else prediction_type
        self.betas = None if with_flow else schedule.betas
        self.denoiser = GaussianDenoiser(self.prediction_type, None if with_flow else schedule.alphas_cumprod)
        self.vae = nn.Conv2d(4, 3, 1)
        self.text_encoders = [nn.Linear(1, 1), None]
        self.defaults = SamplingDefaults(width=128, height=128, guidance_scale=guidance_scale)
        self.calls: list[tuple[Tensor, Tensor, Conditioning, SizeConditioning]] = []
        self.encoded: list[tuple[list[str], list[str]]] = []

    def sampling_spec(self) -> SamplingSpec:
        if self.betas is not None:
            return SamplingSpec(betas=self.betas, prediction_type=self.prediction_type, defaults=self.defaults)

        def sigmas(steps: int, latent_hw: tuple[int, int], shift: float | None) -> Tensor:
            return shift_sigmas(torch.linspace(1, 0, steps + 1), shift or 1.0)

        return SamplingSpec(flow_sigmas=sigmas, defaults=self.defaults)

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], *, clip_skip: int | None = None,
        style: Any = None,
    ) -> tuple[Conditioning, Conditioning]:
        self.encoded.append((list(prompts), list(negative_prompts)))

        def encode(texts: Sequence[str]) -> Conditioning:
            return Conditioning({"mean": torch.tensor([float(text or 0) for text in texts])})

        return encode(prompts), encode(negative_prompts)

    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None = None,
        *, residuals: Any = None,
    ) -> Tensor:
        self.calls.append((x_t, timesteps, conditioning, sizes))
        return self.denoiser(x_t, timesteps, conditioning["mean"][:, None, None, None])

    def decode_latents(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents[:, :3] / 4, scale_factor=8.0, mode="nearest")

    # what training needs, and drawing does not
    def check_options(self) -> list[str]:
        return []

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        raise NotImplementedError

    @property
    def tokenize(self) -> Any:
        raise NotImplementedError

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        raise NotImplementedError

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means = nn.functional.avg_pool2d(images, 8) * 4
        latents = torch.cat([means, means[:, :1] * 0], dim=1)
        return latents + 0.01 * torch.randn(latents.shape, generator=generator)

    def make_objective(self) -> Any:
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        raise NotImplementedError

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return []

    def save(self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        raise NotImplementedError

    def model_metadata(self) -> dict[str, Any]:
        return {}
