"""The tiny model, LoRA files that change it visibly, and what models answer and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.families.sd import StableDiffusion
from library.generation.engine import draw
from library.generation.request import ImageRequest
from library.model_util import SdModules, load_checkpoint
from library.options import make_options
from library.text import clip
from networks import lora
from tests.training import MODEL, TOKENIZERS

TOLERANCE = 1e-3


def tiny_model(path: Path = MODEL, *, v2: bool = False, dtype: torch.dtype = torch.float32) -> SdModules:
    """The tiny model, fresh."""
    return load_checkpoint(path, v2=v2, dtype=dtype)


def tiny_family(path: Path = MODEL, **options: Any) -> StableDiffusion:
    """The tiny model as a family, in float32."""
    options = {"pretrained_model_name_or_path": str(path), "tokenizer_cache_dir": str(TOKENIZERS), **options}
    family = StableDiffusion(make_options(**options))
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    return family


def tokenizer() -> clip.ClipTokenizer:
    """The tiny model's tokenizer."""
    return clip.load_tokenizer(clip.CLIP_L, cache_dir=TOKENIZERS)


def randomize(network: nn.Module, seed: int, scale: float = 0.15) -> None:
    """Fill both factors, so that the network changes what the model answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name or "lora_down" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def write_lora(
    path: Path, host: SdModules, seed: int, *, rank: int = 4, alpha: float = 2.0, scale: float = 0.15,
    metadata: dict[str, str] | None = None, **arguments: str,
) -> Path:
    """A LoRA for all layers of `host` (convolutions with `conv_dim`), with random factors."""
    network = lora.create_network(1.0, rank, alpha, None, host.text_encoder, host.unet, **arguments)
    randomize(network, seed, scale)
    network.save_weights(path, None, metadata or {})
    return path


def hook(host: SdModules, path: Path, multiplier: float = 1.0) -> nn.Module:
    """Hook a file into `host` as generators do it."""
    network, _ = lora.create_network_from_weights(
        multiplier, path, None, host.text_encoder, host.unet, for_inference=True
    )
    network.apply_to(host.text_encoder, host.unet)
    network.load_weights(path)
    return network


@torch.no_grad()
def answers(host: Any) -> dict[str, Tensor]:
    """What text encoder and U-Net answer to fixed questions; `host` has `text_encoder` and `unet` (also pipelines)."""
    generator = torch.Generator().manual_seed(11)
    ids = tokenizer().windows(["a photo of a cat on a mat, best quality"])[0]
    x = torch.randn(1, 4, 16, 24, generator=generator)
    context = torch.randn(1, 77, host.unet.config.cross_attention_dim, generator=generator)
    return {
        "text": host.text_encoder(ids).last_hidden_state,
        "noise": host.unet(x, torch.tensor([301.0]), context).sample,
    }


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference per answer."""
    return {name: float((one[name] - two[name]).abs().max()) for name in one}


def assert_equal_answers(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert max(difference(one, two).values()) < tolerance, difference(one, two)


def assert_other_answers(one: dict[str, Tensor], two: dict[str, Tensor], at_least: float = 0.05) -> None:
    assert min(difference(one, two).values()) > at_least, difference(one, two)


# --- pictures ------------------------------------------------------------------------------------------------
PROMPT, NEGATIVE, SIDE, STEPS, SCALE, SEED = "a cat on a mat", "a dog", 128, 4, 5.0, 3


def picture(family: StableDiffusion) -> Tensor:
    """Our engine's image [3,H,W] in [0,1], before it is rounded."""
    decoded: list[Tensor] = []
    decode = family.decode_latents
    family.decode_latents = lambda latents: decoded.append(decode(latents)) or decoded[-1]
    request = ImageRequest(PROMPT, NEGATIVE, width=SIDE, height=SIDE, steps=STEPS, scale=SCALE, seed=SEED)
    draw(family, request, device="cpu", dtype=torch.float32)
    family.decode_latents = decode
    return (decoded[0][0].float() / 2 + 0.5).clamp(0, 1)


def pipeline_picture(pipeline: Any) -> Tensor:
    """The same image, drawn by a diffusers pipeline with our `ddim` (whose last step goes to a clean picture)."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    [image] = pipeline(
        PROMPT, negative_prompt=NEGATIVE, width=SIDE, height=SIDE, num_inference_steps=STEPS, guidance_scale=SCALE,
        latents=latents, output_type="np",
    ).images  # fmt: skip
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_equal_pictures(one: Tensor, two: Tensor) -> None:
    assert float(one.std()) > 0.01, "the picture is empty"
    assert float((one - two).abs().max()) < TOLERANCE
