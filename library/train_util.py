"""A training run's surroundings: accelerator, precision, seed, counting, the optimizer step, logs, resume."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.minimal_dataset import MinimalDataset as MinimalDataset
from library.data.records import Batch
from library.families.base import ModelFamily
from library.finite import BatchResult, StepGuard, check_writable, total_norm
from library.memory.fused_step import FusedBackward, FusedOptimizers, FusedStep, pieces_by_block, pieces_by_count
from library.methods.base import ParameterGroup, TrainingMethod
from library.optimizers import CreatedOptimizer, create_optimizer
from library.options.errors import UserError
from library.options.namespaces import read_config_from_file as read_config_from_file
from library.options.namespaces import verify_command_line_training_args as verify_command_line_training_args
from library.run_record import Changes, Rule, differences, refuse_differences, run_record
from library.saving import saving_words, tell, together
from library.state_files import find_state
from library.training_state import Position, SavedProgress, TrainingParts, load_state, read_progress, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

logger = logging.getLogger(__name__)

#: makes the learning-rate schedule of an optimizer
Schedule = Callable[[CreatedOptimizer], Any]
DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run (`--mixed_precision`, `--full_*`, `--no_half_vae`, `--save_precision`)."""

    weight: torch.dtype  # frozen weights, and what autocast computes in
    trained: torch.dtype  # weights that the optimizer steps
    vae: torch.dtype
    save: torch.dtype | None  # None keeps each tensor's own

    @classmethod
    def from_options(cls, options: Options) -> Precision:
        """Read from the options."""
        device = options.device
        weight = DTYPES[device.mixed_precision or "no"]
        save = options.saving.save_precision
        return cls(
            weight=weight,
            trained=weight if device.full_fp16 or device.full_bf16 else torch.float32,
            vae=torch.float32 if options.model.no_half_vae else weight,
            save=DTYPES[save] if save else None,
        )


def make_accelerator(options: Options, started_at: float) -> Accelerator:
    """The accelerator of a training run; logs go to `<logging_dir>/<log_prefix><time>`.

    The options decide, not what the launcher left in the environment. Raises UserError for fp16 on a CPU.
    """
    import accelerate

    device, logs = options.device, options.logging
    handlers: list[Any] = []
    if torch.cuda.device_count() > 1 or device.ddp_timeout:
        timeout = timedelta(minutes=device.ddp_timeout) if device.ddp_timeout else None
        handlers.append(accelerate.InitProcessGroupKwargs(**({"timeout": timeout} if timeout else {})))
    if device.ddp_gradient_as_bucket_view or device.ddp_static_graph:
        handlers.append(
            accelerate.DistributedDataParallelKwargs(
                gradient_as_bucket_view=device.ddp_gradient_as_bucket_view, static_graph=device.ddp_static_graph
            )
        )
    project = None
    if logs.logging_dir:
        stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(started_at))
        project = str(Path(logs.logging_dir) / f"{logs.log_prefix or ''}{stamp}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        logger.warning("ACCELERATE_DYNAMO_BACKEND=%s is not used: compiling the model is not supported yet.", backend)
    try:
        accelerator = accelerate.Accelerator(
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
                num_steps=options.training.gradient_accumulation_steps
            ),
            mixed_precision=device.mixed_precision or "no",
            log_with=(logs.log_with or "tensorboard") if project else None,
            project_dir=project,
            kwargs_handlers=handlers,
            dynamo_backend="no",
        )
    except ValueError:
        if accelerate.PartialState().device.type == "cpu":
            _refuse_fp16(options)
        raise
    if accelerator.device.type == "cpu":
        _refuse_fp16(options)
    if device.full_fp16 and accelerator.scaler is not None:
        _allow_unscaling_half_gradients(accelerator.scaler)
    return accelerator


def _refuse_fp16(options: Options) -> None:
    if options.device.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU, and none is used here: give bf16 or no.")


def _allow_unscaling_half_gradients(scaler: Any) -> None:
    """`--full_fp16`: let the gradient scaler unscale fp16 gradients, which torch refuses by default."""
    unscale = scaler._unscale_grads_

    def unscale_half_too(optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return unscale(optimizer, inv_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_half_too


def resolve_seed(options: Options, progress: SavedProgress | None, accelerator: Accelerator) -> int:
    """`--seed`, else the seed of the resumed state, else a random one that all processes share."""
    from accelerate.utils import broadcast_object_list

    given, saved = options.training.seed, progress.seed if progress else None
    if given is None:
        drawn = [saved if saved is not None else random.SystemRandom().randint(0, 2**32 - 1)]
        return int(broadcast_object_list(drawn)[0]) if accelerator.num_processes > 1 else drawn[0]
    return given


@dataclass(frozen=True)
class StepPlan:
    """How many batches, steps and epochs a run has. Counts are per process unless they say otherwise."""

    batches_per_epoch: int  # after sharding over processes
    accumulation: int
    max_steps: int
    epochs: int

    @classmethod
    def make(cls, options: Options, batches: int, processes: int) -> StepPlan:
        """From the number of batches per epoch over all processes."""
        training = options.training
        accumulation = training.gradient_accumulation_steps
        per_process = math.ceil(batches / processes)
        updates = math.ceil(per_process / accumulation)
        max_steps = training.max_train_steps
        if training.max_train_epochs is not None:
            max_steps = training.max_train_epochs * math.ceil(batches / processes / accumulation)
        return cls(per_process, accumulation, max_steps, math.ceil(max_steps / updates))

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last accumulation window of an epoch may be short."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    def is_sync(self, batch: int) -> bool:
        """Whether the optimizer steps after batch number `batch` (0-based in its epoch)."""
        return (batch + 1) % self.accumulation == 0 or batch + 1 == self.batches_per_epoch

    def next_position(self, position: Position, batch: int) -> Position:
        """Where a run stands when batch number `batch` (0-based) of the position's epoch is done."""
        step = position.step + self.is_sync(batch)
        if batch + 1 == self.batches_per_epoch:
            return Position(position.epoch + 1, 0, step)
        return Position(position.epoch, batch + 1, step)

    def position_after(self, steps: int) -> Position:
        """Where a run stands after `steps` optimizer steps."""
        epochs, updates = divmod(steps, self.updates_per_epoch)
        return Position(epochs + 1, updates * self.accumulation, steps)

    def save_every_n_epochs(self, options: Options) -> int | None:
        """`--save_every_n_epochs`, overridden by `--save_n_epoch_ratio`."""
        ratio = options.saving.save_n_epoch_ratio
        if ratio:
            return max(1, self.epochs // ratio)
        return options.saving.save_every_n_epochs


def starting_position(options: Options, plan: StepPlan, progress: SavedProgress | None) -> Position:
    """Where training begins: the resumed state's place, or what `--initial_*` and `--skip_until_initial_step` say."""
    training = options.training
    start = training.initial_step
    if start is None and training.initial_epoch is not None:
        start = (training.initial_epoch - 1) * plan.updates_per_epoch
    if start is None:
        return _resumed_position(plan, progress) if progress else Position()
    if progress:
        logger.warning("--initial_epoch/--initial_step is given: the step of the resumed state is not used.")
    if not 0 <= start < plan.max_steps:
        raise ValueError(f"The starting step {start} must be below the number of training steps ({plan.max_steps}).")
    position = plan.position_after(start)
    if training.skip_until_initial_step:
        return position
    logger.warning("Training starts at epoch %d; step numbers restart at 0.", position.epoch)
    return Position(epoch=position.epoch)


def _resumed_position(plan: StepPlan, progress: SavedProgress) -> Position:
    position = progress.position
    if not progress.is_exact:
        return Position()
    if position.step >= plan.max_steps:
        raise ValueError(
            f"The resumed state has done {position.step} steps already, and the options ask for {plan.max_steps} in "
            "all. Give a larger number of steps or epochs."
        )
    if progress.batches_per_epoch != plan.batches_per_epoch:
        logger.warning(
            "The data changed: %s batches per epoch in the resumed run, %d now. Training continues at step %d.",
            progress.batches_per_epoch, plan.batches_per_epoch, position.step,
        )
        return plan.position_after(position.step)
    return position


class LossRecorder:
    """Running mean over the last epoch's worth of batches: `avr_loss`."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.losses: list[float] = list(losses or [])
        self._sum = math.fsum(self.losses)

    def add(self, *, batch: int, loss: float, is_first_epoch: bool) -> None:
        """Record the loss of batch number `batch` (0-based in its epoch); later epochs replace their entry."""
        if is_first_epoch or batch >= len(self.losses):
            self.losses.append(loss)
            self._sum += loss
        else:
            self._sum += loss - self.losses[batch]
            self.losses[batch] = loss

    @property
    def average(self) -> float:
        """Mean of the recorded losses; 0 when there are none."""
        return self._sum / len(self.losses) if self.losses else 0.0


class LossModule(nn.Module):
    """What accelerate wraps: its only registered parts are the trained ones, its forward is the method's loss."""

    def __init__(self, method: TrainingMethod) -> None:
        super().__init__()
        self.trainable = method.trainable
        self._method = method

    def forward(self, batch: Batch, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Per-sample loss [B]."""
        return self._method.loss(batch, timesteps, noise)


@dataclass(frozen=True)
class StepOutcome:
    """What one batch gave. `grad_norm` is None where nothing was clipped as a whole."""

    loss: float
    grad_norm: float | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerSet:
    """The optimizers of a run and their schedules: one of each, or several that `fused` steps in the backward pass."""

    created: list[CreatedOptimizer]
    schedules: list[Any]
    groups: list[ParameterGroup]  # all groups of all optimizers, in order
    fused: FusedStep | None = None  # None: the run clips and steps when all gradients are there

    @classmethod
    def make(
        cls, options: Options, groups: list[ParameterGroup], family: ModelFamily, schedule: Schedule
    ) -> OptimizerSet:
        """What `--optimizer_type`, `--lr_scheduler` and the options for steps in the backward pass ask for."""
        memory, chosen = options.memory, options.optimizer
        parameters = [group.parameters for group in groups]
        if memory.fused_optimizer_groups:
            pieces = pieces_by_count(parameters, memory.fused_optimizer_groups)
        elif memory.blockwise_fused_optimizers:
            pieces = pieces_by_block(parameters, [block for _, block in family.blocks()])
        else:
            created = create_optimizer(chosen, [group.for_optimizer() for group in groups])
            fused = None
            if chosen.fused_backward_pass:
                fused = FusedBackward(created.optimizer, max_grad_norm=chosen.max_grad_norm)
            return cls([created], [schedule(created)], groups, fused)
        groups = [replace(groups[piece.group], parameters=piece.parameters) for piece in pieces]
        several = [
            create_optimizer(chosen, [group.for_optimizer()], is_one_of_several=True, is_silent=number > 0)
            for number, group in enumerate(groups)
        ]
        steps = FusedOptimizers([created.optimizer for created in several], max_grad_norm=chosen.max_grad_norm)
        return cls(several, [schedule(created) for created in several], groups, steps)


@dataclass
class Run:
    """One training run after set-up: it steps, counts, and knows how to pause for inference and to save its state."""

    options: Options
    accelerator: Accelerator
    method: TrainingMethod
    optimizers: OptimizerSet
    plan: StepPlan
    seed: int
    position: Position = field(default_factory=Position)
    losses: LossRecorder = field(default_factory=LossRecorder)
    data: Mapping[str, Any] = field(default_factory=dict)  # see `run_record.data_record`

    def __post_init__(self) -> None:
        self._guard = StepGuard(self.options, self.accelerator)
        module = LossModule(self.method)
        if self.optimizers.fused:  # these step and schedule themselves, in one process
            self.model = self.accelerator.prepare(module)
        else:
            [schedule] = self.optimizers.schedules
            self.model, self._stepper, self._schedule = self.accelerator.prepare(
                module, self.optimizer.optimizer, schedule
            )
        self.model.train()

    @property
    def optimizer(self) -> CreatedOptimizer:
        """The optimizer; the first one if there are several, which then differ only in their parameters."""
        return self.optimizers.created[0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Every group of every optimizer, in the order of `optimizers.groups`."""
        return [group for created in self.optimizers.created for group in created.optimizer.param_groups]

    def scheduled_rates(self) -> list[float]:
        """The learning rate of every optimizer group for the next step, as the schedules report it."""
        return [float(rate) for schedule in self.optimizers.schedules for rate in schedule.get_last_lr()]

    def step(
        self, batch: Batch, *, sync: bool, timesteps: Tensor | None = None, noise: Tensor | None = None
    ) -> StepOutcome:
        """Forward, backward and, at the end of an accumulation window, one optimizer step.

        Raises RunFailed at the first loss or gradient that is not finite.
        """
        accelerator, method = self.accelerator, self.method
        accelerator.sync_gradients = sync
        rate = max(self.scheduled_rates())
        method.on_step_start()
        with nullcontext() if sync else accelerator.no_sync(self.model):
            losses = self.model(batch, timesteps, noise)
            if self.optimizers.fused:
                self.optimizers.fused.begin(is_last=sync)
            accelerator.backward(losses.mean())
        norm = self._update() if sync else None
        was_skipped = sync and not self.optimizers.fused and bool(self._stepper.step_was_skipped)
        result = BatchResult(losses, batch.image_keys, norm, was_skipped)
        loss, grad_norm = self._guard.read(result, sync=sync, position=self.position, rate=rate)
        is_clipped = self.options.optimizer.max_grad_norm and not self.optimizers.fused
        return StepOutcome(loss, grad_norm if is_clipped else None, method.after_step(synced=sync))

    def _update(self) -> Tensor | float | None:
        """One optimizer step on complete gradients; returns their norm before clipping, unread."""
        if self.optimizers.fused:
            norm = self.optimizers.fused.finish()
            for schedule in self.optimizers.schedules:
                schedule.step()
            return norm
        max_norm = self.options.optimizer.max_grad_norm
        if max_norm:
            norm = self.accelerator.clip_grad_norm_(self.method.trained_parameters(), max_norm)
        else:
            norm = None if self.accelerator.scaler else total_norm(self.method.trained_parameters())
        self.method.before_optimizer_step()
        self._stepper.step()
        self._schedule.step()
        self._stepper.zero_grad(set_to_none=True)
        return norm

    def check_weights(self, dtype: torch.dtype | None = None) -> None:
        """Raises RunFailed if a trained weight is not finite, or would not be when it is saved in `dtype`."""
        parameters = self.method.trainable.named_parameters()
        check_writable(parameters, dtype=dtype, what="the trained weights", options=self.options)

    def _check_optimizers(self) -> None:
        for created in self.optimizers.created:
            states = enumerate(created.optimizer.state.values())
            tensors = (
                (f"{name} of parameter {number}", value)
                for number, state in states
                for name, value in state.items()
                if isinstance(value, Tensor) and value.numel() > 1
            )
            check_writable(tensors, dtype=None, what="the optimizer", options=self.options)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Samples, validation and saving: trained parts and schedule-free optimizers in eval mode, then back."""
        with ExitStack() as stack:
            stack.enter_context(self.method.inference())
            if self.optimizer.is_schedule_free:
                schedule_free: Any = self.optimizer.optimizer
                schedule_free.eval()
                stack.callback(schedule_free.train)
            yield

    def _parts(self) -> TrainingParts:
        scaler = getattr(self.accelerator, "scaler", None)
        optimizers = [created.optimizer for created in self.optimizers.created]
        return TrainingParts(self.method.trainable, optimizers, self.optimizers.schedules, scaler)

    def record(self) -> dict[str, Any]:
        """What this run is made with."""
        processes = self.accelerator.num_processes
        return run_record(self.options, num_processes=processes, seed=self.seed, data=self.data)

    def save_state(self, folder: Path) -> None:
        """Write everything that an exact continuation needs; call on every process."""
        progress = SavedProgress(
            self.position, self.seed, self.plan.batches_per_epoch, list(self.losses.losses), record=self.record()
        )
        accelerator = self.accelerator
        self.check_weights()
        self._check_optimizers()
        if accelerator.is_main_process:
            tell(f"\n{saving_words(folder)}: {folder}")
        save_state(
            folder, self._parts(), progress, rank=accelerator.process_index,
            is_main_process=accelerator.is_main_process, phase=together(accelerator),
        )

    def resume(self, folder: Path, progress: SavedProgress) -> None:
        """Put back what `save_state` wrote, with what this run does differently; the last thing before the loop."""
        now = self.record()
        saved = progress.record or {"options": {"seed": progress.seed}}
        if progress.is_exact:
            refuse_differences(saved, now)
            for difference in differences(saved, now):
                level = logging.INFO if difference.rule is Rule.APPLIED else logging.WARNING
                logger.log(level, "--resume: %s", difference)
        if progress.is_exact and progress.record is None:
            logger.warning(
                "%s does not say what it was made with (an older version wrote it), so options cannot be compared: "
                "learning rates, weight decay and schedule are those of this run.", folder,
            )
        rank = self.accelerator.process_index
        load_state(folder, self._parts(), progress, rank=rank, changes=Changes.between(saved, now))
        self.losses = LossRecorder(progress.recorded_losses)
        logger.info("resume training from local state: %s (step %d)", folder, self.position.step)


def resumed_progress(options: Options) -> SavedProgress | None:
    """What the state given by `--resume` says, or None without one.

    A folder of states means its newest whole one of this run. Raises UserError for options that it cannot go on with.
    """
    if not options.saving.resume:
        return None
    progress = read_progress(find_state(Path(options.saving.resume), options.saving.output_name))
    if progress.record:
        refuse_differences(progress.record, run_record(options, num_processes=1, seed=progress.seed, data={}))
    return progress
