"""Which options the two caching tools have, and what can be said about them without loading anything."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from library.options import Options, non_default
from library.options.cache import CacheOptions
from library.options.checks import Checked, adjusted, caching, paths_exist, precision, ranges
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.control_net import ControlNetOptions
from library.options.dataset import DatasetOptions
from library.options.declare import specs_of
from library.options.deepspeed import DeepSpeedOptions
from library.options.device import DeviceOptions
from library.options.encoders import TextEncoderOptions
from library.options.family_choice import CachedFamilyOptions
from library.options.flow import FlowOptions
from library.options.flux import FluxOptions
from library.options.memory import MemoryOptions
from library.options.model import ModelOptions
from library.options.optimizer import OptimizerOptions
from library.options.script import TRAINING_GROUPS, all_but
from library.options.script_options import ScriptOptions

_NO_LOSS = frozenset({"min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"})
_LACKS = (
    frozenset({
        "skip_latents_validity_check", "save_model_as", "use_safetensors", "no_metadata", "training_comment",
        "cpu_offload_checkpointing", "skip_until_initial_step", "initial_epoch", "initial_step", "fp8_base_unet",
        "debiased_estimation_loss", "training_shift", "split_mode",
    })
    | _NO_LOSS
    | all_but(ControlNetOptions, "controlnet_model_name_or_path")
    | all_but(MemoryOptions, "blocks_to_swap")
)  # fmt: skip
_ENCODERS = ("clip_l", "clip_g", "t5xxl", "t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask")
_GROUPS = (
    CachedFamilyOptions, *(g for g in TRAINING_GROUPS if g not in (OptimizerOptions, DeepSpeedOptions)),
    TextEncoderOptions, FlowOptions, FluxOptions, ControlNetOptions, MemoryOptions,
)  # fmt: skip
#: what the tools look at; everything else is there so that a training's command line can be used
_USED = frozenset(
    {spec.name for group in (
        CachedFamilyOptions, ModelOptions, DatasetOptions, CacheOptions, DeviceOptions, ConsoleOptions,
        ConfigFileOptions,
    ) for spec in specs_of(group)}
    | {*_ENCODERS, "t5xxl_dtype", "ae", "model_type", "seed", "lowram", "highvram"}
)  # fmt: skip

LATENT_CACHING = ScriptOptions(
    groups=_GROUPS,
    exclude=_LACKS | all_but(TextEncoderOptions, *_ENCODERS) | {"weighted_captions"},
    check="library.options.caching_tools:check_latents",
    not_yet=MappingProxyType({}),
)

TEXT_CACHING = ScriptOptions(
    groups=_GROUPS,
    exclude=_LACKS | all_but(TextEncoderOptions, *_ENCODERS, "t5xxl_dtype") | {"no_half_vae"},
    check="library.options.caching_tools:check_text",
    not_yet=MappingProxyType({}),
)


def check_latents(options: Options, script: ScriptOptions) -> Checked:
    """The options with latents cached to disk and nothing else cached."""
    options = options.with_values(
        cache_latents=True, cache_latents_to_disk=True, cache_text_encoder_outputs=False,
        cache_text_encoder_outputs_to_disk=False,
    )
    needs_model = not (options.cached_family.flux and options.flux.ae)
    return _checked(options, [*_model(options)] if needs_model else [])


def check_text(options: Options, script: ScriptOptions) -> Checked:
    """The options with text-encoder outputs cached to disk and nothing else cached."""
    options = options.with_values(
        cache_latents=False, cache_latents_to_disk=False, cache_text_encoder_outputs=True,
        cache_text_encoder_outputs_to_disk=True,
    )
    problems = [*_model(options)]
    chosen = options.cached_family
    if not (chosen.sdxl or chosen.flux or chosen.sd3):
        problems.append(
            "text-encoder outputs of Stable Diffusion 1 and 2 cannot be cached: give --sdxl, --flux or --sd3 if the "
            "model is one of these."
        )
    if options.encoders.t5xxl_dtype and not chosen.flux:
        problems.append("--t5xxl_dtype works with --flux only; otherwise --mixed_precision decides.")
    return _checked(options, problems)


def _checked(options: Options, problems: list[str]) -> Checked:
    unused = [f"--{name}" for name in non_default(options) if name not in _USED]
    options, warnings = adjusted(options)
    chosen = options.cached_family
    families = [f"--{name}" for name in ("sdxl", "flux", "sd3") if getattr(chosen, name)]
    if len(families) > 1:
        problems.append(f"{' and '.join(families)} exclude each other: give the one that the model is.")
    problems += [text for check in (ranges, paths_exist, precision, caching) for text in check(options)]
    if unused:
        warnings.append(f"options of training that mean nothing for caching: {', '.join(unused)}.")
    if chosen.skip_existing:
        warnings.append("--skip_existing has no effect: files that fit are never made again.")
    return Checked(options, tuple(problems), tuple(warnings))


def _model(options: Options) -> Iterator[str]:
    if not options.model.pretrained_model_name_or_path:
        yield "--pretrained_model_name_or_path is missing: name a checkpoint file, a Diffusers folder or a hub model."
