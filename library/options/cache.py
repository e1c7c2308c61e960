"""Options for caching latents and text-encoder outputs."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class CacheOptions:
    cache_latents: bool = flag("encode every image once before training and keep the latents in memory")
    cache_latents_to_disk: bool = flag("keep cached latents in files beside the images")
    vae_batch_size: int = option("images per VAE call", 1, type="int", off=(0,))
    skip_cache_check: bool = flag("use existing cache files without looking at what they were made from")
    skip_latents_validity_check: bool = flag("old name of --skip_cache_check")
    cache_text_encoder_outputs: bool = flag("encode every caption once before training")
    cache_text_encoder_outputs_to_disk: bool = flag("keep cached text-encoder outputs in files beside the images")
    text_encoder_batch_size: int | None = option(
        "captions per text-encoder call while caching (default: the dataset's batch size)", type="int", off=(0,)
    )
