"""Convert a Stable Diffusion 1.x or 2.x model between a checkpoint file and a Diffusers folder, in any direction.

    python tools/convert_diffusers20_original_sd.py model.safetensors model_folder --v1
    python tools/convert_diffusers20_original_sd.py model_folder model.safetensors --fp16
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import tool_launch
from library.options.checks import MODEL_SUFFIXES, is_missing_model
from library.options.declare import flag, option, positional
from library.options.errors import UserError

if TYPE_CHECKING:
    from library.model_util import SdModules
    from library.text.clip import ClipTokenizer

logger = logging.getLogger(__name__)

PRECISIONS = ("fp16", "bf16", "float")
#: what a source's metadata says that is wrong for another file
OUTDATED_METADATA = ("format", "modelspec.hash_sha256")


@dataclass(frozen=True)
class ConversionOptions:
    model_to_load: str = positional("checkpoint file, Diffusers folder or hub name")
    model_to_save: str = positional(f"checkpoint file (ends in {', '.join(MODEL_SUFFIXES)}) or Diffusers folder")
    v1: bool = flag("the model is a Stable Diffusion 1.x model (folders tell by themselves)")
    v2: bool = flag("the model is a Stable Diffusion 2.x model (folders tell by themselves)")
    unet_use_linear_projection: bool = flag(
        "2.x folders: write the U-Net's projections as Linear layers, as published, not as 1x1 convolutions"
    )
    fp16: bool = flag("save in fp16")
    bf16: bool = flag("save in bf16")
    float: bool = flag("save in float32")
    save_precision_as: str = option(
        "save in this precision; no keeps the precision of the source", "no", choices=PRECISIONS
    )
    epoch: int = option("epochs to add to those of the source (.ckpt holds them)", 0, type="int")
    global_step: int = option("steps to add to those of the source (.ckpt holds them)", 0, type="int")
    metadata: str | None = option('metadata to add to a .safetensors file, such as {"modelspec.title": "My model"}')
    variant: str | None = option("variant of the folder's weights to load, such as fp16")
    reference_model: str | None = option("folder or hub name whose scheduler and tokenizer a Diffusers folder gets")
    use_safetensors: bool = flag("write folders as .safetensors, which happens in any case")


# --- what is asked for -----------------------------------------------------------------------------------------
def is_checkpoint(path: Path) -> bool:
    """Whether a target is a checkpoint file by its ending; any other name, also one with a dot, is a folder."""
    return path.suffix.lower() in MODEL_SUFFIXES


def saves_safetensors(options: ConversionOptions) -> bool:
    """Whether the target is a .safetensors file."""
    return Path(options.model_to_save).suffix.lower() in (".safetensors", ".sft")


def asked_precisions(options: ConversionOptions) -> dict[str, str]:
    """The options that ask for a precision, as typed -> the precision."""
    asked = {f"--{name}": name for name in PRECISIONS if getattr(options, name)}
    if options.save_precision_as != "no":
        asked[f"--save_precision_as {options.save_precision_as}"] = options.save_precision_as
    return asked


def read_metadata_text(text: str | None) -> dict[str, str]:
    """`--metadata`: a JSON object or a Python dictionary, text to text. Raises UserError; nothing is executed."""
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            content = None
    if not isinstance(content, dict) or not all(isinstance(word, str) for item in content.items() for word in item):
        raise UserError(f'--metadata {text!r} is not of the form {{"key": "text", ...}} with texts only.')
    return content


def check(options: ConversionOptions) -> None:
    """Raises UserError that lists everything that is wrong with the options; warns of those without effect."""
    problems = list(_problems(options))
    if problems:
        raise UserError(problems)
    for text in _without_effect(options):
        logger.warning("%s", text)


def _problems(options: ConversionOptions) -> Iterator[str]:
    source, target = Path(options.model_to_load), Path(options.model_to_save)
    if is_missing_model(options.model_to_load):
        yield f"model_to_load: there is no file or folder {source}."
    if options.v1 and options.v2:
        yield "--v1 and --v2 cannot be combined."
    elif source.is_file() and not (options.v1 or options.v2):
        yield f"{source} is a checkpoint file: say with --v1 or --v2 which Stable Diffusion it is."
    if is_checkpoint(target) and target.is_dir():
        yield f"model_to_save: {target} is a folder, but its name is that of a checkpoint file."
    elif not is_checkpoint(target) and target.is_file():
        yield f"model_to_save: {target} is a file; a Diffusers folder cannot take its place."
    for name in ("epoch", "global_step"):
        if getattr(options, name) < 0:
            yield f"--{name} {getattr(options, name)} is not allowed: it must be at least 0."
    if options.reference_model is not None and is_missing_model(options.reference_model):
        yield f"--reference_model: there is no folder {options.reference_model}."
    if len(asked_precisions(options)) > 1:
        yield f"{' and '.join(asked_precisions(options))} cannot be combined: ask for one precision."
    try:
        read_metadata_text(options.metadata)
    except UserError as error:
        yield str(error)


def _without_effect(options: ConversionOptions) -> Iterator[str]:
    target = Path(options.model_to_save)
    if (options.epoch or options.global_step) and (not is_checkpoint(target) or saves_safetensors(options)):
        yield "--epoch and --global_step have no effect: only .ckpt files hold them."
    if options.metadata is not None and not saves_safetensors(options):
        yield "--metadata has no effect: only .safetensors files hold metadata."
    if options.variant is not None and Path(options.model_to_load).is_file():
        yield "--variant has no effect: only folders have variants."
    if is_checkpoint(target):
        for name in ("reference_model", "unet_use_linear_projection", "use_safetensors"):
            if getattr(options, name):
                yield f"--{name} has no effect: it is about Diffusers folders, and the target is a checkpoint file."
    elif options.unet_use_linear_projection and options.v1:
        yield "--unet_use_linear_projection has no effect: it is about Stable Diffusion 2.x."


# --- conversion ------------------------------------------------------------------------------------------------
def convert(options: ConversionOptions) -> None:
    """Load, convert, save. Raises ValueError or FileNotFoundError that says what is wrong with the source."""
    check(options)
    import torch

    names: Mapping[str | None, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
    dtype = names.get(next(iter(asked_precisions(options).values()), None))
    modules, v2 = load(options)
    target = Path(options.model_to_save)
    logger.info("saving %s: %s", "checkpoint" if is_checkpoint(target) else "Diffusers folder", target)
    if not is_checkpoint(target):
        save_folder(options, modules, v2=v2, dtype=dtype)
        return
    from library.model_util import save_checkpoint

    save_checkpoint(
        target, modules, v2=v2, dtype=dtype, metadata=file_metadata(options, modules),
        counters=(options.epoch, options.global_step),
    )  # fmt: skip


def load(options: ConversionOptions) -> tuple[SdModules, bool]:
    """(modules in the precision of the source, whether they are SD 2)."""
    from library.checkpoints.folders import hub_folder
    from library.model_util import LoadSpec, inspect_folder, load_model

    path = Path(options.model_to_load)
    if not path.exists():
        path = hub_folder(options.model_to_load, option="model_to_load", variant=options.variant)
    spec = LoadSpec(
        str(path), v2=options.v2, option="model_to_load", linear_projections=options.unet_use_linear_projection,
        variant=options.variant if path.is_dir() else None,
    )  # fmt: skip
    if path.is_dir():
        facts = inspect_folder(path, spec)
        linear = options.unet_use_linear_projection or facts.has_linear_projections
        spec = replace(spec, v2=options.v2 or (facts.v2 and not options.v1), linear_projections=linear)
    logger.info("loading Stable Diffusion %s from %s", "2.x" if spec.v2 else "1.x", path)
    return load_model(spec), spec.v2


def file_metadata(options: ConversionOptions, modules: SdModules) -> dict[str, str]:
    """What the new file says: all that the source file says and still holds, its prediction type, `--metadata`."""
    from library.checkpoints.tensors import read_metadata
    from library.model_util import recorded_prediction_type

    kept = read_metadata(modules.source) if modules.is_single_file else {}
    metadata = {key: value for key, value in kept.items() if key not in OUTDATED_METADATA}
    if not modules.is_single_file and recorded_prediction_type(modules.source) == "v":
        metadata["modelspec.prediction_type"] = "v"
    return metadata | read_metadata_text(options.metadata)


def save_folder(options: ConversionOptions, modules: SdModules, *, v2: bool, dtype: Any) -> None:
    """Write a Diffusers folder with the scheduler and tokenizer of the reference, of the source, or our own."""
    from library.checkpoints.folders import hub_folder, read_config
    from library.model_util import recorded_prediction_type, save_diffusers_folder, scheduler_config

    reference = None
    if options.reference_model is not None:
        reference = Path(options.reference_model)
        if not reference.is_dir():
            reference = hub_folder(options.reference_model, option="--reference_model", with_weights=False)
        if not any((reference / name).is_dir() for name in ("scheduler", "tokenizer")):
            raise FileNotFoundError(f"--reference_model {reference}: it has no folder 'scheduler' or 'tokenizer'.")
    places = [place for place in (reference, modules.source) if place is not None and place.is_dir()]
    configs = (read_config(place / "scheduler", "scheduler_config.json") for place in places)
    scheduler = next((config for config in configs if "_class_name" in config), None)
    if scheduler is None:
        scheduler = scheduler_config(v_parameterization=recorded_prediction_type(modules.source) == "v")
    save_diffusers_folder(
        options.model_to_save, modules, scheduler=scheduler, dtype=dtype,
        tokenizer=find_tokenizer(modules, reference, v2=v2),
    )  # fmt: skip


def find_tokenizer(modules: SdModules, reference: Path | None, *, v2: bool) -> ClipTokenizer | None:
    """The tokenizer that belongs to the model, looked for on this computer only; None if there is none that fits."""
    from library.text import clip

    kind = clip.CLIP_H if v2 else clip.CLIP_L
    for place in (reference, modules.source) if reference is not None else (modules.source,):
        try:
            tokenizer = clip.load_tokenizer(kind, model_path=place, with_download=False)
            tokenizer.check_fits(modules.text_encoder, str(modules.source))
        except FileNotFoundError:
            continue
        except ValueError as error:
            logger.warning("%s", error)
        else:
            return tokenizer
    return None


TOOL = tool_launch.Tool(
    "tools/convert_diffusers20_original_sd.py",
    "Convert a Stable Diffusion 1.x or 2.x model between a checkpoint file and a Diffusers folder.",
    ConversionOptions,
    convert,
    writes_file="model_to_save",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this tool."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and convert."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
