"""Checks of the options of scripts that draw images, before anything heavy is imported."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.options.checks import Checked, is_missing_model, is_missing_module, out_of_range
from library.options.generation import GenerationOptions
from library.options.key_values import read_texts
from library.options.script_options import ScriptOptions

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIZE_MULTIPLE = 8

#: option -> (smallest, largest) allowed value; None is no limit
RANGES: Mapping[str, tuple[float | None, float | None]] = {
    "images_per_prompt": (1, None),
    "n_iter": (1, None),
    "seed": (0, 2**32 - 1),
    "batch_size": (1, None),
    "vae_slices": (1, None),
    "W": (SIZE_MULTIPLE, None),
    "H": (SIZE_MULTIPLE, None),
    "steps": (1, 1000),
    "strength": (0, 1),
    "clip_skip": (1, None),
    "max_embeddings_multiples": (1, None),
    "network_merge_n_models": (0, None),
}


def picture_files(path: Path) -> list[Path]:
    """The file itself, or the pictures in the folder, sorted by their paths; empty if there are none."""
    if path.is_dir():
        return sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file()), key=str)
    return [path] if path.is_file() else []


def check_options(options: GenerationOptions, script: ScriptOptions) -> Checked:
    """The options with implied values filled in, and everything that can be said without loading anything."""
    problems: list[str] = []
    changes: dict[str, Any] = {"ckpt": _checkpoint(options.model.ckpt, problems)}
    if options.prompts.interactive:
        changes["n_iter"] = 1
    checked = options.with_values(**changes)
    for check in (_ranges, _family, _sources, _pictures, _networks):
        problems += check(checked)
    if checked.model.vae and is_missing_model(checked.model.vae):
        problems.append(f"--vae: there is no file or folder {checked.model.vae}.")
    outdir = Path(checked.output.outdir)
    if outdir.exists() and not outdir.is_dir():
        problems.append(f"--outdir {outdir} is a file, not a folder.")
    return Checked(checked, tuple(problems), tuple(_warnings(options)))


def _checkpoint(name: str | None, problems: list[str]) -> str | None:
    """`--ckpt` with a pattern replaced by the one file that it fits."""
    if not name:
        problems.append("--ckpt is missing: name a checkpoint file, a Diffusers folder or a hub model.")
    elif not Path(name).exists() and glob.has_magic(name):
        files = sorted(glob.glob(name))
        if len(files) == 1:
            return files[0]
        found = "fits no file" if not files else f"fits {len(files)} files: {', '.join(files[:5])}"
        problems.append(f"--ckpt {name} {found}; it must fit exactly one.")
    elif is_missing_model(name):
        problems.append(f"--ckpt: there is no file or folder {name}.")
    return name


def _ranges(options: GenerationOptions) -> Iterator[str]:
    flat = options.flat()
    yield from out_of_range(flat, RANGES)
    for name in ("W", "H"):
        if (flat[name] or 0) >= SIZE_MULTIPLE and flat[name] % SIZE_MULTIPLE:
            yield f"--{name} {flat[name]} is not allowed: it must be a multiple of {SIZE_MULTIPLE}."
    if options.model.vae_batch_size is not None and not options.model.vae_batch_size > 0:
        yield f"--vae_batch_size {options.model.vae_batch_size} is not allowed: it must be above 0."


def _family(options: GenerationOptions) -> Iterator[str]:
    forced = [f"--{name}" for name in (*vars(options.family), "v2") if options.flat()[name]]
    if len(forced) > 1:
        yield f"{' and '.join(forced)} cannot be combined: a model is of one kind."


def _sources(options: GenerationOptions) -> Iterator[str]:
    prompts = options.prompts
    if not (prompts.prompt or prompts.from_file or prompts.from_module or prompts.interactive):
        if not options.init_image.image_path:
            yield (
                "there is nothing to draw: give --prompt, --from_file, --from_module, --interactive, or --image_path "
                "with images that hold their prompts."
            )
    for name in ("from_file", "from_module"):
        path = getattr(prompts, name)
        if path and not Path(path).is_file():
            yield f"--{name}: there is no file {path}."


def _pictures(options: GenerationOptions) -> Iterator[str]:
    chosen = options.init_image
    for name in ("image_path", "mask_path"):
        path = getattr(chosen, name)
        if path and not picture_files(Path(path)):
            what = "no picture in the folder" if Path(path).is_dir() else "no such file or folder"
            yield f"--{name} {path}: there is {what}."
    if chosen.mask_path and not chosen.image_path:
        yield "--mask_path needs --image_path: a mask says which part of an image is repainted."


def _networks(options: GenerationOptions) -> Iterator[str]:
    chosen = options.networks
    modules, weights = chosen.network_module or (), chosen.network_weights or ()
    for module in dict.fromkeys(modules):
        if is_missing_module(module):
            yield f"--network_module {module}: there is no such Python module; LoRA is networks.lora."
    for path in weights:
        if not Path(path).is_file():
            yield f"--network_weights: there is no file {path}."
    if len(modules) != len(weights):
        yield (
            f"--network_module has {len(modules)} and --network_weights {len(weights)} entries: the n-th module reads "
            "the n-th file."
        )
    for name in ("network_mul", "network_args"):
        if len(getattr(chosen, name) or ()) > len(modules):
            yield f"--{name} has more entries than --network_module."
    for entry in chosen.network_args or ():
        try:
            network_arguments(entry)
        except ValueError as error:
            yield str(error)


def network_arguments(entry: str) -> dict[str, str]:
    """`key=value;key=value` of one network; both are text. Raises ValueError that names the part."""
    return read_texts(filter(None, (part.strip() for part in entry.split(";"))), "--network_args")


def _warnings(options: GenerationOptions) -> Iterator[str]:
    prompts, chosen, flat = options.prompts, options.networks, options.flat()
    sources = [name for name in ("interactive", "from_file", "from_module", "prompt") if flat[name]]
    if len(sources) > 1:
        ignored = " and ".join(f"--{name}" for name in sources[1:])
        yield f"{ignored} has no effect together with --{sources[0]}."
    if prompts.interactive and prompts.n_iter > 1:
        yield "--n_iter has no effect together with --interactive."
    if options.precision.fp16 and options.precision.bf16:
        yield "--bf16 has no effect together with --fp16."
    if options.image.negative_scale is not None and options.image.scale <= 1:
        yield "--negative_scale has no effect with a --scale of 1 or less."
    if not options.init_image.image_path:
        yield from _without_effect(flat, ("strength", "use_original_file_name"), "--image_path")
    if not chosen.network_module:
        names = ("network_show_meta", "network_merge_n_models", "network_merge", "network_pre_calc")
        yield from _without_effect(flat, names, "--network_module")
    if not prompts.from_module:
        yield from _without_effect(flat, ("prompter_module_args",), "--from_module")


def _without_effect(flat: Mapping[str, Any], names: tuple[str, ...], needed: str) -> Iterator[str]:
    for name in names:
        if flat[name] not in (None, False):
            yield f"--{name} has no effect without {needed}."
