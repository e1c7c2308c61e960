"""A family that the project does not know: three colours as latents, a bag of words as text, a small convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints.tensors import open_tensors, save_tensors
from library.data.records import LatentSpec, TextCacheSpec
from library.families.base import Conditioning, ModelFamily, SizeConditioning, cached_parts
from library.objectives import FlowConfig, RectifiedFlow
from library.sampling_spec import SamplingDefaults, SamplingSpec

WORDS = 64


def word_ids(captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions -> {"ids": [B,16]}; words are hashed."""
    rows = [([crc32(word.encode()) % 59 + 1 for word in caption.split()] + [0] * 16)[:16]
            for caption in captions]
    return {"ids": torch.tensor(rows)}


class WordBag(nn.Module):
    """The mean of word embeddings [B,32]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 32, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1) / (ids > 0).sum(1, keepdim=True).clamp_min(1)


class ColourDenoiser(nn.Module):
    """Velocity [B,3,h,w] from noisy colours, time and text."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.inward = nn.Conv2d(3, 64, 1)
        self.mix = nn.Linear(64, 64)
        self.middle = nn.Conv2d(64, 64, 1)
        self.outward = nn.Conv2d(64, 3, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        known = self.mix(torch.cat([self.time(t[:, None] / 1000), text], dim=1))[:, :, None, None]
        h = F.silu(self.inward(x) + known)
        return self.outward(F.silu(self.middle(h) + known))


class MeanColours(nn.Module):
    """A "VAE" without weights of its own: 8x8 pixels become their mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)


class Colours(ModelFamily):
    """The family; its file holds `denoiser.…` and `words.…`."""

    latent = LatentSpec(3, 8, 8, 2.0, 0.0, "_colours.npz", pixel_unit=8)
    text_encoder_names = ("words",)

    def check_options(self) -> list[str]:
        return []

    def load(self, *, weight_dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device | str) -> None:
        self.denoiser, words, self.vae = ColourDenoiser(), WordBag(), MeanColours()
        source = self._source()
        for prefix, module in (("denoiser.", self.denoiser), ("words.", words)):
            module.load_state_dict({key: source[prefix + key] for key in module.state_dict()})
            module.to(device, weight_dtype).eval().requires_grad_(False)
        self.text_encoders = [words]

    def _source(self) -> Mapping[str, Tensor]:
        return open_tensors(Path(str(self.options.model.pretrained_model_name_or_path)))

    @property
    def tokenize(self) -> Any:
        return word_ids

    def encode_text(self, tokens: Mapping[str, Tensor], cached: Mapping[str, Tensor] | None = None) -> Conditioning:
        if self.text_encoders[0] is None:
            weight = self.denoiser.inward.weight
            [text] = cached_parts(cached, "text", device=weight.device, dtype=weight.dtype)
        else:
            text = self.text_encoders[0](tokens["ids"].to(self.text_encoders[0].table.weight.device))
        return Conditioning({"text": text})

    @property
    def text_cache(self) -> TextCacheSpec:
        return TextCacheSpec("_colours_te.npz", ("text",))

    def encode_text_for_cache(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"text": self.encode_text(tokens)["text"]}

    def encode_weighted_captions(self, captions: Sequence[str]) -> Conditioning:
        raise ValueError("--weighted_captions: not with colours.")

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], **_: Any
    ) -> tuple[Conditioning, Conditioning]:
        return self.encode_text(word_ids(prompts)), self.encode_text(word_ids(negative_prompts))

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return F.avg_pool2d(images, 8)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return F.interpolate(self.latent.denormalize(latents), scale_factor=8.0)

    def make_objective(self) -> RectifiedFlow:
        return RectifiedFlow(FlowConfig())

    def sampling_spec(self) -> SamplingSpec:
        return SamplingSpec(
            flow_sigmas=lambda steps, hw, shift: torch.linspace(1, 0, steps + 1), defaults=SamplingDefaults(64, 64)
        )

    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: SizeConditioning | None = None,
        *, residuals: Any = None,
    ) -> Tensor:
        weight = self.denoiser.inward.weight
        return self.denoiser(x_t.to(weight), timesteps.to(weight), conditioning["text"].to(weight))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [("inward", self.denoiser.inward), ("outward", self.denoiser.outward)]

    def enable_gradient_checkpointing(self) -> None:
        pass

    def save(
        self, path: Path, *, layout: str, dtype: torch.dtype | None, metadata: Mapping[str, str],
        counters: tuple[int, int] = (0, 0),
    ) -> None:
        tensors = {f"denoiser.{key}": value.detach().clone() for key, value in self.denoiser.state_dict().items()}
        words = self.text_encoders[0]
        kept = self._source() if words is None else {f"words.{k}": v for k, v in words.state_dict().items()}
        tensors["words.table.weight"] = kept["words.table.weight"].detach().clone()
        save_tensors(path, tensors, metadata=metadata)

    def model_metadata(self) -> dict[str, Any]:
        return {"ss_base_model_version": "colours", "architecture": "colours", "default_resolution": 64,
                "prediction_type": None}


def write_model(path: Path) -> Path:
    """An untrained file."""
    torch.manual_seed(3)
    denoiser, words = ColourDenoiser(), WordBag()
    tensors = {f"denoiser.{key}": value for key, value in denoiser.state_dict().items()}
    save_tensors(path, tensors | {f"words.{key}": value for key, value in words.state_dict().items()})
    return path
