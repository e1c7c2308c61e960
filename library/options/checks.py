"""Checks of options against each other and against the file system, before anything heavy is imported.

What concerns images and captions is checked by `library.config_util`, for dataset files and folders alike.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import Options
from library.options.errors import UserError
from library.options.key_values import read_literals, read_texts
from library.options.precedence import losers
from library.options.record import OptionRecord
from library.options.script_options import Check, ScriptOptions

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

#: option -> (smallest, largest) allowed value; None is no limit
RANGES: Mapping[str, tuple[float | None, float | None]] = {
    "train_batch_size": (1, None),
    "dataset_repeats": (1, None),
    "keep_tokens": (0, None),
    "caption_dropout_rate": (0, 1),
    "caption_tag_dropout_rate": (0, 1),
    "caption_dropout_every_n_epochs": (0, None),
    "token_warmup_step": (0, None),
    "bucket_reso_steps": (1, None),
    "max_data_loader_n_workers": (0, None),
    "vae_batch_size": (1, None),
    "text_encoder_batch_size": (1, None),
    "max_train_epochs": (1, None),
    "gradient_accumulation_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "initial_epoch": (1, None),
    "initial_step": (0, None),
    "clip_skip": (1, None),
    "min_timestep": (0, 1000),
    "max_timestep": (0, 1000),
    "multires_noise_iterations": (0, None),
    "learning_rate": (0, None),
    "max_grad_norm": (0, None),
    "unet_lr": (0, None),
    "network_dim": (1, None),
    "network_dropout": (0, 1),
    "validation_split": (0, 1),
    "t5xxl_max_token_length": (1, None),
    "clip_l_dropout_rate": (0, 1),
    "clip_g_dropout_rate": (0, 1),
    "t5_dropout_rate": (0, 1),
    "logit_std": (0, None),
    "guidance_scale": (0, None),
    "pos_emb_random_crop_rate": (0, 1),
    "learning_rate_te": (0, None),
    "learning_rate_te1": (0, None),
    "learning_rate_te2": (0, None),
    "learning_rate_te3": (0, None),
    "stop_text_encoder_training": (-1, None),
    "num_last_block_to_freeze": (0, None),
    "fused_optimizer_groups": (1, None),
    "num_vectors_per_token": (1, None),
    "control_net_lr": (0, None),
    "cond_emb_dim": (2, None),
}
#: options of "every n steps/epochs" that a value below 1 turns off
INTERVALS = (
    "sample_every_n_steps", "sample_every_n_epochs", "save_every_n_steps", "save_every_n_epochs",
    "validate_every_n_steps", "validate_every_n_epochs",
)  # fmt: skip
#: options that name a file which must exist
FILES = ("network_weights", "sample_prompts", "log_tracker_config", "weights")
#: options that name a file or folder which must exist, or a hub name where that is said
LOCAL_MODELS = ("clip_l", "clip_g", "t5xxl", "ae")
MODELS = ("pretrained_model_name_or_path", "vae", "controlnet_model_name_or_path")


@dataclass(frozen=True)
class Checked:
    """Options with their implied values filled in; problems and warnings, one sentence each."""

    options: OptionRecord
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_options(options: Options, script: ScriptOptions) -> Checked:
    """Everything that can be said about the options without loading anything."""
    given = options
    options, warnings = adjusted(options)
    groups = script.group_names()
    problems = [text for needed, check in CHECKS if needed in groups for text in check(options)]
    problems += [text for check in script.problems for text in check(options)]
    warnings += [text for needed, warn in WARNINGS if needed in groups for text in warn(options)]
    warnings += [text for warn in script.warnings for text in warn(options)]
    warnings += losers(given)
    return Checked(options, tuple(problems), tuple(warnings))


def adjusted(options: Options) -> tuple[Options, list[str]]:
    """Options with what other options imply, and a sentence for every change that the user should know of."""
    changes: dict[str, Any] = {}
    warnings: list[str] = []
    flat = options.flat()
    if flat["caption_extention"] is not None:
        changes["caption_extension"] = flat["caption_extention"]
    if flat["token_string"] and not flat["output_name"]:
        changes["output_name"] = flat["token_string"]
    if flat["controlnet_model_path"] is not None:
        changes["controlnet_model_name_or_path"] = flat["controlnet_model_path"]
    if flat["skip_latents_validity_check"]:
        changes["skip_cache_check"] = True
    if flat["use_t5xxl_cache_only"] and not flat["cache_text_encoder_outputs"]:
        changes["cache_text_encoder_outputs"] = True
        warnings.append("--use_t5xxl_cache_only turns on --cache_text_encoder_outputs.")
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if flat[f"{name}_to_disk"] and not flat[name] and name not in changes:
            changes[name] = True
            warnings.append(f"--{name}_to_disk turns on --{name}.")
    for name in INTERVALS:
        if flat[name] is not None and flat[name] < 1:
            changes[name] = None
            if flat[name] < 0:
                warnings.append(f"--{name} {flat[name]} is less than 1 and therefore off.")
    if flat["output_name"] and (stem := without_ending(flat["output_name"])) != flat["output_name"]:
        changes["output_name"] = stem
        warnings.append(f"--output_name {flat['output_name']}: names have no ending; {stem} is used.")
    if flat["persistent_data_loader_workers"] and flat["max_data_loader_n_workers"] == 0:
        changes["persistent_data_loader_workers"] = False
        warnings.append("--persistent_data_loader_workers has no effect with --max_data_loader_n_workers 0.")
    return options.with_values(**changes), warnings


def without_ending(name: str) -> str:
    """A name of saved files without the ending of a model file that it has."""
    ending = next((suffix for suffix in MODEL_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(ending)] or name


# --- problems ------------------------------------------------------------------------------------------------
def ranges(options: Options) -> Iterator[str]:
    yield from out_of_range(options.flat(), RANGES)
    if options.training.max_train_epochs is None:
        yield from out_of_range(options.flat(), {"max_train_steps": (1, None)})


def out_of_range(
    values: Mapping[str, Any], limits: Mapping[str, tuple[float | None, float | None]]
) -> Iterator[str]:
    """A sentence for every value outside its (smallest, largest) limits; None is no limit."""
    for name, (smallest, largest) in limits.items():
        value = values[name]
        if value is None:
            continue
        if not ((smallest is None or value >= smallest) and (largest is None or value <= largest)):
            allowed = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
            yield f"--{name} {value} is not allowed: it must be {allowed}."


def model_is_given(options: Options) -> Iterator[str]:
    if not options.model.pretrained_model_name_or_path:
        yield "--pretrained_model_name_or_path is missing: name a checkpoint file, a Diffusers folder or a hub model."


def output_dir_is_given(options: Options) -> Iterator[str]:
    folder = options.saving.output_dir
    if not folder and not options.dataset.debug_dataset:
        yield "--output_dir is missing: name the folder for what is trained."
    elif folder and Path(folder).exists() and not Path(folder).is_dir():
        yield f"--output_dir {folder} is a file, not a folder."


def paths_exist(options: Options) -> Iterator[str]:
    flat = options.flat()
    for name in FILES:
        if flat[name] and not Path(flat[name]).is_file():
            yield f"--{name}: there is no file {flat[name]}."
    for path in options.network.base_weights or ():
        if not Path(path).is_file():
            yield f"--base_weights: there is no file {path}."
    state = Path(options.saving.resume or ".")
    interrupted = Path(f"{state}.old")  # a kill left a state under this name
    if not options.hub.resume_from_huggingface and not state.is_dir() and not interrupted.is_dir():
        yield f"--resume: there is no folder {options.saving.resume}."
    for name in LOCAL_MODELS:
        if flat[name] and not Path(flat[name]).exists():
            yield f"--{name}: there is no file or folder {flat[name]}."
    for name in MODELS:
        if flat[name] and is_missing_model(flat[name]):
            yield f"--{name}: there is no file or folder {flat[name]}."


def is_missing_model(name: str) -> bool:
    """Whether `name` means a local file or folder that does not exist (`owner/model` may be a hub name)."""
    path = Path(name)
    if path.exists():
        return False
    if path.suffix.lower() in MODEL_SUFFIXES or not HUB_NAME.fullmatch(name):
        return True
    return path.parent.is_dir()


def old_optimizer_flags(options: Options) -> Iterator[str]:
    chosen = options.optimizer
    flags = [name for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(chosen, name)]
    if len(flags) == 2:
        yield "--use_8bit_adam and --use_lion_optimizer cannot be combined."
    if flags and chosen.optimizer_type:
        yield f"--{flags[0]} cannot be combined with --optimizer_type {chosen.optimizer_type}: remove one of them."


def missing_packages(options: Options) -> Iterator[str]:
    """Classes by dotted path whose module surely does not exist."""
    for name in ("optimizer_type", "lr_scheduler_type"):
        path = getattr(options.optimizer, name)
        module = path.rpartition(".")[0]
        if module and is_missing_module(module):
            yield (
                f"--{name} {path}: there is no Python module {missing_part(module)}; install the package that has it, "
                "or choose another."
            )


def fused_backward(options: Options) -> Iterator[str]:
    if not options.optimizer.fused_backward_pass:
        return
    if options.optimizer.optimizer_type.lower() != "adafactor":
        yield "--fused_backward_pass works only with --optimizer_type Adafactor."
    if options.training.gradient_accumulation_steps > 1:
        yield "--fused_backward_pass cannot be combined with --gradient_accumulation_steps above 1."
    if options.device.mixed_precision == "fp16":
        yield "--fused_backward_pass cannot be combined with --mixed_precision fp16: use bf16 or no."


def fused_optimizers(options: Options) -> Iterator[str]:
    """Several optimizers that step inside the backward pass."""
    optimizer, memory = options.optimizer, options.memory
    chosen = [
        f"--{name}"
        for name, is_on in (
            ("blockwise_fused_optimizers", memory.blockwise_fused_optimizers),
            ("fused_optimizer_groups", memory.fused_optimizer_groups is not None),
        )
        if is_on
    ]
    both = [*chosen, *(["--fused_backward_pass"] if optimizer.fused_backward_pass else [])]
    if chosen and len(both) > 1:
        yield f"{' and '.join(both)} cannot be combined: choose one of them."
    for name in chosen[:1]:
        if options.training.gradient_accumulation_steps > 1:
            yield f"{name} cannot be combined with --gradient_accumulation_steps above 1."
        if options.device.mixed_precision == "fp16":
            yield f"{name} cannot be combined with --mixed_precision fp16: use bf16 or no."
        if optimizer.optimizer_type.lower().endswith("schedulefree"):
            yield f"{name} cannot be combined with --optimizer_type {optimizer.optimizer_type}."
        if optimizer.optimizer_type.lower() == "adafactor" and not _is_absolute(optimizer.optimizer_args or ()):
            yield f"{name} with --optimizer_type Adafactor needs --optimizer_args relative_step=False."


def _is_absolute(arguments: Iterable[str]) -> bool:
    try:
        return read_literals(arguments, "--optimizer_args").get("relative_step") is False
    except UserError:  # reported by itself
        return True


def warm_up(options: Options) -> Iterator[str]:
    chosen = options.optimizer
    schedule_free = chosen.optimizer_type.lower().endswith("schedulefree")
    if chosen.lr_warmup_steps and not schedule_free and not chosen.lr_scheduler_type:
        if chosen.lr_scheduler in ("constant", "adafactor"):
            yield (
                f"--lr_warmup_steps {chosen.lr_warmup_steps} cannot be combined with --lr_scheduler "
                f"{chosen.lr_scheduler}; for warm-up without decay use constant_with_warmup."
            )
    if chosen.lr_warmup_steps and chosen.lr_scheduler_type and not schedule_free:
        yield "--lr_warmup_steps cannot be combined with --lr_scheduler_type."


def flow_shifts(options: Options) -> Iterator[str]:
    for name in ("discrete_flow_shift", "training_shift", "sigmoid_scale"):
        value = getattr(options.flow, name)
        if not value > 0:
            yield f"--{name} {value} is not allowed: it must be above 0."


def precision(options: Options) -> Iterator[str]:
    device = options.device
    for name, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(device, name) and device.mixed_precision != needed:
            yield f"--{name} needs --mixed_precision {needed} (it is {device.mixed_precision})."
    for name in ("fp8_base", "fp8_base_unet"):
        if getattr(device, name) and device.mixed_precision == "no":
            yield f"--{name} needs --mixed_precision fp16 or bf16."


def prediction_type(options: Options) -> Iterator[str]:
    loss, v_prediction = options.loss, options.model.v_parameterization
    if loss.scale_v_pred_loss_like_noise_pred and not v_prediction:
        yield "--scale_v_pred_loss_like_noise_pred needs --v_parameterization."
    if loss.v_pred_like_loss and v_prediction:
        yield "--v_pred_like_loss cannot be combined with --v_parameterization."


def noise(options: Options) -> Iterator[str]:
    chosen = options.noise
    if chosen.adaptive_noise_scale and not chosen.noise_offset:
        yield "--adaptive_noise_scale needs --noise_offset."
    low, high = chosen.min_timestep or 0, 1000 if chosen.max_timestep is None else chosen.max_timestep
    if low >= high:
        yield f"--min_timestep {low} must be below --max_timestep {high}, which is itself not used."


def caching(options: Options) -> Iterator[str]:
    """Only for folders: with a dataset file the values of each subset count, and they are checked with the images."""
    data, cache = options.dataset, options.cache
    if data.dataset_config:
        return
    changing_images = [name for name in ("color_aug", "random_crop") if getattr(data, name)]
    if cache.cache_latents and changing_images:
        yield f"--cache_latents cannot be combined with --{' or --'.join(changing_images)}: cached images never change."
    names = (
        "caption_dropout_rate", "caption_dropout_every_n_epochs", "shuffle_caption", "token_warmup_step",
        "caption_tag_dropout_rate",
    )
    changing_captions = [name for name in names if getattr(data, name)]
    if cache.cache_text_encoder_outputs and changing_captions:
        yield (
            f"--cache_text_encoder_outputs cannot be combined with --{' or --'.join(changing_captions)}: "
            "cached captions never change."
        )


def samples(options: Options) -> Iterator[str]:
    wanted = options.sampling
    if (wanted.sample_every_n_steps or wanted.sample_every_n_epochs or wanted.sample_at_first) and (
        not wanted.sample_prompts
    ):
        yield "sample pictures need --sample_prompts FILE."


def trackers(options: Options) -> Iterator[str]:
    chosen = options.logging
    if chosen.log_with in ("tensorboard", "all") and not chosen.logging_dir:
        yield f"--log_with {chosen.log_with} needs --logging_dir."


def key_value_arguments(options: Options) -> Iterator[str]:
    for name, read, items in (
        ("network_args", read_texts, options.network.network_args),
        ("optimizer_args", read_literals, options.optimizer.optimizer_args),
        ("lr_scheduler_args", read_literals, options.optimizer.lr_scheduler_args),
    ):
        found = [text for item in items or () for text in _problems_of(read, (item,), f"--{name}")]
        yield from found or _problems_of(read, items or (), f"--{name}")


def _problems_of(read: Callable[[Iterable[str], str], Any], items: Iterable[str], option: str) -> tuple[str, ...]:
    try:
        read(items, option)
    except UserError as error:
        return error.problems
    return ()


def missing_part(module: str) -> str:
    """The shortest beginning of a dotted name that is missing."""
    parts = module.split(".")
    beginnings = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((name for name in beginnings if is_missing_module(name)), module)


def is_missing_module(name: str) -> bool:
    """Whether a dotted module name surely cannot be imported. Imports nothing: looks one level into its package."""
    top, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        return True
    if found is None:
        return True
    folders = [Path(place) for place in found.submodule_search_locations or () if Path(place).is_dir()]
    if not rest or not folders:
        return bool(rest) and found.submodule_search_locations is None
    return not any(entry.name.split(".")[0] == rest[0] for folder in folders for entry in folder.iterdir())


#: (group that the script must have, check)
CHECKS: tuple[tuple[str, Check], ...] = (
    ("training", model_is_given),
    ("training", output_dir_is_given),
    ("training", ranges),
    ("dataset", paths_exist),
    ("optimizer", old_optimizer_flags),
    ("optimizer", missing_packages),
    ("optimizer", fused_backward),
    ("memory", fused_optimizers),
    ("optimizer", warm_up),
    ("optimizer", key_value_arguments),
    ("device", precision),
    ("loss", prediction_type),
    ("noise", noise),
    ("flow", flow_shifts),
    ("cache", caching),
    ("sampling", samples),
    ("logging", trackers),
)


# --- warnings ------------------------------------------------------------------------------------------------
def clip_skip_of_v2(options: Options) -> Iterator[str]:
    if options.model.v2 and options.model.clip_skip is not None:
        yield "--clip_skip is unusual with --v2: these models already use the layer before the last."


def zero_terminal_snr_without_v(options: Options) -> Iterator[str]:
    if options.noise.zero_terminal_snr and not options.model.v_parameterization:
        yield "--zero_terminal_snr without --v_parameterization: noise prediction learns nothing at the last step."


def never_mapped(options: Options) -> Iterator[str]:
    if options.model.disable_mmap_load_safetensors:
        yield "--disable_mmap_load_safetensors has no effect: model files are always read, never mapped into memory."


def keeping_without_saving(options: Options) -> Iterator[str]:
    saving = options.saving
    for what in ("epochs", "steps"):
        if getattr(saving, f"save_last_n_{what}") and not getattr(saving, f"save_every_n_{what}"):
            if what == "steps" or not saving.save_n_epoch_ratio:
                yield f"--save_last_n_{what} has no effect without --save_every_n_{what}."


WARNINGS: tuple[tuple[str, Check], ...] = (
    ("model", clip_skip_of_v2),
    ("model", never_mapped),
    ("noise", zero_terminal_snr_without_v),
    ("saving", keeping_without_saving),
)


SECRETS = ("wandb_api_key", "huggingface_token")
PRIVATE_PATHS = (
    "pretrained_model_name_or_path", "vae", "tokenizer_cache_dir", "train_data_dir", "conditioning_data_dir",
    "reg_data_dir", "output_dir", "logging_dir",
)  # fmt: skip


def published_by_wandb(given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(warnings, remarks) about options on the command line that Weights & Biases would publish with it."""
    if given.get("log_with") not in ("wandb", "all"):
        return [], []
    secrets = [name for name in SECRETS if given.get(name)]
    private = [name for name in PRIVATE_PATHS if given.get(name) and Path(given[name]).is_absolute()]
    if given.get("config_file"):
        private.append("config_file")
    if given.get("huggingface_repo_id") and given.get("huggingface_repo_visibility") != "public":
        private.append("huggingface_repo_id")
    where = "is on the command line, which Weights & Biases publishes; put it into a --config_file."
    return [f"--{name} {where}" for name in secrets], [f"--{name} {where}" for name in private]
