"""The families of the small scripts that draw: how each is made from its options, and what it draws with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from library.families.base import ModelFamily
from library.families.flux import Flux
from library.families.sd3 import StableDiffusion3
from library.families.sdxl import StableDiffusionXL
from library.options import make_options
from library.options.minimal_inference import (
    FluxMinimalOptions,
    MinimalOptions,
    Sd3MinimalOptions,
    SdxlMinimalOptions,
)

OPTION = "--ckpt_path"
DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("fp16", "float16"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp8", "fp8_e4m3fn", "float8_e4m3fn"), torch.float8_e4m3fn),
}
FLUX_STEPS = {False: 50, True: 4}  # of dev and of schnell


@dataclass(frozen=True)
class MinimalModel:
    """A family that is not loaded yet, and what one small script has decided about drawing with it.

    `request` holds fields of the image request that every image starts from. `network_modules`: the beginning of a
    network file's keys -> the Python module that reads it; files with other keys are refused. `file_name` is a
    `time.strftime` pattern. `with_second` makes an `encode_prompts` that gives other prompts to the second encoder.
    `offloads`: text encoders and VAE stay in main memory while they are not used.
    """

    family: ModelFamily
    dtype: torch.dtype
    vae_dtype: torch.dtype
    request: Mapping[str, Any]
    network_modules: Mapping[str, str]
    merges_networks: bool
    file_name: str
    with_second: Callable[[Sequence[str]], Callable[..., Any]] | None = None
    offloads: bool = False


def dtype_of(word: str, option: str) -> torch.dtype:
    """The number format that a word means. Raises ValueError that names the option and lists the words."""
    if word.lower() not in DTYPES:
        raise ValueError(f"{option} {word}: allowed are {', '.join(DTYPES)}.")
    return DTYPES[word.lower()]


def model_paths(options: MinimalOptions, **others: str | None) -> dict[str, Any]:
    """Values for `make_options`: the model, where tokenizers are, and other files by the names of their options."""
    return {
        "pretrained_model_name_or_path": options.ckpt_path, "tokenizer_cache_dir": options.tokenizer_cache_dir,
        **others,
    }  # fmt: skip


def sdxl(options: SdxlMinimalOptions) -> MinimalModel:
    """SDXL with Euler steps; noise comes from the CPU, networks become part of the model."""
    family = StableDiffusionXL(make_options(**model_paths(options)))
    family.model_option = OPTION
    family.noise_on_cpu = True
    family.follows_model = True

    def with_second(prompts: Sequence[str]) -> Callable[..., Any]:
        return partial(family.encode_prompts, second_prompts=prompts)

    return MinimalModel(
        family, dtype_of(options.dtype, "--dtype"), torch.float32,
        request={
            "negative_prompt": options.negative_prompt, "width": options.width, "height": options.height,
            "steps": options.steps, "seed": options.seed, "scale": options.cfg_scale, "sampler": "euler",
        },
        network_modules={"": "networks.lora"}, merges_networks=True, file_name="image_%Y%m%d-%H%M%S_000.png",
        with_second=with_second,
    )  # fmt: skip


def flux(options: FluxMinimalOptions) -> MinimalModel:
    """FLUX.1; the file says whether it is dev or schnell, which decides the steps and the length of prompts."""
    family = Flux(make_options(
        **model_paths(options, clip_l=options.clip_l, t5xxl=options.t5xxl, ae=options.ae),
        apply_t5_attn_mask=options.apply_t5_attn_mask, model_type=options.model_type, guidance_scale=options.guidance,
    ))  # fmt: skip
    family.model_option = OPTION
    family.wide_vae_option = "--ae_dtype fp32"
    dtype = wide_dtype(options.flux_dtype or options.dtype, "--flux_dtype" if options.flux_dtype else "--dtype")
    family.encoder_dtypes = {
        name: wide_dtype(word, f"--{name}_dtype")
        for name, word in (("clip_l", options.clip_l_dtype), ("t5xxl", options.t5xxl_dtype))
        if word
    }
    steps = options.steps
    if steps is None:
        steps = FLUX_STEPS[family.facts.is_schnell]
    return MinimalModel(
        family, dtype, wide_dtype(options.ae_dtype, "--ae_dtype") if options.ae_dtype else dtype,
        request={
            "negative_prompt": options.negative_prompt or "", "width": options.width, "height": options.height,
            "steps": steps, "seed": options.seed, "scale": options.cfg_scale, "guidance_scale": options.guidance,
        },
        network_modules={"": "networks.lora_flux"}, merges_networks=options.merge_lora_weights,
        file_name="%Y%m%d_%H%M%S.png", offloads=options.offload,
    )  # fmt: skip


def sd3(options: Sd3MinimalOptions) -> MinimalModel:
    """SD3 and SD3.5 with Euler steps; noise comes from the device, in the number format of the computation.

    Raises ValueError for two number formats, and for prompts without length.
    """
    if options.fp16 and options.bf16:
        raise ValueError("--fp16 and --bf16 exclude each other: remove one of them.")
    if options.t5xxl_token_length < 1:
        raise ValueError(f"--t5xxl_token_length {options.t5xxl_token_length}: it must be at least 1.")
    family = StableDiffusion3(make_options(
        **model_paths(options, clip_l=options.clip_l, clip_g=options.clip_g, t5xxl=options.t5xxl),
        t5xxl_max_token_length=options.t5xxl_token_length, apply_lg_attn_mask=options.apply_lg_attn_mask,
        apply_t5_attn_mask=options.apply_t5_attn_mask,
    ))  # fmt: skip
    family.model_option = OPTION
    family.wide_vae_option = "without --fp16 or --bf16"
    family.noise_on_cpu = False
    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    return MinimalModel(
        family, dtype, dtype,
        request={
            "negative_prompt": options.negative_prompt, "width": options.width, "height": options.height,
            "steps": options.steps, "seed": options.seed, "scale": options.cfg_scale,
        },
        network_modules={"": "networks.lora_sd3"}, merges_networks=options.merge_lora_weights,
        file_name="%Y%m%d_%H%M%S.png", offloads=options.offload,
    )  # fmt: skip


def wide_dtype(word: str, option: str) -> torch.dtype:
    """A number format of at least 16 bits. Raises ValueError for 8-bit ones."""
    dtype = dtype_of(word, option)
    if dtype.itemsize == 1:
        raise ValueError(f"{option} {word}: 8-bit weights are not supported here; use bf16.")
    return dtype
