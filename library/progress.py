"""What a training run says while it runs: banner, progress bar, scalars for the trackers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.options.errors import UserError
from library.options.toml_text import read_toml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.data.dataset import DatasetGroup
    from library.options import Options
    from library.train_util import Run, StepOutcome, StepPlan

logger = logging.getLogger(__name__)

#: options that never enter a tracker's configuration: secrets and paths
REDACTED = frozenset(
    "wandb_api_key huggingface_token pretrained_model_name_or_path vae tokenizer_cache_dir train_data_dir "
    "conditioning_data_dir reg_data_dir output_dir logging_dir dataset_config in_json resume network_weights "
    "base_weights clip_l clip_g t5xxl ae controlnet_model_name_or_path sample_prompts config_file "
    "huggingface_repo_id".split()
)


def print_banner(accelerator: Accelerator, options: Options, group: DatasetGroup, plan: StepPlan) -> None:
    """The counts of a run, as one block at its start."""
    batch_sizes = ", ".join(map(str, group.batch_sizes))
    epochs = options.training.max_train_epochs
    if epochs is not None:
        accelerator.print(f"override steps. steps for {epochs} epochs is: {plan.max_steps}")
    accelerator.print(
        "running training\n"
        f"  num train images * repeats: {group.num_train_images}\n"
        f"  num reg images: {group.num_reg_images}\n"
        f"  num batches per epoch: {plan.batches_per_epoch}\n"
        f"  num epochs: {plan.epochs}\n"
        f"  batch size per device: {batch_sizes}\n"
        f"  gradient accumulation steps = {plan.accumulation}\n"
        f"  total optimization steps: {plan.max_steps}"
    )


class RunLog:
    """Progress bar and trackers of one run."""

    def __init__(self, run: Run, group_names: Sequence[str], tracker_name: str, *, total: int, done: int) -> None:
        from tqdm import tqdm

        self._run = run
        self._group_names = group_names
        self._norms: dict[str, Any] = {}  # of the last optimizer step with --scale_weight_norms
        accelerator, options = run.accelerator, run.options
        self.has_trackers = bool(accelerator.log_with)
        if self.has_trackers:
            config = json.loads(tracker_config(options)) if options.logging.log_config else None
            accelerator.init_trackers(
                options.logging.log_tracker_name or tracker_name, config=config, init_kwargs=_tracker_arguments(options)
            )
        self._bar = tqdm(
            total=total, initial=done, smoothing=0, desc="steps", disable=not accelerator.is_local_main_process
        )

    def batch(self, outcome: StepOutcome, *, synced: bool) -> None:
        """After every batch: the bar's postfix and the scalars; the bar advances with optimizer steps."""
        run = self._run
        if synced:
            self._bar.update(1)
        if "max_norm/keys_scaled" in outcome.scalars:
            self._norms["Keys Scaled"] = int(outcome.scalars["max_norm/keys_scaled"])
            self._norms["Average key norm"] = outcome.scalars["norm/avg_key_norm"]
        self._bar.set_postfix({"avr_loss": run.losses.average} | self._norms)
        if self.has_trackers:
            scalars = {"loss/current": outcome.loss, "loss/average": run.losses.average}
            self.scalars(scalars | self._learning_rates() | dict(outcome.scalars), step=run.position.step)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Hand scalars to the trackers; one that cannot write (no space) is left alone from then on."""
        if self.has_trackers:
            with self._tracker_trouble():
                self._run.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the bar and the trackers; the last thing of a run, as processes part here."""
        self._bar.close()
        if self.has_trackers:
            with self._tracker_trouble():
                self._run.accelerator.end_training()

    @contextmanager
    def _tracker_trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("the logs cannot be written any more, training goes on without them: %s", error)
            self.has_trackers = False

    def _learning_rates(self) -> dict[str, float]:
        run = self._run
        values: dict[str, float] = {}
        name = run.optimizer.name.rsplit(".", 1)[-1].lower()
        groups = run.parameter_groups()
        for title, rate, group in zip(self._group_names, run.scheduled_rates(), groups, strict=True):
            values[f"lr/{title}"] = rate
            if (name.startswith("dadapt") or name == "prodigy") and "d" in group:
                values[f"lr/d*lr/{title}"] = float(group["d"]) * float(group["lr"])
        if name == "prodigyplusschedulefree" and "d" in groups[0]:
            values["lr/d*lr"] = float(groups[0]["d"]) * float(groups[0]["lr"])
        return values


def tracker_config(options: Options) -> str:
    """The options that `--log_config` stores, as JSON: no secrets, no paths."""
    plain = {}
    for name, value in options.flat().items():
        if name not in REDACTED and not name.endswith("_path"):
            plain[name] = value if value is None or isinstance(value, bool | str | float | int) else str(value)
    return json.dumps(plain)


def _tracker_arguments(options: Options) -> dict[str, dict[str, Any]]:
    """Init arguments per tracker from `--log_tracker_config`, with the run's name kept."""
    logs = options.logging
    arguments: dict[str, dict[str, Any]] = {}
    if logs.log_tracker_config:
        try:
            arguments = read_toml(Path(logs.log_tracker_config))
        except ValueError as error:
            raise UserError(f"--log_tracker_config {logs.log_tracker_config}: {error}") from error
    if logs.wandb_run_name:
        arguments.setdefault("wandb", {}).setdefault("name", logs.wandb_run_name)
    return arguments
