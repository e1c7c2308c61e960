"""Options for TensorBoard and other trackers."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class LoggingOptions:
    logging_dir: str | None = option("folder for training logs; turns logging on")
    log_with: str | None = option("where to log (default: tensorboard)", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = option("text before the time stamp in the name of a run's log folder")
    log_tracker_name: str | None = option("name of the project in the log")
    wandb_run_name: str | None = option("name of the run at Weights & Biases")
    log_tracker_config: str | None = option("TOML file with further settings, one table per tracker")
    wandb_api_key: str | None = option("key for Weights & Biases (better: log in once with `wandb login`)")
    log_config: bool = flag("store the options in the log (without secrets and paths)")
