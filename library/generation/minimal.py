"""What the small scripts do that draw with one family each: options -> model, networks, prompts -> images in files."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from library.checkpoints.finite import only_warned
from library.checkpoints.tensors import open_tensors, shapes_of
from library.devices import preferred_device
from library.families.minimal import OPTION, MinimalModel
from library.generation.attached_networks import AttachedNetworks, attach_networks
from library.generation.engine import DrawSettings, draw
from library.generation.request import MAX_SEED, Dialect, ImageRequest, PromptOption, parse_prompt_line
from library.generation.writer import Writer, texts_of
from library.options.declare import specs_of
from library.options.errors import UserError
from library.options.generation import AttachedNetworkOptions
from library.options.minimal_inference import MinimalOptions
from library.text.clip import PromptStyle
from networks.recognition import FAMILIES, describe

logger = logging.getLogger(__name__)

DRAWN_SEEDS = 2**32


@dataclass(frozen=True)
class Asked:
    """One image that is wanted; `second_prompt` is for the second text encoder (None: the prompt itself)."""

    request: ImageRequest
    second_prompt: str | None = None


#: what the command line asks for -> the images that the keyboard asks for, one by one
AskForImages = Callable[[Asked], Iterator[Asked]]


def draw_minimal(options: Any, make_model: Callable[[Any], MinimalModel], ask: AskForImages) -> None:
    """Draw the image of the command line, or with `--interactive` those that `ask` gives.

    Everything that can be refused is refused before the model loads: UserError, ValueError, FileNotFoundError.
    """
    model = make_model(options)
    template = Asked(ImageRequest(options.prompt, **model.request), getattr(options, "prompt2", None))
    networks = network_options(options, model)
    check(options, model, template.request)
    with only_warned():
        drawer = MinimalDrawer.load(options, model, networks)
    if not options.interactive:
        drawer.draw(template)
        return
    for asked in ask(template):
        try:
            drawer.draw(asked)
        except ValueError as error:
            logger.error("%s", error)


# --- what is asked for ----------------------------------------------------------------------------------------
def network_options(options: MinimalOptions, model: MinimalModel) -> AttachedNetworkOptions:
    """`--lora_weights` in the words of the scripts that attach networks. Raises UserError that names each problem."""
    modules, paths, multipliers, problems = [], [], [], []
    for entry in options.lora_weights:
        try:
            path, multiplier = split_strength(entry)
            modules.append(network_module(path, model.network_modules))
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        paths.append(path)
        multipliers.append(multiplier)
    if problems:
        raise UserError(problems)
    return AttachedNetworkOptions(
        network_module=tuple(modules), network_weights=tuple(paths), network_mul=tuple(multipliers),
        network_merge=model.merges_networks,
    )


def split_strength(entry: str) -> tuple[str, float]:
    """`path;0.8` -> the path and its strength, 1 without one; split at the last `;` only. Raises ValueError."""
    path, sign, number = entry.rpartition(";")
    if not sign or Path(entry).is_file():
        return entry, 1.0
    try:
        return path, float(number)
    except ValueError as error:
        raise ValueError(f"--lora_weights {entry}: what follows the last ';' is not a number.") from error


def network_module(path: str, modules: Mapping[str, str]) -> str:
    """The module that reads a network file, by how its keys begin. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--lora_weights: there is no file {path}.")
    shapes = shapes_of(open_tensors(path))
    module = next((modules[prefix] for prefix in modules if any(key.startswith(prefix) for key in shapes)), None)
    kind = describe(shapes, shapes)
    if module is None or not kind.is_network:
        first = next(iter(shapes), "none")
        raise ValueError(f"--lora_weights {path} (first key: {first}): it is no network for this model.")
    if kind.family and FAMILIES[kind.family].module != module:
        raise ValueError(f"--lora_weights {path} is {kind.label}: it is no network for this model. {kind.advice}")
    return module


def check(options: MinimalOptions, model: MinimalModel, request: ImageRequest) -> None:
    """Raises UserError that lists what is wrong with the options."""
    multiple = model.family.latent.pixel_unit
    problems = model.family.check_options()
    if not Path(str(options.ckpt_path)).exists() and str(options.ckpt_path).count("/") != 1:
        problems.append(f"{OPTION}: there is no file or folder {options.ckpt_path}.")
    for name in ("width", "height"):
        size = getattr(request, name)
        if size < multiple or size % multiple:
            problems.append(f"--{name} {size} is not allowed: it must be a multiple of {multiple}.")
    if request.steps < 1:
        problems.append(f"--steps {request.steps} is not allowed: it must be at least 1.")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        problems.append(f"--seed {request.seed} is not allowed: it must be from 0 to {MAX_SEED}.")
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        problems.append(f"--output_dir {folder} is a file, not a folder.")
    if problems:
        raise UserError(problems)
    _ = model.family.tokenize  # finds the tokenizers
    for warning in without_effect(options, model, request):
        logger.warning("%s", warning)


def without_effect(options: MinimalOptions, model: MinimalModel, request: ImageRequest) -> Iterator[str]:
    """What is given and changes nothing."""
    if request.negative_prompt and not request.uses_guidance and not options.interactive:
        yield "--negative_prompt has no effect with a --cfg_scale of 1 or less."
    given = non_default_guidance(options)
    if given is not None and model.family.sampling_spec().defaults.guidance_scale is None:
        yield f"--guidance {given} has no effect: this model takes no guidance value."


def non_default_guidance(options: Any) -> float | None:
    """The guidance value of the command line, if it is another than the script's own."""
    kind: Any = type(options)
    default = next((spec.default for spec in specs_of(kind) if spec.name == "guidance"), None)
    value = getattr(options, "guidance", None)
    return None if value == default else value


# --- drawing --------------------------------------------------------------------------------------------------
@dataclass
class MinimalDrawer:
    """A loaded model with its networks, ready to draw images into files."""

    model: MinimalModel
    networks: AttachedNetworks
    writer: Writer
    device: str
    dtype: torch.dtype
    model_name: str

    @classmethod
    def load(cls, options: MinimalOptions, model: MinimalModel, networks: AttachedNetworkOptions) -> MinimalDrawer:
        """Load the model and its networks; without a GPU in float32."""
        device, dtype = preferred_device(), model.dtype
        if device == "cpu" and dtype != torch.float32:
            logger.info("there is no GPU: computing in float32")
            dtype = torch.float32
        logger.info("loading %s", options.ckpt_path)
        vae_dtype = torch.float32 if device == "cpu" else model.vae_dtype
        model.family.load(
            weight_dtype=dtype, vae_dtype=vae_dtype, device="cpu" if model.offloads else device
        )
        model.family.denoiser.to(device)
        attached = attach_networks(networks, model.family, device=device, dtype=dtype)
        compute = dtype if dtype.itemsize > 1 else torch.bfloat16
        return cls(
            model, attached, Writer(Path(options.output_dir)), device, compute, Path(str(options.ckpt_path)).name
        )

    def draw(self, asked: Asked) -> Path:
        """Draw one image and write it; without a seed it gets a new one. Returns the file."""
        request, model = asked.request, self.model
        if request.seed is None:
            request = replace(request, seed=random.SystemRandom().randrange(DRAWN_SEEDS))
        encode = None
        if asked.second_prompt is not None and model.with_second is not None:
            encode = model.with_second([asked.second_prompt])
        settings = DrawSettings(encode_prompts=encode, style=PromptStyle(), show_progress=True)
        self.networks.set_multipliers(request.network_multipliers)
        [image] = draw(model.family, request, device=self.device, dtype=self.dtype, settings=settings)
        networks = self.networks.described(request.network_multipliers)
        texts = texts_of(request, model.family.sampling_spec(), model=self.model_name, networks=networks)
        if encode is not None:
            texts["second-prompt"] = asked.second_prompt or ""
        request = replace(request, output_name=time.strftime(model.file_name))
        path = self.writer.write(image, request, texts, index=0)
        logger.info("seed %s: %s", request.seed, path)
        return path


# --- from the keyboard ----------------------------------------------------------------------------------------
def ask_questions(template: Asked) -> Iterator[Asked]:
    """Prompt, second prompt, negative prompt and seed, one question each, until an empty prompt or the end."""
    while prompt := _answer("prompt (empty to end)"):
        second = _answer("prompt for the second text encoder (empty: the same)")
        negative = _answer("negative prompt")
        seed = _answer("seed (empty: a new one)")
        if seed and not (seed.isdigit() and int(seed) <= MAX_SEED):
            logger.error("%s is not a seed: whole numbers from 0 to %d", seed, MAX_SEED)
            continue
        request = replace(
            template.request, prompt=prompt, negative_prompt=negative, seed=int(seed) if seed else None
        )
        yield Asked(request, second or None)


#: the in-line options of `ask_lines`
LINES = Dialect({
    "w": PromptOption("width", r"\d+", int),
    "h": PromptOption("height", r"\d+", int),
    "s": PromptOption("steps", r"\d+", int),
    "d": PromptOption("seed", r"\d+", int),
    "g": PromptOption("guidance_scale", r"[\d.]+", float),
    "c": PromptOption("scale", r"[\d.]+", float),
    "n": PromptOption("negative_prompt", r".+", str),
    "m": PromptOption("network_multipliers", r"[\d.,\-]+", lambda text: tuple(map(float, text.split(",")))),
})  # fmt: skip
#: what a line sets for itself only; everything else stays for later lines
_OF_ONE_LINE = ("seed", "negative_prompt")


def ask_lines(template: Asked) -> Iterator[Asked]:
    """Prompt lines with in-line options (`a cat --w 512 --n blurry`), until an empty line or the end.

    Sizes, steps, scales and multipliers stay for later lines; they begin with those of the command line. `--n -` is an
    empty negative prompt. `--g` is for models whose request has a guidance value.
    """
    kept = template.request
    known = {name: o for name, o in LINES.options.items() if name != "g" or kept.guidance_scale is not None}
    question = f"prompt, with options {' '.join(f'--{name}' for name in known)} (empty to end)"
    while line := _answer(question):
        parsed = parse_prompt_line(line, Dialect(known))
        for warning in parsed.warnings:
            logger.warning("%s", warning)
        values = dict(parsed.options)
        if values.get("negative_prompt") == "-":
            values["negative_prompt"] = ""
        kept = replace(kept, **{name: value for name, value in values.items() if name not in _OF_ONE_LINE})
        own = {name: values[name] for name in _OF_ONE_LINE if name in values}
        yield Asked(replace(kept, prompt=parsed.prompt, **own))


def _answer(question: str) -> str:
    """One stripped line of standard input; empty at its end."""
    print(f"{question}: ", end="", flush=True)
    return sys.stdin.readline().strip()
