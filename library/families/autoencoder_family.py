"""What the families with diffusers' AutoencoderKL have in common: latents, gradient checkpointing, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.families.base import ModelFamily
from library.models.placement import a_tensor_of
from library.options import Options


class AutoencoderFamily(ModelFamily):
    """After `load` `vae` is an AutoencoderKL; `denoiser` and text encoders can recompute their activations."""

    denoiser: Any
    vae: Any
    text_encoders: list[Any]  # None where released
    model_option = "--pretrained_model_name_or_path"  # the script's option for the model, in messages

    def load_vae_alone(
        self, path: str, *, option: str, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """The VAE of a file, folder or hub name and nothing else; enough to encode images."""
        from library.models.vae import load_vae

        self.denoiser, self.text_encoders = None, [None] * len(self.text_encoder_names)
        self.vae = load_vae(path, dtype, device=device, latent_channels=self.latent.channels, option=option)

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

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B,3,H,W] in [-1,1] -> a posterior sample [B,C,H/8,W/8] as it is cached, in the VAE's dtype.

        A VAE that overflows in half precision gives NaN; the caller decides what that means.
        """
        images = images.to(device=self.vae.device, dtype=self.vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            z = self.vae.encode(images).latent_dist.sample(generator)
        return self.latent.normalize(z) if self.latent.cache_is_scaled else z

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Model latents [B,C,h,w] -> images [B,3,8h,8w] around [-1,1] in the VAE's dtype."""
        z = self.latent.denormalize(latents).to(device=self.vae.device, dtype=self.vae.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return self.vae.decode(z).sample


def compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """What a module gets: the dtype of its weights; the input's where weights are kept in 8 bits."""
    dtype = a_tensor_of(module).dtype
    return dtype if dtype.itemsize > 1 else x.dtype


def attention_kind(options: Options) -> str | None:
    """The attention that the options ask for (`set_attention`'s kinds); None is the default."""
    device = options.device
    if device.xformers:
        return "xformers"
    if device.mem_eff_attn:
        return "mem_eff_attn"
    return "sdpa" if device.sdpa else None
