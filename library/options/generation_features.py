"""Options for what can be added to drawing: textual inversion, control, a second pass, changes of the denoising."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class TextualInversionOptions:
    textual_inversion_embeddings: tuple[str, ...] | None = option("embedding files; prompts use their names", nargs="*")
    XTI_embeddings: tuple[str, ...] | None = option("embedding files with one vector per layer", nargs="*")


@dataclass(frozen=True)
class ControlOptions:
    control_net_models: tuple[str, ...] | None = option("ControlNet files", nargs="*")
    control_net_lllite_models: tuple[str, ...] | None = option("ControlNet-LLLite files", nargs="*")
    control_net_preps: tuple[str, ...] | None = option("preparation of each guide image: none, or canny", nargs="*")
    control_net_multipliers: tuple[float, ...] | None = option(
        "strength of each ControlNet (default: 1)", type="float", nargs="*"
    )
    control_net_weights: tuple[float, ...] | None = option(
        "strength of each ControlNet (default: 1)", type="float", nargs="*"
    )
    control_net_ratios: tuple[float, ...] | None = option(
        "fraction of the steps in which each ControlNet acts (default: 1)", type="float", nargs="*"
    )


@dataclass(frozen=True)
class HighresOptions:
    highres_fix_scale: float | None = option(
        "draw in two passes; size of the first one relative to the image, e.g. 0.5", type="float"
    )
    highres_fix_steps: int = option("steps of the first pass", 28, type="int")
    highres_fix_strength: float | None = option("strength of the first pass with an image to start from", type="float")
    highres_fix_save_1st: bool = flag("save the images of the first pass too")
    highres_fix_latents_upscaling: bool = flag("enlarge latents between the passes instead of pixels")
    highres_fix_upscaler: str | None = option("Python module with create_upscaler(**kwargs)")
    highres_fix_upscaler_args: str | None = option("arguments of that module: key=value;key=value")
    highres_fix_disable_control_net: bool = flag("no ControlNet in the second pass")


@dataclass(frozen=True)
class DeepShrinkOptions:
    ds_depth_1: int | None = option("Deep Shrink: block where features are shrunk first", type="int")
    ds_timesteps_1: int = option("Deep Shrink: timestep where the first depth ends", 650, type="int")
    ds_depth_2: int | None = option("Deep Shrink: block where features are shrunk afterwards", type="int")
    ds_timesteps_2: int = option("Deep Shrink: timestep where the second depth ends", 650, type="int")
    ds_ratio: float = option("Deep Shrink: size of the shrunk features relative to full size", 0.5, type="float")


@dataclass(frozen=True)
class GradualLatentOptions:
    gradual_latent_timesteps: int | None = option("timestep from which small latents begin to grow", type="int")
    gradual_latent_ratio: float = option("size of the first latents relative to full size", 0.5, type="float")
    gradual_latent_ratio_step: float = option("growth of that ratio at each resize", 0.125, type="float")
    gradual_latent_every_n_steps: int = option("steps from one resize to the next", 3, type="int")
    gradual_latent_s_noise: float = option("factor of the noise that is added after a resize", 1.0, type="float")
    gradual_latent_unsharp_params: str | None = option("sharpening: ksize,sigma,strength[,target_x (1 or 0)]")


@dataclass(frozen=True)
class LossGuidanceOptions:
    clip_guidance_scale: float = option("strength of guidance by CLIP and a text", 0.0, type="float")
    clip_image_guidance_scale: float = option("strength of guidance by CLIP and an image", 0.0, type="float")
    vgg16_guidance_scale: float = option("strength of guidance by VGG16 and an image", 0.0, type="float")
    vgg16_guidance_layer: int = option("layer of VGG16 that is compared, 1 to 30", 20, type="int")
