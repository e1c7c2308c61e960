"""What a run was made with, as its states keep it, and what a difference means when another run goes on from one."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.optimizers import is_schedule_free, optimizer_class, optimizer_name
from library.options.errors import UserError
from library.options.key_values import read_literals, read_texts

if TYPE_CHECKING:
    from library.data.dataset import BucketDataset, DatasetGroup
    from library.options import Options


class Rule(enum.Enum):
    """What happens when an option is not what it was in the run that wrote the state."""

    APPLIED = "takes effect from here on"
    REFUSED = "refused"
    WARNED = "the result is not what the resumed run would have given"


# --- the table -------------------------------------------------------------------------------------------------
_RATES = (
    "learning_rate", "unet_lr", "text_encoder_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2",
    "learning_rate_te3", "block_lr", "control_net_lr",
)  # fmt: skip
_SCHEDULE = (
    "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps",
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
    "max_train_steps", "max_train_epochs",
)  # fmt: skip
_APPLIED = (
    *_RATES, *_SCHEDULE,
    "max_grad_norm", "network_dropout", "scale_weight_norms", "stop_text_encoder_training",
    "noise_offset", "noise_offset_random_strength", "multires_noise_iterations", "multires_noise_discount",
    "ip_noise_gamma", "ip_noise_gamma_random_strength", "adaptive_noise_scale", "min_timestep", "max_timestep",
    "loss_type", "huber_schedule", "huber_c", "huber_scale", "prior_loss_weight", "min_snr_gamma",
    "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss", "masked_loss",
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "timestep_sampling", "sigmoid_scale",
    "discrete_flow_shift", "training_shift", "guidance_scale", "clip_l_dropout_rate", "clip_g_dropout_rate",
    "t5_dropout_rate", "pos_emb_random_crop_rate",
)  # fmt: skip
_REFUSED = (
    "optimizer_type", "optimizer_args", "fused_optimizer_groups", "blockwise_fused_optimizers",
    "network_module", "network_dim", "network_alpha", "network_args", "dim_from_weights", "network_train_unet_only",
    "network_train_text_encoder_only", "train_text_encoder", "train_t5xxl", "num_last_block_to_freeze",
    "num_vectors_per_token", "cond_emb_dim",
)  # fmt: skip
_WARNED = (
    "seed", "num_processes", "gradient_accumulation_steps", "mixed_precision", "full_fp16", "full_bf16", "fp8_base",
    "fp8_base_unet", "fused_backward_pass", "pretrained_model_name_or_path", "vae", "v2", "v_parameterization",
    "clip_l", "clip_g", "t5xxl", "ae", "model_type", "clip_skip", "max_token_length", "t5xxl_max_token_length",
    "apply_lg_attn_mask", "apply_t5_attn_mask", "no_token_padding", "weighted_captions", "zero_terminal_snr",
    "model_prediction_type", "enable_scaled_pos_embed", "base_weights", "base_weights_multiplier", "token_string",
    "use_object_template", "use_style_template", "dataset_class",
)  # fmt: skip
#: Option (or `num_processes`) -> what a difference means. Everything else does not change what is learned, or is part
#: of the data, which is compared as such (`data_record`).
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_APPLIED, Rule.APPLIED),
    **dict.fromkeys(_REFUSED, Rule.REFUSED),
    **dict.fromkeys(_WARNED, Rule.WARNED),
}
#: Arguments inside `key=value` options with another rule than their option.
ARGUMENT_RULES: Mapping[str, Mapping[str, Rule]] = {
    "optimizer_args": dict.fromkeys(
        ("weight_decay", "betas", "eps", "momentum", "clip_threshold", "decay_rate", "d_coef", "growth_rate"),
        Rule.APPLIED,
    ),
    "network_args": dict.fromkeys(
        ("dropout", "rank_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio",
         "loraplus_text_encoder_lr_ratio", "down_lr_weight", "mid_lr_weight", "up_lr_weight"),
        Rule.APPLIED,
    ),
    "lr_scheduler_args": {},
}  # fmt: skip
_FILES = ("pretrained_model_name_or_path", "vae", "clip_l", "clip_g", "t5xxl", "ae", "base_weights")
#: key of `data_record` -> how it is called
DATA_NAMES: Mapping[str, str] = {
    "batch_sizes": "the batch size", "resolutions": "the resolution", "images": "the images, their sizes or repeats",
    "captions": "the captions", "settings": "the settings of the datasets",
}  # fmt: skip


# --- the record ------------------------------------------------------------------------------------------------
def run_record(options: Options, *, num_processes: int, seed: int | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able: `options` as `RULES` names them, and `data` (see `data_record`; empty where it is not known)."""
    flat = options.flat()
    values: dict[str, Any] = {name: flat[name] for name in RULES if name in flat}
    for name in ARGUMENT_RULES:
        values[name] = read_arguments(flat[name], name)
    for name in _FILES:
        value = values[name]
        values[name] = [Path(item).name for item in value] if isinstance(value, list) else value and Path(value).name
    kind = optimizer_class(optimizer_name(options.optimizer))
    values |= {
        "optimizer_type": f"{kind.__module__}.{kind.__qualname__}",
        "num_processes": num_processes,
        "seed": seed,
    }
    record: dict[str, Any] = json.loads(json.dumps({"options": values, "data": dict(data)}, default=repr))
    return record


def read_arguments(items: list[str] | None, option: str) -> dict[str, Any]:
    """`key=value` items of any of these options; texts if one of the values is no literal."""
    try:
        return read_literals(items, f"--{option}")
    except UserError:
        return dict(read_texts(items, f"--{option}"))


def data_record(group: DatasetGroup) -> dict[str, Any]:
    """What identifies the data of a run, without reading pictures; `DATA_NAMES` says what each entry is about."""
    own = group.facts()
    if own is not None:
        return {"batch_sizes": group.batch_sizes, "images": _digest([json.dumps(own, default=str), str(len(group))])}
    return {
        "batch_sizes": group.batch_sizes,
        "resolutions": [list(dataset.config.resolution) for dataset in group.datasets],
        "images": _digest(text for dataset in group.datasets for text in _image_texts(dataset)),
        "captions": _digest(record.caption for dataset in group.datasets for record in dataset.records),
        "settings": _digest(text for dataset in group.datasets for text in _setting_texts(dataset)),
    }


def _digest(texts: Any) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _image_texts(dataset: BucketDataset) -> Iterator[str]:
    """Name below its folder, size, repeats and use of every image, in their order."""
    folders = [os.path.abspath(subset.image_dir or "") + os.sep for subset in dataset.config.subsets]
    for record in dataset.records:
        place = str(record.path or record.key)
        name = place.removeprefix(folders[record.subset_index])
        name = os.path.basename(name) if os.path.isabs(name) else name
        yield f"{record.subset_index} {name} {record.image_size} {record.num_repeats} {record.is_reg}"


def _setting_texts(dataset: BucketDataset) -> Iterator[str]:
    """Everything a dataset says but where it lies, and what has an entry of its own."""
    left_out = {
        "location", "subsets", "batch_size", "resolution", "image_dir", "metadata_file", "conditioning_data_dir",
        "cache_info", "num_repeats", "caption_extension",
    }  # fmt: skip
    tables: list[Any] = [dataset.config, *dataset.config.subsets]
    for table in tables:
        for item in dataclasses.fields(table):
            if item.name not in left_out:
                yield f"{item.name}={getattr(table, item.name)!r}"


# --- comparing -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """One option, argument or part of the data that is not what it was."""

    name: str  # "--learning_rate", "--optimizer_args weight_decay", "the captions"
    before: Any
    now: Any
    rule: Rule
    outcome: str = ""  # what happens, where it is not what the rule says
    option: str = ""  # the option, without dashes
    argument: str = ""  # the key inside it

    def __str__(self) -> str:
        if self.rule is Rule.REFUSED:
            how = "without it" if self.before in (None, False) else f"with {_shown(self.before)}"
            return (
                f"{self.name}: the resumed state was made {how}, this run has {_shown(self.now)}; its weights and "
                f"optimizer do not fit then. Resume with what it was, or start a new run."
            )
        if not self.option:
            return f"{self.name} changed since the resumed run: {self.rule.value}."
        return (
            f"{self.name}: {_shown(self.before)} in the resumed run, {_shown(self.now)} now: "
            f"{self.outcome or self.rule.value}."
        )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Everything in which two records (`run_record`) differ. What one of them does not have is not compared."""
    before, current = saved.get("options", {}), now["options"]
    found: list[Difference] = []
    for name in RULES:
        if name in before and name in current and before[name] != current[name]:
            found += _differences_of(name, before[name], current[name], current)
    old, new = saved.get("data", {}), now["data"]
    return found + [
        Difference(text, old[key], new[key], Rule.WARNED)
        for key, text in DATA_NAMES.items()
        if key in old and key in new and old[key] != new[key]
    ]


def refuse_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError that names every difference with which a state cannot be gone on from."""
    problems = [str(difference) for difference in differences(saved, now) if difference.rule is Rule.REFUSED]
    if problems:
        raise UserError(problems)


def _differences_of(name: str, before: Any, now: Any, current: Mapping[str, Any]) -> Iterator[Difference]:
    option = "number of processes" if name == "num_processes" else f"--{name}"
    rule, outcome = RULES[name], _outcome(name, current)
    if name not in ARGUMENT_RULES:
        if _zeros(name, before) != _zeros(name, now):
            rule = Rule.REFUSED  # a part whose rate is 0 is not trained at all
        yield Difference(option, before, now, rule, outcome, name)
        return
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            own = ARGUMENT_RULES[name].get(key, rule)
            yield Difference(f"{option} {key}", before.get(key), now.get(key), own, outcome, name, key)


def _zeros(name: str, value: Any) -> list[int]:
    """Which parts an option switches off."""
    if name == "stop_text_encoder_training":
        return [0] if value is not None and value <= 0 else []
    if name not in _RATES or name == "learning_rate":
        return []
    return [index for index, rate in enumerate(value if isinstance(value, list) else [value]) if rate == 0]


def _outcome(name: str, current: Mapping[str, Any]) -> str:
    """What happens where an optimizer does not look at an option; else empty."""
    kind, arguments = current["optimizer_type"], current["optimizer_args"]
    if name in _RATES and kind.endswith(".Adafactor") and arguments.get("relative_step", True):
        return "no effect, the optimizer finds its own learning rate"
    if name in _SCHEDULE and not name.startswith("max_") and is_schedule_free(kind):
        return "no effect, the optimizer takes no schedule"
    return ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


# --- what takes effect -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Changes:
    """What of this run takes the place of what a state holds. Learning rates always do."""

    arguments: frozenset[str] = frozenset()  # of the optimizer's groups
    schedule: bool = False  # the schedule is another one, or counts other steps
    step_ratio: float = 1.0  # schedule steps of this run for each of the resumed one

    @classmethod
    def between(cls, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
        """For going on from a state with the record `saved`."""
        found = differences(saved, now)
        processes = saved.get("options", {}).get("num_processes") or now["options"]["num_processes"]
        ratio = now["options"]["num_processes"] / processes
        return cls(
            arguments=frozenset(item.argument for item in found if item.option == "optimizer_args"),
            schedule=ratio != 1 or any(item.option in _SCHEDULE for item in found),
            step_ratio=ratio,
        )
