"""Options of the small scripts that draw with one model family each."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class MinimalOptions:
    """What all of them have."""

    ckpt_path: str | None = option("the model", required=True)
    prompt: str = option("what to draw", "A photo of a cat")
    output_dir: str = option("folder for the images", ".")
    lora_weights: tuple[str, ...] = option(
        "LoRA files and relatives: PATH, or PATH;STRENGTH with a number (default: none)", (), nargs="*"
    )
    interactive: bool = flag("ask for prompts until an empty one")
    tokenizer_cache_dir: str | None = option("folder where tokenizers are kept, for machines without a network")


@dataclass(frozen=True)
class SdxlMinimalOptions(MinimalOptions):
    prompt2: str | None = option("prompt for the second text encoder (default: --prompt)")
    negative_prompt: str = option("what not to draw", "")
    width: int = option("width in pixels", 1024, type="int")
    height: int = option("height in pixels", 1024, type="int")
    steps: int = option("denoising steps", 50, type="int")
    seed: int | None = option("seed of the noise (default: a new one for every image)", type="int")
    cfg_scale: float = option("guidance scale; 1 and below switch guidance off", 7.0, type="float")
    dtype: str = option(
        "number format of the computation; the VAE always has float32, as has everything without a GPU", "float16",
        choices=("float16", "bfloat16", "float32"),
    )


@dataclass(frozen=True)
class FluxMinimalOptions(MinimalOptions):
    model_type: str = option("kind of the model; only flux can be drawn with", "flux", choices=("flux", "chroma"))
    clip_l: str | None = option("CLIP-L file (default: the one that comes with the model)")
    t5xxl: str | None = option("T5-XXL file (default: the one that comes with the model)")
    ae: str | None = option("autoencoder file (default: the one that comes with the model)")
    apply_t5_attn_mask: bool = flag("hide padding tokens from T5 and from the model")
    negative_prompt: str | None = option("what not to draw (needs --cfg_scale above 1)")
    width: int = option("width in pixels", 1360, type="int")
    height: int = option("height in pixels", 768, type="int")
    steps: int | None = option("denoising steps (default: 4 for schnell, 50 for dev)", type="int")
    seed: int | None = option("seed of the noise (default: a new one for every image)", type="int")
    guidance: float = option("guidance value that the model is told (dev)", 3.5, type="float")
    cfg_scale: float = option("guidance scale; 1 and below switch guidance off", 1.0, type="float")
    dtype: str = option("number format of the computation; without a GPU everything has float32", "bfloat16")
    clip_l_dtype: str | None = option("number format of CLIP-L (default: --dtype)")
    t5xxl_dtype: str | None = option("number format of T5 (default: --dtype)")
    ae_dtype: str | None = option("number format of the autoencoder (default: --dtype)")
    flux_dtype: str | None = option("number format of the transformer (default: --dtype)")
    offload: bool = flag("keep text encoders and autoencoder in main memory while they are not used")
    merge_lora_weights: bool = flag("make networks part of the model's weights")


@dataclass(frozen=True)
class Sd3MinimalOptions(MinimalOptions):
    clip_l: str | None = option("CLIP-L file (default: the one that comes with the model)")
    clip_g: str | None = option("CLIP-G file (default: the one that comes with the model)")
    t5xxl: str | None = option("T5-XXL file (default: the one that comes with the model; none: zeros)")
    t5xxl_token_length: int = option("T5 tokens per prompt", 256, type="int")
    apply_lg_attn_mask: bool = flag("hide padding tokens from CLIP-L and CLIP-G")
    apply_t5_attn_mask: bool = flag("hide padding tokens from T5")
    negative_prompt: str = option("what not to draw", "")
    width: int = option("width in pixels", 1024, type="int")
    height: int = option("height in pixels", 1024, type="int")
    steps: int = option("denoising steps", 50, type="int")
    seed: int = option("seed of the noise", 1, type="int")
    cfg_scale: float = option("guidance scale; 1 and below switch guidance off", 5.0, type="float")
    fp16: bool = flag("compute in fp16 (default: float32)")
    bf16: bool = flag("compute in bf16 (default: float32)")
    offload: bool = flag("keep text encoders and VAE in main memory while they are not used")
    merge_lora_weights: bool = flag("make networks part of the model's weights")
