"""The tiny SDXL model, also with a text projection whose orientation matters, as family, folder and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.families.base import Conditioning, SizeConditioning
from library.families.sdxl import StableDiffusionXL
from library.options import make_options
from networks import lora
from tests.golden import FOLDER
from tests.lora_files import randomize
from tests.training import TOKENIZERS

MODEL = FOLDER / "models" / "sdxl_tiny.safetensors"
PROJECTION = "conditioner.embedders.1.model.text_projection"


def write_asymmetric(path: Path) -> Path:
    """The tiny model with a text projection that is not its own transpose, in float32 (as OpenCLIP stores it)."""
    tensors = {key: value.float() for key, value in load_file(MODEL).items()}
    tensors[PROJECTION] = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)) * 0.1
    save_file(tensors, path)
    return path


def sdxl_options(path: Path = MODEL, **values: Any) -> Any:
    """Options with this model and the recorded tokenizers."""
    paths = {"pretrained_model_name_or_path": str(path), "tokenizer_cache_dir": str(TOKENIZERS)}
    return make_options(**{**paths, **values})


def sdxl_family(path: Path = MODEL, *, dtype: torch.dtype = torch.float32, **values: Any) -> StableDiffusionXL:
    """The loaded family."""
    family = StableDiffusionXL(sdxl_options(path, **values))
    family.load(weight_dtype=dtype, vae_dtype=dtype, device="cpu")
    return family


SIZES = SizeConditioning(torch.tensor([[150, 160]]), torch.tensor([[4, 0]]), torch.tensor([[128, 96]]))


@torch.no_grad()
def answers(family: StableDiffusionXL) -> dict[str, Tensor]:
    """What text encoders and U-Net answer to fixed questions."""
    generator = torch.Generator().manual_seed(11)
    encoded = family.encode_text(family.tokenize(["a photo of a cat on a mat, best quality"]))
    x = torch.randn(1, 4, 16, 24, generator=generator)
    context = torch.randn(1, 77, encoded["context"].shape[-1], generator=generator)
    question = Conditioning({"context": context, "pooled": torch.randn(1, 128, generator=generator)})
    return {**encoded.tensors, "noise": family.predict(x, torch.tensor([301.0]), question, SIZES)}


@torch.no_grad()
def pipeline_answers(pipeline: Any) -> dict[str, Tensor]:
    """The same from a diffusers pipeline."""
    generator = torch.Generator().manual_seed(11)
    context, _, pooled, _ = pipeline.encode_prompt(
        "a photo of a cat on a mat, best quality", do_classifier_free_guidance=False
    )
    x = torch.randn(1, 4, 16, 24, generator=generator)
    added = {
        "time_ids": torch.tensor([[150, 160, 4, 0, 128, 96]]),
    }
    asked = torch.randn(1, 77, context.shape[-1], generator=generator)
    added["text_embeds"] = torch.randn(1, 128, generator=generator)
    noise = pipeline.unet(x, torch.tensor([301.0]), asked, added_cond_kwargs=added).sample
    return {"context": context, "pooled": pooled, "noise": noise}


def write_sdxl_lora(path: Path, family: StableDiffusionXL, **arguments: str) -> Path:
    """A LoRA with random factors for U-Net and both text encoders."""
    network = lora.create_network(1.0, 4, 2.0, None, family.text_encoders, family.denoiser, **arguments)
    randomize(network, 1)
    network.save_weights(path, None, {})
    return path


def hook_lora(path: Path, family: StableDiffusionXL) -> nn.Module:
    """Hook a file into the family as generators do it."""
    network, _ = lora.create_network_from_weights(
        1.0, path, None, family.text_encoders, family.denoiser, for_inference=True
    )
    network.apply_to(family.text_encoders, family.denoiser)
    network.load_weights(path)
    return network
