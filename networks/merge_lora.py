"""Merge LoRA files into a Stable Diffusion 1.x/2.x model, or several LoRA files of any one family into one.

    python networks/merge_lora.py --sd_model sd15.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 \
        --save_to merged.safetensors
    python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat \
        --save_to both.safetensors
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import tool_launch
from library.options.declare import flag, option
from library.options.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PRECISIONS = ("float", "fp16", "bf16")


@dataclass(frozen=True)
class MergeOptions:
    v2: bool = flag("the model, or the model that the LoRA files are for, is Stable Diffusion 2.x")
    save_precision: str | None = option(
        "number format of the written file (default: that of --precision)", choices=(None, *PRECISIONS)
    )
    precision: str = option(
        "number format to merge in; single sums are always computed in float", "float", choices=PRECISIONS
    )
    sd_model: str | None = option(
        "model to merge into: a checkpoint file, a Diffusers folder or a hub name; without it the LoRA files are "
        "merged with each other"
    )
    save_to: str | None = option("file to write: .safetensors, or a pickle with any other ending")
    models: tuple[str, ...] | None = option("the LoRA files", nargs="*")
    ratios: tuple[float, ...] | None = option("how strongly each of them counts", type="float", nargs="*")
    no_metadata: bool = flag("do not write the modelspec entries; what trainers need stays")
    concat: bool = flag("merge LoRA files exactly, the ranks add up; without it factors are added, an approximation")
    shuffle: bool = flag("put the ranks of the merged LoRA into a random order")


def merge(options: MergeOptions) -> None:
    """Merge as asked. Raises UserError or ValueError that names the option or file, before anything is written."""
    _check(options)
    if options.sd_model is None:
        merge_with_each_other(options)
    else:
        merge_into_model(options)


def _check(options: MergeOptions) -> None:
    problems = []
    files, ratios = options.models or (), options.ratios or ()
    if not files:
        problems.append("--models is missing: name the LoRA files to merge.")
    if len(files) != len(ratios):
        problems.append(f"--ratios needs one number for each of --models: {len(files)} files, {len(ratios)} ratios.")
    problems += [f"--models: there is no file {name}." for name in files if not Path(name).is_file()]
    if not options.save_to:
        problems.append("--save_to is missing: name the file to write.")
    elif Path(options.save_to).is_dir():
        problems.append(f"--save_to {options.save_to} is a folder; name a file.")
    if problems:
        raise UserError(problems)
    if options.sd_model is not None and (options.concat or options.shuffle):
        logger.warning("--concat and --shuffle have no effect with --sd_model")


# --- into a model --------------------------------------------------------------------------------------------
def merge_into_model(options: MergeOptions) -> None:
    """Write a checkpoint that draws what the model draws with all LoRA files at their ratios."""
    from library.model_util import LoadSpec, load_model, model_metadata, recorded_prediction_type, save_checkpoint
    from networks.lora import create_network_from_weights
    from networks.merging import lora_modules
    from networks.weights_file import load_network_file

    _family(options)
    spec = LoadSpec(str(options.sd_model), v2=options.v2, dtype=_dtype(options.precision), option="--sd_model")
    modules = load_model(spec)
    for path, ratio in zip(options.models or (), options.ratios or (), strict=True):
        logger.info("merging %s with ratio %s", path, ratio)
        weights = load_network_file(path, "sd", option="--models")
        lora_modules(weights, source=path)
        try:
            network, _ = create_network_from_weights(
                ratio, None, None, modules.text_encoder, modules.unet, weights, for_inference=True
            )
            network.merge_to(modules.text_encoder, modules.unet, weights)
        except ValueError as error:
            raise ValueError(f"{path} cannot be merged into {options.sd_model}: {error}") from error
    predicts_v = _predicts_v(options, recorded_prediction_type(modules.source))
    facts = model_metadata(v2=options.v2, v_parameterization=predicts_v)
    metadata = {} if options.no_metadata else _model_spec(options, "checkpoint", facts)
    logger.info("saving checkpoint: %s", options.save_to)
    save_dtype = _dtype(options.save_precision or options.precision)
    save_checkpoint(str(options.save_to), modules, v2=options.v2, dtype=save_dtype, metadata=metadata)


def _predicts_v(options: MergeOptions, recorded: str | None) -> bool:
    """Whether the model predicts velocity: as it says itself, then as the LoRA files say."""
    if recorded is not None:
        return recorded == "v"
    versions = _base_versions(options.models or ())
    if versions:
        return versions[0].endswith("_v")
    if options.v2:
        logger.warning("%s does not say what it predicts; it is recorded as a v-prediction model", options.sd_model)
    return options.v2


# --- with each other -----------------------------------------------------------------------------------------
def merge_with_each_other(options: MergeOptions) -> None:
    """Write one LoRA file for several."""
    from networks.merging import (
        WeightedLora,
        common_alpha,
        common_rank,
        lora_modules,
        merge_loras,
        to_tensors,
        with_linear_projections,
    )
    from networks.recognition import FAMILIES
    from networks.weights_file import load_network_file, save_network_file

    family = _family(options)
    loras = [
        WeightedLora(path, lora_modules(load_network_file(path, family, option="--models"), source=path), ratio)
        for path, ratio in zip(options.models or (), options.ratios or (), strict=True)
    ]
    versions = _base_versions(options.models or ())
    facts = _model_facts(options, family, versions)
    merged = merge_loras(loras, concat=options.concat, shuffle=options.shuffle)
    merged = with_linear_projections(merged) if facts["ss_v2"] else merged
    metadata = {
        "ss_network_module": FAMILIES[family].module,
        "ss_network_dim": common_rank(merged),
        "ss_network_alpha": common_alpha(merged),
    }
    if versions or family != "sd" or facts["ss_v2"]:
        version = versions[0] if versions else facts["ss_base_model_version"]
        metadata |= {"ss_v2": str(facts["ss_v2"]), "ss_base_model_version": version}
    if not options.no_metadata:
        metadata |= _model_spec(options, "lora", facts)
    logger.info("saving: %s (%d modules)", options.save_to, len(merged))
    tensors = to_tensors(merged, _dtype(options.precision))
    save_dtype = _dtype(options.save_precision or options.precision)
    save_network_file(str(options.save_to), tensors, dtype=save_dtype, metadata=metadata)


# --- families ------------------------------------------------------------------------------------------------
def _family(options: MergeOptions) -> str:
    """The family (`networks.recognition`) that all files are for; Stable Diffusion 1.x/2.x if none of them tells.

    Raises UserError for files of several families, and for a family that the other options do not fit.
    """
    from networks.recognition import FAMILIES

    found: dict[str, str] = {}
    for path in options.models or ():
        family = _family_of(path)
        if family is not None:
            found.setdefault(family, path)
    if len(found) > 1:
        named = ", ".join(f"{path} is for {FAMILIES[family].label}" for family, path in found.items())
        raise UserError([f"--models: LoRA files of different model families cannot be merged: {named}."])
    family = next(iter(found), "sd")
    if family == "sd":
        return family
    what = f"{found[family]} is a LoRA for {FAMILIES[family].label}"
    if options.sd_model is not None:
        raise UserError([
            f"--sd_model: {what}; this tool can only merge LoRA for {FAMILIES['sd'].label} into a model. Without "
            "--sd_model it merges LoRA files of any one family with each other."
        ])  # fmt: skip
    if options.v2:
        raise UserError([f"--v2: {what}, not for Stable Diffusion 2.x."])
    return family


def _family_of(path: str) -> str | None:
    """The family that a file is for, by its keys, else by what it says itself."""
    from library.checkpoints.tensors import open_tensors, read_metadata, shapes_of
    from networks.recognition import describe, family_in

    shapes = shapes_of(open_tensors(path))
    return describe(shapes, shapes).family or family_in(read_metadata(path))


def _model_facts(options: MergeOptions, family: str, versions: Sequence[str]) -> dict[str, Any]:
    """What saved files say about the model that a merged LoRA is for."""
    from library import flux_model_util, model_util, sd3_model_util, sdxl_model_util
    from library.checkpoints.tensors import read_metadata

    predicts_v = bool(versions) and versions[0].endswith("_v")
    if family == "sdxl":
        return sdxl_model_util.model_metadata(v_parameterization=predicts_v)
    if family == "sd3":
        return sd3_model_util.model_metadata(versions[0] if versions else "medium")
    if family == "flux":
        metadata = [read_metadata(path).get("modelspec.architecture", "") for path in options.models or ()]
        return flux_model_util.model_metadata(is_schnell=bool(metadata) and "schnell" in metadata[0])
    v2 = options.v2 or any(version.startswith("sd_v2") for version in versions)
    return model_util.model_metadata(v2=v2, v_parameterization=predicts_v)


# --- metadata ------------------------------------------------------------------------------------------------
def _base_versions(paths: Sequence[str]) -> list[str]:
    """`ss_base_model_version` of the files that have one; warns if they differ."""
    from library.checkpoints.tensors import read_metadata

    versions = [read_metadata(path).get("ss_base_model_version", "") for path in paths]
    known = [version for version in versions if version]
    if len(set(known)) > 1:
        logger.warning("the LoRA files are for different models: %s", ", ".join(dict.fromkeys(known)))
    return known


def _model_spec(options: MergeOptions, model_type: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """The `modelspec.*` entries of the written file."""
    from library.model_spec import ModelSpec

    inputs = [name for name in (options.sd_model, *(options.models or ())) if name]
    spec = ModelSpec(
        architecture=facts["architecture"],
        model_type=model_type,
        resolution=(facts["default_resolution"], facts["default_resolution"]),
        title=Path(str(options.save_to)).stem,
        prediction_type=facts["prediction_type"],
        further={"merged_from": ", ".join(map(_title, inputs))},
    )
    return spec.entries(time.time())


def _title(name: str) -> str:
    """What a file calls itself, or its name without ending."""
    from library.checkpoints.tensors import read_metadata

    path = Path(name)
    return (read_metadata(path).get("modelspec.title") if path.is_file() else None) or path.stem


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


TOOL = tool_launch.Tool(
    name="networks/merge_lora.py",
    description="Merge LoRA files into a Stable Diffusion 1.x/2.x model, or several LoRA files of one family into one.",
    options=MergeOptions,
    run=merge,
    writes_file="save_to",
)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this tool."""
    return tool_launch.build_parser(TOOL)


def main() -> None:
    """Read the command line and merge."""
    tool_launch.main(TOOL)


if __name__ == "__main__":
    main()
