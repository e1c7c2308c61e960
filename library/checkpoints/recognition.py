"""Says what a model file is by its keys, which keys mean nothing, and which are kept when it is written again.

Imports nothing heavy: command lines are checked with it before torch is there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.tensors import LazyTensors, Shapes

logger = logging.getLogger(__name__)

UNET_PREFIX = "model.diffusion_model."

_IGNORABLE = re.compile(
    r"^(?:model_ema\.|(?:model\.)?(?:betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod"
    r"|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|scale_factor|logvar|lvlb_weights)$"
    r"|denoiser\.sigmas$|edm_mean$|edm_std$|v_pred$|ztsnr$|(?:first_stage_model\.)?loss\."
    r"|.*position_ids$|.*logit_scale$|cond_stage_model\.text_projection$|(?:.*\.)?optimizer_states)"
)
_STALE = re.compile(r"^model_ema\.|position_ids$")
_QUANTISED = (".absmax", ".quant_map", ".weight_format")
_SCALED = (".scale_weight", ".scale_input")


class ModelKind(Enum):
    """What a file is; the value is how messages call it."""

    SD1 = "a Stable Diffusion 1.x checkpoint"
    SD2 = "a Stable Diffusion 2.x checkpoint"
    SDXL = "an SDXL checkpoint"
    SDXL_REFINER = "an SDXL refiner checkpoint"
    SD3 = "a Stable Diffusion 3 checkpoint"
    SD35_MEDIUM = "a Stable Diffusion 3.5 medium checkpoint"
    SD35_LARGE = "a Stable Diffusion 3.5 large checkpoint"
    SD3_DIFFUSERS = "a Stable Diffusion 3 transformer in diffusers layout"
    FLUX = "a FLUX.1 model"
    FLUX_SCHNELL = "a FLUX.1 schnell model"
    FLUX_DIFFUSERS = "a FLUX.1 transformer in diffusers layout"
    UNET_DIFFUSERS = "a U-Net in diffusers layout"
    VAE = "a VAE"
    VAE_DIFFUSERS = "a VAE in diffusers layout"
    CLIP = "a CLIP text encoder"
    OPENCLIP = "an OpenCLIP text encoder"
    T5 = "a T5 encoder"
    LORA = "a LoRA or another network, not a model"
    UNKNOWN = "no model that is known here"


def is_ignorable(key: str) -> bool:
    """Whether a key may be in a file without belonging to any component (schedules, EMA, markers, training state)."""
    return bool(_IGNORABLE.match(key))


def is_stale(key: str) -> bool:
    """Whether an ignorable key must not be written again (EMA copies and position ids)."""
    return bool(_STALE.search(key))


def recognise(shapes: Shapes) -> ModelKind:
    """What the keys and shapes of a file say it is; with or without the `model.diffusion_model.` prefix."""
    keys = {key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items()}
    kind = _recognise_transformer(keys)
    if kind is None and "input_blocks.0.0.weight" in keys:
        kind = _recognise_unet(keys)
    return kind or _recognise_part(keys)


def _recognise_transformer(keys: Shapes) -> ModelKind | None:
    if "double_blocks.0.img_attn.norm.key_norm.scale" in keys:
        return ModelKind.FLUX if "guidance_in.in_layer.weight" in keys else ModelKind.FLUX_SCHNELL
    if "transformer_blocks.0.attn.add_k_proj.bias" in keys:
        single = any(key.startswith("single_transformer_blocks.0.") for key in keys)
        return ModelKind.FLUX_DIFFUSERS if single else ModelKind.SD3_DIFFUSERS
    if "joint_blocks.0.context_block.adaLN_modulation.1.bias" in keys:
        if "joint_blocks.0.context_block.attn.ln_k.weight" not in keys:
            return ModelKind.SD3
        return ModelKind.SD35_MEDIUM if any(".x_block.attn2." in key for key in keys) else ModelKind.SD35_LARGE
    return None


def _recognise_unet(keys: Shapes) -> ModelKind:
    if "label_emb.0.0.weight" in keys:
        embedders = {key.split(".")[2] for key in keys if key.startswith("conditioner.embedders.")}
        if keys["label_emb.0.0.weight"][1] == 2560 or embedders == {"0"}:
            return ModelKind.SDXL_REFINER
        return ModelKind.SDXL
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        return ModelKind.SD2
    if any(key.startswith("cond_stage_model.transformer.") for key in keys):
        return ModelKind.SD1
    width = next((shape[1] for key, shape in keys.items() if key.endswith("attn2.to_k.weight")), None)
    projections = (len(shape) for key, shape in keys.items() if key.endswith(".proj_in.weight"))
    return ModelKind.SD2 if width == 1024 or next(projections, 4) == 2 else ModelKind.SD1


def _recognise_part(keys: Shapes) -> ModelKind:
    if "down_blocks.0.resnets.0.norm1.weight" in keys and "conv_in.weight" in keys:
        return ModelKind.UNET_DIFFUSERS
    for prefix in ("", "first_stage_model.", "vae."):
        if f"{prefix}encoder.down.0.block.0.norm1.weight" in keys:
            return ModelKind.VAE
        if f"{prefix}encoder.down_blocks.0.resnets.0.norm1.weight" in keys:
            return ModelKind.VAE_DIFFUSERS
    for key in keys:
        if key.endswith(("lora_down.weight", "lora_up.weight", "lora_A.weight", "hada_w1_a", "lokr_w1")):
            return ModelKind.LORA
    for key in keys:
        if key.endswith("transformer.resblocks.0.attn.in_proj_weight"):
            return ModelKind.OPENCLIP
        if key.endswith("encoder.layers.0.self_attn.q_proj.weight"):
            return ModelKind.CLIP
        if key.endswith("encoder.block.0.layer.0.SelfAttention.k.weight"):
            return ModelKind.T5
    return ModelKind.UNKNOWN


def check_kind(shapes: Shapes, expected: ModelKind, *, source: str, option: str, hint: str = "") -> None:
    """Raises ValueError "this looks like X, but the command expects Y" unless the file is what is expected."""
    check_not_quantised(shapes, source=source)
    require_kind(recognise(shapes), expected, source=source, option=option, hint=hint)


def require_kind(found: ModelKind, expected: ModelKind, *, source: str, option: str, hint: str = "") -> None:
    """Raises ValueError "this looks like X, but the command expects Y" unless both are the same."""
    if found is not expected:
        raise ValueError(
            f"{option} {source} looks like {found.value}, but the command expects {expected.value}."
            + (f" {hint}" if hint else "")
        )


def check_not_quantised(shapes: Shapes, *, source: str) -> None:
    """Raises ValueError for files whose weights only make sense together with scales or tables."""
    for key in shapes:
        if key.endswith(_QUANTISED):
            raise ValueError(f"{source} is quantised ({key}); use a checkpoint with float weights.")
        if key.endswith(_SCALED) or key == "scaled_fp8":
            raise ValueError(f"{source} holds scaled fp8 weights ({key}); use a checkpoint with float weights.")


def preserved(source: LazyTensors, is_replaced: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of `source` that nothing written replaces, bit by bit, without what is stale after training."""
    kept: dict[str, Tensor] = {}
    averages = 0
    for key in source:
        if is_replaced(key):
            continue
        if not source.is_readable(key):
            logger.warning("%s: %s is not written again: its dtype is not known", source.source, key)
            continue
        if is_stale(key):
            averages += key.startswith("model_ema.")
            continue
        kept[key] = source[key]
    if averages:
        logger.info("%s: its %d EMA weights are not written again (stale after training)", source.source, averages)
    return kept
