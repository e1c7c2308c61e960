"""Options for what is saved, where, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class SavingOptions:
    output_dir: str | None = option("folder for everything that is saved")
    output_name: str | None = option("name of saved files, without folder and ending")
    save_model_as: str | None = option(
        "file format of saved models", "safetensors", choices=(None, "ckpt", "pt", "safetensors")
    )
    use_safetensors: bool = flag("save as safetensors in whatever layout --save_model_as or the source model gives")
    save_precision: str | None = option(
        "number format of saved weights (default: as trained)", choices=(None, "float", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = option("save a model every n epochs", type="int")
    save_every_n_steps: int | None = option("save a model every n steps", type="int")
    save_n_epoch_ratio: int | None = option("save about this many models over the whole training", type="int")
    save_last_n_epochs: int | None = option("keep models of the last n epochs, delete older ones", type="int")
    save_last_n_epochs_state: int | None = option("the same for states (default: as for models)", type="int")
    save_last_n_steps: int | None = option("keep models of the last n steps, delete older ones", type="int")
    save_last_n_steps_state: int | None = option("the same for states (default: as for models)", type="int")
    save_state: bool = flag("save the training state with every model, to go on later with --resume")
    save_state_on_train_end: bool = flag("save the training state at the end only")
    resume: str | None = option("state folder to go on from")
    no_metadata: bool = flag("do not store training details in saved files")
    training_comment: str | None = option("remark stored in the file's metadata")
