"""The story of a script that draws: options -> model, networks, prompts -> images in files."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from library.checkpoints.finite import only_warned
from library.data.images import image_size
from library.devices import preferred_device
from library.families.base import ModelFamily
from library.generation.attached_networks import AttachedNetworks, attach_networks, network_files
from library.generation.engine import DrawSettings, draw
from library.generation.interactive import Preview, draw_interactively
from library.generation.new_words import NewWords
from library.generation.pictures import find_pictures, reduced_size
from library.generation.plan import (
    GenerationDefaults,
    InitImage,
    Line,
    SeedSource,
    check_lines,
    plan,
    read_prompt_lines,
)
from library.generation.prompter import load_get_prompter, prompter_requests
from library.generation.recorded import RecordedPrompt, recorded_prompt
from library.generation.request import SIZE_CONDITIONING, ImageRequest, batches, size_conditioning
from library.generation.samplers import Start, make_sampler
from library.generation.writer import Writer, texts_of
from library.options import non_default
from library.options.errors import UserError
from library.options.generation import GenerationOptions
from library.text.clip import PromptStyle
from library.text.prompt_weights import Emphasis
from networks import contract

logger = logging.getLogger(__name__)


def generate(options: GenerationOptions, make_family: Callable[[GenerationOptions], ModelFamily]) -> None:
    """Draw what the options ask for.

    Everything that can be refused is refused before the model loads: UserError, ValueError, FileNotFoundError.
    """
    family = make_family(options)
    _check(options, family)
    is_module = _source(options) == "from_module"
    get_prompter = load_get_prompter(Path(options.prompts.from_module or "")) if is_module else None
    pictures = _pictures(options, family)
    lines, places = _lines(options, pictures)
    defaults = _defaults(options, family, pictures)
    told = _check_lines(lines, places, defaults)
    with only_warned():
        words = NewWords.read(options.textual_inversion, family)
        drawer = _load(options, family, words)
    template = replace(defaults.template, network_multipliers=drawer.networks.default_multipliers)
    defaults = replace(defaults, template=template)
    seeds = SeedSource(options.prompts.seed)
    if _source(options) == "interactive":
        draw_interactively(drawer.draw_all, defaults, seeds)
    elif get_prompter is not None:
        networks = drawer.networks.networks
        drawer.draw_all(prompter_requests(get_prompter, options, family, networks, defaults, seeds))
    else:
        drawer.draw_all(plan(lines, defaults, seeds, places=places, told=told))
    logger.info("images written: %d, in %s", drawer.count, options.output.outdir)


# --- what is asked for ----------------------------------------------------------------------------------------
def _check(options: GenerationOptions, family: ModelFamily) -> None:
    """Raise unless model family, sampler and network modules can do what the options want."""
    problems = family.check_options()
    if problems:
        raise UserError(problems)
    spec, image = family.sampling_spec(), options.image
    start = Start(zero_offset=image.force_scheduler_zero_steps_offset)
    make_sampler(image.sampler, spec, image.steps, (1, 1), start=start)
    for module in options.networks.network_module or ():
        contract.import_network_module(module)
    _ = family.tokenize  # finds the tokenizer


def _source(options: GenerationOptions) -> str:
    """The option that prompts come from."""
    names = ("interactive", "from_file", "from_module", "prompt")
    return next((name for name in names if getattr(options.prompts, name)), "image_path")


@dataclass(frozen=True)
class Pictures:
    """Pictures to start from, with how they were drawn (where they are the source of prompts), and masks."""

    init_images: tuple[InitImage, ...] = ()
    prompts: tuple[RecordedPrompt, ...] = ()
    masks: tuple[Path, ...] = ()


def _pictures(options: GenerationOptions, family: ModelFamily) -> Pictures:
    """The pictures of `--image_path` and `--mask_path`, at the size of `--W` and `--H` or their own."""
    chosen, image = options.init_image, options.image
    paths, masks = find_pictures(chosen.image_path, "image_path"), find_pictures(chosen.mask_path, "mask_path")
    for path in (*paths, *masks):
        image_size(path)  # raises for files that are no pictures
    if paths and (image.W is None) != (image.H is None):
        logger.warning("--W and --H have no effect on --image_path unless both are given")
    wanted = (image.W, image.H) if image.W is not None and image.H is not None else None
    prompts: list[RecordedPrompt] = []
    if _source(options) == "image_path":
        found = {path: recorded_prompt(path) for path in paths}
        paths = [path for path, record in found.items() if record is not None]
        if not paths:
            raise ValueError(
                f"--image_path {chosen.image_path}: no prompt in "
                f"{'this picture' if len(found) == 1 else 'these pictures'} that can be read (texts of these scripts, "
                "of A1111, plain graphs of ComfyUI); give --prompt."
            )
        for path in (path for path, record in found.items() if record is None):
            logger.warning("%s: no prompt in this picture; it is skipped", path)
        prompts = [_chosen(record, options, family) for record in found.values() if record is not None]
    exact = family.latent.pixel_unit if prompts else None
    init_images = [InitImage(path, *(wanted or reduced_size(path, exact))) for path in paths]
    if wanted is None and masks:
        _check_mask_sizes(init_images, masks, exact)
    repeats = options.prompts.images_per_prompt if prompts else 1
    return Pictures(
        tuple(picture for picture in init_images for _ in range(repeats)), tuple(prompts), tuple(masks)
    )


def _chosen(record: RecordedPrompt, options: GenerationOptions, family: ModelFamily) -> RecordedPrompt:
    """The record without what the command line says otherwise, and without a sampler that the model cannot have."""
    given = non_default(options)
    values = {name: value for name, value in record.values.items() if name not in given}
    seed, remarks = None if "seed" in given else record.seed, record.remarks
    if "sampler" in values:
        try:
            make_sampler(values["sampler"], family.sampling_spec(), values.get("steps", options.image.steps), (1, 1))
        except ValueError as error:
            remarks = (*remarks, f"{error}; {options.image.sampler} takes its place")
            del values["sampler"]
    return replace(record, values=values, seed=seed, remarks=remarks)


def _check_mask_sizes(pictures: list[InitImage], masks: list[Path], exact: int | None) -> None:
    """Raise ValueError unless pictures and the masks that go with them have one size."""
    sizes = [reduced_size(mask, exact) for mask in masks]
    for index in range(math.lcm(len(pictures), len(masks))):
        picture, size = pictures[index % len(pictures)], sizes[index % len(masks)]
        if (picture.width, picture.height) != size:
            raise ValueError(
                f"--mask_path {masks[index % len(masks)]} has {size[0]}x{size[1]} pixels, its image {picture.path} has "
                f"{picture.width}x{picture.height}: give masks of the same size, or --W and --H for both."
            )


def _lines(options: GenerationOptions, pictures: Pictures) -> tuple[list[Line], list[str]]:
    """All prompt lines and where each stands; empty when they come one by one (`--interactive`, `--from_module`)."""
    source, prompts = _source(options), options.prompts
    if source == "from_file":
        numbered = read_prompt_lines(Path(prompts.from_file or ""))
        if not numbered:
            raise ValueError(f"--from_file {prompts.from_file}: there is no prompt in the file.")
        return [line for _, line in numbered], [f"{prompts.from_file}, line {number}" for number, _ in numbered]
    if source == "image_path":
        repeats = options.prompts.images_per_prompt
        return list(pictures.prompts), [str(picture.path) for picture in pictures.init_images[::repeats]]
    return ([prompts.prompt or ""], ["--prompt"]) if source == "prompt" else ([], [])


def _check_lines(lines: list[Line], places: list[str], defaults: GenerationDefaults) -> frozenset[str]:
    """Tell of every line that will be skipped or has a part that is ignored. Raise UserError if none can be drawn.

    Returns what need not be told again.
    """
    report = check_lines(lines, defaults, places)
    if report.problems and len(report.problems) == len(lines):
        raise UserError(list(report.problems))
    for problem in report.problems:
        logger.error("%s; it is skipped", problem)
    for warning in report.warnings:
        logger.warning("%s", warning)
    return report.told


def _defaults(options: GenerationOptions, family: ModelFamily, pictures: Pictures) -> GenerationDefaults:
    """What every image has unless its line says otherwise."""
    image, prompts, spec = options.image, options.prompts, family.sampling_spec()
    template = ImageRequest(
        prompt="", width=image.W or spec.defaults.width, height=image.H or spec.defaults.height, steps=image.steps,
        scale=image.scale, negative_scale=image.negative_scale, sampler=image.sampler, clip_skip=image.clip_skip,
        strength=options.init_image.strength, network_multipliers=_hooked_multipliers(options),
    )  # fmt: skip
    sizes = {name: getattr(image, name) for name in SIZE_CONDITIONING if getattr(image, name) is not None}
    if sizes and not spec.uses_sizes:
        logger.warning("this model takes no sizes, these have no effect: %s", ", ".join(f"--{name}" for name in sizes))
    template = replace(template, **size_conditioning(sizes, template))
    return GenerationDefaults(
        template, images_per_prompt=prompts.images_per_prompt, n_iter=prompts.n_iter,
        shuffle_prompts=prompts.shuffle_prompts, iter_same_seed=prompts.iter_same_seed,
        init_images=pictures.init_images, mask_images=pictures.masks, outdir=Path(options.output.outdir),
        size_multiple=family.latent.pixel_unit,
        without_effect=frozenset() if spec.uses_sizes else frozenset(SIZE_CONDITIONING),
    )  # fmt: skip


def _hooked_multipliers(options: GenerationOptions) -> tuple[float, ...] | None:
    """The strengths of the networks that in-line `--am` changes: all that are not merged."""
    chosen = options.networks
    files = network_files(chosen)
    merged = len(files) if chosen.network_merge else chosen.network_merge_n_models or 0
    return tuple(file.multiplier for file in files[merged:]) or None


# --- drawing --------------------------------------------------------------------------------------------------
@dataclass
class Drawer:
    """A loaded model with its networks, ready to draw requests into files; `count` images are done."""

    family: ModelFamily
    networks: AttachedNetworks
    words: NewWords
    settings: DrawSettings
    writer: Writer
    device: str
    dtype: torch.dtype
    batch_size: int
    model_name: str
    preview: Preview | None = None
    count: int = 0

    def draw_all(self, requests: Iterable[ImageRequest]) -> None:
        """Draw requests batch by batch; files are written after each batch."""
        for batch in batches(requests, self.batch_size):
            multipliers = batch[0].network_multipliers
            self.networks.set_multipliers(multipliers)
            images = draw(
                self.family, [self.words.written_out(request) for request in batch], device=self.device,
                dtype=self.dtype, batch_size=len(batch), settings=self.settings,
            )
            networks = self.networks.described(multipliers)
            for index, (image, request) in enumerate(zip(images, batch, strict=True)):
                texts = texts_of(request, self.family.sampling_spec(), model=self.model_name, networks=networks)
                path = self.writer.write(image, request, texts, index=index)
                logger.info("seed %s: %s", request.seed, path)
                self.count += 1
                if self.preview is not None:
                    self.preview.show(image, request.prompt)


def _load(options: GenerationOptions, family: ModelFamily, words: NewWords) -> Drawer:
    """Load the model, its new words and its networks."""
    precision, model, image, output = options.precision, options.model, options.image, options.output
    device = preferred_device()
    dtype = torch.float16 if precision.fp16 else torch.bfloat16 if precision.bf16 else torch.float32
    logger.info("loading %s", model.ckpt)
    family.load(weight_dtype=dtype, vae_dtype=torch.float32 if model.no_half_vae else dtype, device=device)
    if model.vae_slices is not None:
        vae: Any = family.vae
        vae.enable_slicing()
        vae.enable_tiling()
    words.add_to(family)
    networks = attach_networks(options.networks, family, device=device, dtype=dtype)
    if precision.opt_channels_last:
        modules: list[Any] = [family.denoiser, family.vae, *family.text_encoders, *networks.networks]
        for module in modules:
            if module is not None:
                module.to(memory_format=torch.channels_last)
    emphasis = cast(Emphasis, image.emb_normalize_mode)
    style = PromptStyle(image.max_embeddings_multiples or 1, emphasis, with_breaks=True)
    interactive = _source(options) == "interactive"
    return Drawer(
        family, networks, words,
        DrawSettings(
            predict_for=words.predict_for(family, style), style=style,
            vae_batch_size=_vae_batch_size(model.vae_batch_size, output.batch_size),
            zero_steps_offset=image.force_scheduler_zero_steps_offset, show_progress=True,
        ),
        Writer(Path(output.outdir), output.sequential_file_name, output.use_original_file_name),
        device, dtype, words.batch_size(output.batch_size), Path(str(model.ckpt)).name,
        preview=Preview() if interactive and not options.prompts.no_preview else None,
    )  # fmt: skip


def _vae_batch_size(wanted: float | None, batch_size: int) -> int:
    """`--vae_batch_size`: images per call, below 1 a fraction of the batch, None for the whole batch."""
    if wanted is None:
        return batch_size
    return max(1, int(wanted if wanted >= 1 else wanted * batch_size))
