"""Options for which model is loaded and how its text is read."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class ModelOptions:
    v2: bool = flag("the model is a Stable Diffusion 2.x model")
    v_parameterization: bool = flag("the model predicts velocity (v-prediction), e.g. Stable Diffusion 2 at 768 pixels")
    pretrained_model_name_or_path: str | None = option("model to start from: file, Diffusers folder or hub name")
    tokenizer_cache_dir: str | None = option("folder where tokenizers are kept, for machines without a network")
    vae: str | None = option("VAE file or folder that replaces the one in the checkpoint")
    no_half_vae: bool = flag("run the VAE in float32 even with mixed precision (avoids black or NaN latents)")
    clip_skip: int | None = option(
        "use the output of the n-th text-encoder layer from the end (1 = last layer)", type="int"
    )
    max_token_length: int | None = option(
        "longest caption in tokens; longer ones are cut (default: 75)", type="int", choices=(None, 150, 225), off=(75,)
    )
    disable_mmap_load_safetensors: bool = flag("old option; model files are never mapped into memory")
