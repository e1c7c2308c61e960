"""Options of the scripts that draw images, and the record that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.options import Options, make_options
from library.options.console import ConsoleOptions
from library.options.declare import flag, option
from library.options.family_choice import FamilyChoiceOptions
from library.options.generation_features import (
    ControlOptions,
    DeepShrinkOptions,
    GradualLatentOptions,
    HighresOptions,
    LossGuidanceOptions,
    TextualInversionOptions,
)
from library.options.record import OptionRecord
from library.options.sampling import SAMPLERS


@dataclass(frozen=True)
class DrawnModelOptions:
    ckpt: str | None = option("model: file, Diffusers folder, hub name, or a pattern that fits exactly one file")
    v2: bool = flag("the model is a Stable Diffusion 2.x model")
    v_parameterization: bool = flag("the model predicts velocity (v-prediction)")
    zero_terminal_snr: bool = flag("the model was trained with zero terminal SNR: start from pure noise")
    vae: str | None = option("VAE file or folder that replaces the one in the checkpoint")
    no_half_vae: bool = flag("run the VAE in float32 even with --fp16 or --bf16 (avoids black images)")
    vae_batch_size: float | None = option(
        "images per call of the VAE; below 1 a fraction of --batch_size (default: all)", type="float"
    )
    vae_slices: int | None = option("split the picture in the VAE to save memory, e.g. 16 or 32", type="int")
    tokenizer_cache_dir: str | None = option("folder where tokenizers are kept, for machines without a network")


@dataclass(frozen=True)
class PrecisionOptions:
    fp16: bool = flag("compute in fp16")
    bf16: bool = flag("compute in bf16")
    xformers: bool = flag("attention of the xformers package")
    sdpa: bool = flag("PyTorch's own fused attention (the default)")
    diffusers_xformers: bool = flag("the same as --xformers")
    opt_channels_last: bool = flag("keep weights in channels-last memory order")


@dataclass(frozen=True)
class PromptOptions:
    prompt: str | None = option("one prompt line, with in-line options such as ` --n blurry --d 42`")
    from_file: str | None = option("text file with one prompt line per line; wins over --prompt")
    from_module: str | None = option("Python file with get_prompter(args, pipe, networks); wins over --prompt")
    prompter_module_args: str | None = option("text for the module of --from_module")
    interactive: bool = flag("read prompt lines from standard input")
    no_preview: bool = flag("no window with the image in interactive mode")
    images_per_prompt: int = option("images per prompt line", 1, type="int")
    n_iter: int = option("repetitions of the whole list of prompts", 1, type="int")
    shuffle_prompts: bool = flag("shuffle the prompts at the start of each repetition")
    seed: int | None = option("seed of the image, or for several images the source of their seeds", type="int")
    iter_same_seed: bool = flag("one seed for all prompts of a repetition that have none of their own")


@dataclass(frozen=True)
class OutputOptions:
    outdir: str = option("folder for the images", "outputs")
    sequential_file_name: bool = flag("number the files: im_000001.png, im_000002.png and so on")
    use_original_file_name: bool = flag("name files like the image that they were made from")
    batch_size: int = option("images that are drawn together", 1, type="int")


@dataclass(frozen=True)
class ImageOptions:
    W: int | None = option("width in pixels (default: the model's own, or the width of --image_path)", type="int")
    H: int | None = option("height in pixels (default: the model's own, or the height of --image_path)", type="int")
    original_width: int | None = option("size conditioning: width of the original (default: the image's)", type="int")
    original_height: int | None = option("size conditioning: height of the original (default: the image's)", type="int")
    original_width_negative: int | None = option("the same for the negative prompt", type="int")
    original_height_negative: int | None = option("the same for the negative prompt", type="int")
    crop_top: int | None = option("size conditioning: rows cut off above (default: 0)", type="int")
    crop_left: int | None = option("size conditioning: columns cut off at the left (default: 0)", type="int")
    steps: int = option("denoising steps", 50, type="int")
    sampler: str = option("method of denoising", "ddim", choices=SAMPLERS)
    scale: float = option("guidance scale; 1 and below switch guidance off", 7.5, type="float")
    negative_scale: float | None = option("weight of the negative prompt, apart from --scale", type="float")
    clip_skip: int | None = option(
        "use the output of the n-th text-encoder layer from the end (1 = last layer)", type="int"
    )
    max_embeddings_multiples: int | None = option("longest prompt in units of 75 tokens (default: 1)", type="int")
    emb_normalize_mode: str = option(
        "what prompt weights keep: the mean of the embeddings, nothing, or the mean of their absolute values",
        "original", choices=("original", "none", "abs"),
    )
    force_scheduler_zero_steps_offset: bool = flag("start the sampler at step 0 instead of 1")
    pyramid_noise_prob: float | None = option("chance of pyramid noise", type="float")
    pyramid_noise_discount_range: tuple[float, ...] | None = option(
        "lowest and highest discount of pyramid noise", type="float", nargs=2
    )
    noise_offset_prob: float | None = option("chance of a noise offset", type="float")
    noise_offset_range: tuple[float, ...] | None = option("lowest and highest noise offset", type="float", nargs=2)


@dataclass(frozen=True)
class InitImageOptions:
    image_path: str | None = option("image or folder of images to start from")
    mask_path: str | None = option("mask or folder of masks; white is repainted")
    strength: float | None = option("how much of the image is repainted, 0 to 1 (default: 0.8)", type="float")
    guide_image_path: tuple[str, ...] | None = option("images that guide a ControlNet", nargs="*")
    clip_vision_strength: float | None = option("weight of the image's content in place of the text's", type="float")


@dataclass(frozen=True)
class AttachedNetworkOptions:
    network_module: tuple[str, ...] | None = option("Python modules of networks, e.g. networks.lora", nargs="*")
    network_weights: tuple[str, ...] | None = option("network files, one for each --network_module", nargs="*")
    network_mul: tuple[float, ...] | None = option(
        "strength of each network (default: 1)", type="float", nargs="*"
    )
    network_args: tuple[str, ...] | None = option("arguments of each network: key=value;key=value", nargs="*")
    network_show_meta: bool = flag("print the metadata of the network files")
    network_merge_n_models: int | None = option("merge the first n networks into the model", type="int")
    network_merge: bool = flag("merge all networks into the model")
    network_pre_calc: bool = flag("fold the networks into the weights before each batch: faster steps")
    network_regional_mask_max_color_codes: int | None = option("regions by colour: number of colours", type="int")


@dataclass(frozen=True)
class GenerationOptions(OptionRecord):
    """One attribute per group of a script that draws images."""

    console: ConsoleOptions = ConsoleOptions()
    model: DrawnModelOptions = DrawnModelOptions()
    family: FamilyChoiceOptions = FamilyChoiceOptions()
    precision: PrecisionOptions = PrecisionOptions()
    prompts: PromptOptions = PromptOptions()
    image: ImageOptions = ImageOptions()
    output: OutputOptions = OutputOptions()
    init_image: InitImageOptions = InitImageOptions()
    networks: AttachedNetworkOptions = AttachedNetworkOptions()
    textual_inversion: TextualInversionOptions = TextualInversionOptions()
    control: ControlOptions = ControlOptions()
    highres: HighresOptions = HighresOptions()
    deep_shrink: DeepShrinkOptions = DeepShrinkOptions()
    gradual_latent: GradualLatentOptions = GradualLatentOptions()
    loss_guidance: LossGuidanceOptions = LossGuidanceOptions()
    script_defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)

    def for_family(self, **changes: Any) -> Options:
        """The options that a model family reads; `changes` by option name win."""
        model = self.model
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": model.ckpt, "v2": model.v2, "v_parameterization": model.v_parameterization,
            "zero_terminal_snr": model.zero_terminal_snr, "vae": model.vae, "no_half_vae": model.no_half_vae,
            "tokenizer_cache_dir": model.tokenizer_cache_dir, "clip_skip": self.image.clip_skip,
            "xformers": self.precision.xformers or self.precision.diffusers_xformers, "sdpa": self.precision.sdpa,
        }
        return make_options(**(values | changes))


GENERATION_GROUPS: tuple[type, ...] = tuple(GenerationOptions.groups().values())
