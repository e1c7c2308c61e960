"""The demo's untrained models of the other families: SDXL, SD3 and FLUX.1 with few blocks and channels, random weights.

Same kinds of blocks and the names of the original files; sizes are read from the shapes by every loader.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from base_tokenizer import WORDS
from diffusers import AutoencoderKL
from torch import Tensor, nn

from library.checkpoints import layout_sd3, layout_sdxl, layout_vae
from library.checkpoints.layout_unet import Level, UnetStructure
from library.checkpoints.tensors import open_tensors, save_tensors
from library.models.flux import Flux, FluxParams
from library.models.mmdit import MMDiT, MMDiTParams, position_table
from library.models.unet_sdxl import SdxlUNet2DConditionModel

CLIP_L_ID = "openai_clip-vit-large-patch14"
CLIP_G_ID = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"
T5_ID = "google_t5-v1_1-xxl"
T5_LENGTH = 24


@dataclass(frozen=True)
class Widths:
    """Widths of the text encoders: CLIP-L (the demo's own encoder), CLIP-G, T5, and SDXL's two."""

    clip_l: int = 80
    clip_g: int = 64
    t5: int = 160
    sdxl: int = 48


# --- text --------------------------------------------------------------------------------------------------------
def write_t5_tokenizer(folder: Path) -> int:
    """A unigram tokenizer whose pieces are the demo's words and single letters; returns the number of pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -4.0) for word in dict.fromkeys(WORDS)] + [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5TokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
                "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(pieces)


def write_tokenizers(folder: Path, clip: Path) -> int:
    """The three tokenizers under the names of `--tokenizer_cache_dir`; `clip` is the demo's CLIP tokenizer.

    Returns the number of T5 pieces.
    """
    for name in (CLIP_L_ID, CLIP_G_ID):
        shutil.copytree(clip, folder / name, dirs_exist_ok=True)
    return write_t5_tokenizer(folder / T5_ID)


def demo_clip(checkpoint: Path) -> dict[str, Tensor]:
    """The text encoder of the demo's Stable Diffusion (`text_model.…` names, float32)."""
    prefix = "cond_stage_model.transformer."
    source = open_tensors(checkpoint)
    return {key.removeprefix(prefix): source[key].float() for key in source if key.startswith(prefix)}


def random_clip(width: int, vocabulary: int, activation: str = "gelu") -> dict[str, Tensor]:
    """A CLIP of two layers with its projection; random features of words can be told apart, which is enough."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=max(1, width // 64) if width % 64 == 0 else width // 16, hidden_act=activation,
        projection_dim=width, initializer_factor=2.0,
    ))
    return {key: value for key, value in encoder.state_dict().items() if not key.endswith("position_ids")}


def random_t5(width: int, pieces: int) -> dict[str, Tensor]:
    """A T5 encoder of two layers; random features of words are enough for a denoiser that learns to read them."""
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(
        vocab_size=pieces, d_model=width, d_kv=32, d_ff=128, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    ))
    return {key: value for key, value in encoder.state_dict().items() if key != "encoder.embed_tokens.weight"}


# --- pictures ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def scale_latents(vae: AutoencoderKL, scale: float, pictures: Tensor) -> None:
    """Change the VAE so that latents times `scale` have variance 1 per channel; reconstructions stay the same.

    `pictures` [B,3,H,W] in [-1,1] are what the statistics come from.
    """
    posteriors = [vae.encode(part).latent_dist for part in pictures.split(64)]
    means, deviations = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    factor = (means.var((0, 2, 3)) + deviations.pow(2).mean((0, 2, 3))).sqrt() * scale
    inward = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    outward = vae.post_quant_conv if vae.post_quant_conv is not None else vae.decoder.conv_in
    channels = len(factor)
    inward.weight[:channels] /= factor[:, None, None, None]
    inward.bias[:channels] /= factor
    inward.bias[channels:] -= 2 * factor.log()
    outward.weight.mul_(factor[None, :, None, None])


# --- denoisers ---------------------------------------------------------------------------------------------------
def small_sdxl_unet(widths: Widths) -> SdxlUNet2DConditionModel:
    """SDXL's three levels (no attention in the first) with one resnet each on the way down."""
    down = (Level((0,), True), Level((1,), True), Level((0,), False))
    up = (Level((0, 0), True), Level((1, 0), True), Level((0, 0), False))
    return SdxlUNet2DConditionModel(layout_sdxl.SdxlUnetConfig(
        in_channels=4, out_channels=4, channels=(64, 64, 32), heads=(1, 1, 1), structure=UnetStructure(down, 1, up),
        context_width=2 * widths.sdxl, vector_width=widths.sdxl + 6 * 256, time_width=64,
    ))


def small_flux(widths: Widths) -> Flux:
    """Two double and one single block of width 128, with the guidance input of FLUX.1 dev."""
    return with_quiet_start(Flux(FluxParams(
        in_channels=64, out_channels=64, hidden_size=128, num_heads=4, context_width=widths.t5,
        vector_width=widths.clip_l, time_width=64, mlp_width=512, single_mlp_width=512, double_depth=2, single_depth=1,
        axes_dims=(4, 14, 14), qkv_bias=True, guidance=True,
    )))


def small_mmdit(widths: Widths) -> MMDiT:
    """Three joint blocks of width 128 with normalised queries and keys, as SD3.5 has them."""
    model = with_quiet_start(MMDiT(MMDiTParams(
        patch_size=2, in_channels=16, out_channels=16, depth=3, hidden_size=128, heads=4, mlp_size=512, time_size=64,
        vector_size=widths.clip_l + widths.clip_g, context_size=widths.t5, position_side=8, qk_norm="rms",
    )))
    model.pos_embed.copy_(position_table(128, 8, 4).reshape(1, 64, 128))
    return model


def with_quiet_start(model: nn.Module) -> nn.Module:
    """Xavier weights, and zeros where a block's gates and the last layer come from, as transformers start."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        is_gate = ".lin" in name.replace("linear", "") or "modulation" in name.lower()
        if is_gate or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


# --- files -------------------------------------------------------------------------------------------------------
def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 copies, contiguous."""
    return {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}


def with_projection(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder with a text projection that changes nothing."""
    return clip | {"text_projection.weight": torch.eye(clip["text_model.final_layer_norm.weight"].shape[0])}


def write_text_encoders(folder: Path, checkpoint: Path, pieces: int, widths: Widths = Widths()) -> None:  # noqa: B008
    """clip_l, clip_g and t5xxl as files of their own, for SD3 and FLUX.1."""
    clip = demo_clip(checkpoint)
    vocabulary = clip["text_model.embeddings.token_embedding.weight"].shape[0]
    save_tensors(folder / "shapes_clip_l.safetensors", half(with_projection(clip)))
    save_tensors(folder / "shapes_clip_g.safetensors", half(random_clip(widths.clip_g, vocabulary)))
    save_tensors(folder / "shapes_t5xxl.safetensors", half(random_t5(widths.t5, pieces)))


def write_sdxl(path: Path, checkpoint: Path, widths: Widths = Widths()) -> None:  # noqa: B008
    """An untrained SDXL checkpoint with the trained VAE of the demo's Stable Diffusion."""
    source = open_tensors(checkpoint)
    vocabulary = demo_clip(checkpoint)["text_model.embeddings.token_embedding.weight"].shape[0]
    first, second = (random_clip(widths.sdxl, vocabulary, activation) for activation in ("quick_gelu", "gelu"))
    del first["text_projection.weight"]
    tensors = layout_sdxl.to_single_file(small_sdxl_unet(widths).state_dict(), first, second, None)
    vae = {key: source[key].float() for key in source if key.startswith("first_stage_model.")}
    factor = 0.18215 / 0.13025  # both families' latents have variance 1 after their own scale
    channels = vae["first_stage_model.quant_conv.bias"].shape[0] // 2
    vae["first_stage_model.quant_conv.weight"][:channels] *= factor
    vae["first_stage_model.quant_conv.bias"][:channels] *= factor
    vae["first_stage_model.quant_conv.bias"][channels:] += 2 * math.log(factor)
    vae["first_stage_model.post_quant_conv.weight"] /= factor
    save_tensors(path, half(tensors | vae))


def write_flux(path: Path, autoencoder: Path, vae: AutoencoderKL, widths: Widths = Widths()) -> None:  # noqa: B008
    """An untrained FLUX.1 transformer, and the trained VAE as its autoencoder file."""
    save_tensors(path, half(small_flux(widths).state_dict()))
    save_tensors(autoencoder, half(dict(layout_vae.to_compvis(vae.state_dict()).items())))


def write_sd3(path: Path, vae: AutoencoderKL, widths: Widths = Widths()) -> None:  # noqa: B008
    """An untrained SD3 checkpoint with the trained VAE; its text encoders are files of their own."""
    save_tensors(path, half(layout_sd3.to_single_file(small_mmdit(widths).state_dict(), vae.state_dict())))


def megabytes(*paths: Path) -> float:
    """The size of files in millions of bytes."""
    return math.fsum(path.stat().st_size for path in paths) / 1e6
