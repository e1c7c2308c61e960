"""The one training loop: every script of every family and method trains here."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library import devices, progress
from library.caching import (
    CacheRepair,
    fill_latent_caches,
    fill_text_caches,
    released_text_encoders,
    text_encoding,
)
from library.checkpoints.stored import remembering
from library.config_util import SupportedKinds, describe, load_data_config
from library.data.cache import check_cacheable
from library.data.custom_group import load_dataset_class
from library.data.dataset import DatasetGroup, build_group
from library.data.decode_check import check_images
from library.data.discovery import Surroundings, discover_all
from library.data.loader import BatchLoader
from library.data.preview import open_window, show_dataset
from library.data.text_cache import text_cache_problems
from library.families.base import ModelFamily
from library.generation.training_samples import TrainingSampler, sampling_warnings
from library.lr_schedulers import create_lr_scheduler
from library.memory.fused_step import fused_step_problems
from library.metadata import RunFacts, TrainingMetadata
from library.methods.base import ParameterGroup, Placement, TrainingMethod
from library.options import non_default
from library.options.errors import UserError
from library.preflight.rooms import room_problems
from library.run_record import data_record
from library.saving import SaveNames, Saver, remove_leftovers, together
from library.train_util import (
    OptimizerSet,
    Precision,
    Run,
    StepPlan,
    make_accelerator,
    resolve_seed,
    resumed_progress,
    starting_position,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

logger = logging.getLogger(__name__)


def train(
    options: Options, family_class: type[ModelFamily], method_class: type[TrainingMethod], kinds: SupportedKinds
) -> None:
    """Train what `method_class` trains on the model that `family_class` knows, as `options` say.

    `kinds`: which kinds of datasets the script accepts.
    """
    started_at = time.time()
    family = family_class(options)
    method = method_class(options, family)
    raise_problems(room_problems(options, family, method))
    warn_without_effect(options, {**family.without_effect, **method.without_effect})
    prompt_warnings = sampling_warnings(options, family)
    for warning in prompt_warnings:
        logger.warning("%s", warning)
    method.prepare_text()
    resumed = resumed_progress(options)
    accelerator = make_accelerator(options, started_at)
    raise_problems(fused_step_problems(options, accelerator.num_processes))
    seed = resolve_seed(options, resumed, accelerator)
    devices.seed_all(seed)

    group = load_data(options, method, kinds, seed, is_main_process=accelerator.is_main_process)
    if options.dataset.debug_dataset:
        show_data(options, family, group, is_main_process=accelerator.is_main_process)
        return

    plan = StepPlan.make(options, len(group), accelerator.num_processes)
    group.max_train_steps = plan.max_steps
    start = starting_position(options, plan, resumed)
    sampler = TrainingSampler(
        options, accelerator=accelerator, predict_for=method.predict_for, prompt_text=method.prompt_text,
        told=prompt_warnings,
    )
    placement = load_models(options, family, method, group, accelerator)
    if options.cache.cache_text_encoder_outputs:
        cache_texts(options, method, group, sampler, accelerator)
    run, groups = make_run(options, method, placement, accelerator, plan, seed)
    family.release_text_encoders(released_text_encoders(options, family, method))
    for encoder in family.text_encoders:
        if encoder is not None:
            encoder.to(accelerator.device)
    run.position, run.data = start, data_record(group)
    if resumed:
        run.resume(resumed.folder or Path(str(options.saving.resume)), resumed)
    run_epochs(run, group, groups, sampler, started_at)


def raise_problems(problems: list[str]) -> None:
    """One error that lists every problem with the options."""
    if problems:
        raise UserError(problems)


def warn_without_effect(options: Options, reasons: Mapping[str, str]) -> None:
    """One warning for each option that is set and that this family or method accepts without using it."""
    for name in non_default(options):
        if name in reasons:
            logger.warning("--%s has no effect: %s", name, reasons[name])


def load_data(
    options: Options, method: TrainingMethod, kinds: SupportedKinds, seed: int, *, is_main_process: bool
) -> DatasetGroup:
    """Dataset class, dataset file or folders -> batches."""
    family, validation = method.family, options.validation
    if options.dataset.dataset_class:
        return load_dataset_class(
            options, spec=family.latent, tokenize=method.tokenize, seed=seed, bucket_step=method.bucket_step,
            caption_replacements=method.caption_replacements,
        )
    config = load_data_config(
        options.dataset, kinds, bucket_step=method.bucket_step, resolution_step=family.latent.pixel_unit,
        validation_split=validation.validation_split,
        validation_seed=seed if validation.validation_seed is None else validation.validation_seed,
    )
    found = discover_all(config, Surroundings(family.latent, is_main_process))
    records = [parts.training for parts in found]
    group = build_group(
        config, records, spec=family.latent, tokenize=method.tokenize, seed=seed,
        prior_loss_weight=options.loss.prior_loss_weight,
    )
    group.check_bucket_sizes(family.latent.pixel_unit)
    group.caption_replacements = method.caption_replacements
    logger.info("%s", describe(config, records))
    if options.cache.cache_text_encoder_outputs:
        raise_problems(text_cache_problems(group))
    if is_main_process:  # caching latents decodes every image anyway, but no conditioning images
        check_images(group, conditioning_only=options.cache.cache_latents)
    return group


def show_data(options: Options, family: ModelFamily, group: DatasetGroup, *, is_main_process: bool) -> None:
    """`--debug_dataset`: what the trainer would see, then the end. Latents are not cached, so that images are seen."""
    if not is_main_process:
        return
    if options.cache.cache_latents:
        check_cacheable(group)
    if options.cache.cache_text_encoder_outputs:
        group.text_cache = family.text_cache  # captions as they would be cached
    folder = Path(options.saving.output_dir or ".") / "debug_dataset"
    files = show_dataset(group, folder)
    window = " and in a window" if len(files) > 1 and open_window(files[-1]) else ""
    print(f"dataset shown in {', '.join(map(str, files))}{window}; no training with --debug_dataset")


def placement_for(options: Options, accelerator: Accelerator) -> Placement:
    """Where and in which dtypes this run keeps its weights."""
    precision = Precision.from_options(options)
    return Placement(accelerator.device, precision.weight, precision.trained)


def load_models(
    options: Options, family: ModelFamily, method: TrainingMethod, group: DatasetGroup, accelerator: Accelerator
) -> Placement:
    """Files -> modules, and the caches that only need frozen models; the order keeps peak memory low."""
    precision, placement = Precision.from_options(options), placement_for(options, accelerator)
    with remembering() if method.writes_whole_model else nullcontext():
        family.load(
            weight_dtype=method.loading_dtype(placement), vae_dtype=precision.vae,
            device=accelerator.device if options.training.lowram else torch.device("cpu"),
        )
    method.before_caching(placement)
    family.vae.to(accelerator.device)
    if options.cache.cache_latents:
        fill_latent_caches(options, family, group, accelerator)
        family.vae.to("cpu")
        devices.empty_cache()
        accelerator.wait_for_everyone()
    return placement


def cache_texts(
    options: Options, method: TrainingMethod, group: DatasetGroup, sampler: TrainingSampler, accelerator: Accelerator
) -> None:
    """Everything that needs the text encoders which are released afterwards: captions, prompts of sample images."""
    family = method.family
    released = released_text_encoders(options, family, method)
    with text_encoding(family, accelerator):
        fill_text_caches(options, family, method.tokenize, group, accelerator)
        sampler.prepare(family, released)
    group.needs_tokens = not all(released)
    accelerator.wait_for_everyone()


def make_run(
    options: Options, method: TrainingMethod, placement: Placement, accelerator: Accelerator, plan: StepPlan, seed: int
) -> tuple[Run, list[ParameterGroup]]:
    """Trained parts, optimizer and schedule on loaded models."""
    groups = method.attach(placement)
    if accelerator.process_index:
        devices.seed_all(seed + accelerator.process_index)  # every process its own noise
    optimizers = OptimizerSet.make(
        options, groups, method.family,
        lambda created: create_lr_scheduler(
            options.optimizer, created, num_training_steps=plan.max_steps * accelerator.num_processes,
            num_processes=accelerator.num_processes,
        ),
    )
    return Run(options, accelerator, method, optimizers, plan, seed), optimizers.groups


@dataclass(frozen=True)
class Outputs:
    """What a run writes while it goes."""

    saver: Saver
    sampler: TrainingSampler
    log: progress.RunLog


def run_epochs(
    run: Run, group: DatasetGroup, groups: list[ParameterGroup], sampler: TrainingSampler, started_at: float
) -> None:
    """The loop: epochs, batches, what is due between them, and the end."""
    accelerator, plan = run.accelerator, run.plan
    out = make_outputs(run, group, groups, sampler, started_at)
    try:
        train_epochs(run, group, out)
        out.saver.at_end(plan.epochs, run.position.step)
    finally:
        out.log.close()
    accelerator.print("model saved.")


def train_epochs(run: Run, group: DatasetGroup, out: Outputs) -> None:
    """Every epoch from the run's position on, with the saves and samples that are due before the end."""
    options, accelerator, plan, method = run.options, run.accelerator, run.plan, run.method
    loader = BatchLoader(
        group, accumulation=plan.accumulation, rank=accelerator.process_index, world_size=accelerator.num_processes,
        num_workers=options.dataset.max_data_loader_n_workers,
        persistent_workers=options.dataset.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda", remake=CacheRepair(method, group, accelerator),
    )
    progress.print_banner(accelerator, options, group, plan)
    sample(run, out, epoch=0, step=0, is_due=options.sampling.sample_at_first)
    method.on_start(run.position.step)

    for epoch in range(run.position.epoch, plan.epochs + 1):
        accelerator.print(f"\nepoch {epoch}/{plan.epochs}", flush=True)
        method.on_epoch_start(epoch)
        first = run.position.batch
        batches = loader.epoch(epoch, start=first, first_step=run.position.step)
        for index, batch in enumerate(batches, start=first):
            synced = plan.is_sync(index)
            outcome = run.step(batch.to(accelerator.device), sync=synced)
            run.position = plan.next_position(run.position, index)
            run.losses.add(batch=index, loss=outcome.loss, is_first_epoch=epoch == 1)
            out.log.batch(outcome, synced=synced)
            if synced:
                step = run.position.step
                sample(run, out, epoch=None, step=step, is_due=is_sample_step(options, step))
                out.saver.after_step(step, completed_epochs=epoch - 1)
                if step >= plan.max_steps:
                    break
        out.log.scalars({"loss/epoch_average": run.losses.average}, step=epoch)
        out.saver.after_epoch(epoch, plan.epochs, run.position.step)
        sample(run, out, epoch=epoch, step=run.position.step, is_due=is_sample_epoch(options, epoch))


def is_sample_step(options: Options, step: int) -> bool:
    """`--sample_every_n_steps`, unless samples are drawn by epoch."""
    every = options.sampling.sample_every_n_steps
    return bool(every and options.sampling.sample_every_n_epochs is None and step % every == 0)


def is_sample_epoch(options: Options, epoch: int) -> bool:
    """`--sample_every_n_epochs`."""
    every = options.sampling.sample_every_n_epochs
    return bool(every and epoch % every == 0)


def sample(run: Run, out: Outputs, *, epoch: int | None, step: int, is_due: bool) -> None:
    """Draw the sample images if they are due."""
    if is_due:
        with run.inference():
            out.sampler.draw(run.method.family, epoch=epoch, step=step)


def make_outputs(
    run: Run, group: DatasetGroup, groups: list[ParameterGroup], sampler: TrainingSampler, started_at: float
) -> Outputs:
    """Saver, sampler and log of a run."""
    options, accelerator, method = run.options, run.accelerator, run.method
    precision = Precision.from_options(options)
    names = SaveNames(Path(str(options.saving.output_dir)), options.saving.output_name, method.file_extension)
    metadata = TrainingMetadata(options, group, method, run_facts(run, started_at))

    def write_model(path: Path, epoch: int, steps: int) -> None:
        with run.inference():
            method.save(
                path, dtype=precision.save, metadata=metadata.at(epoch=epoch, steps=steps), counters=(epoch, steps)
            )

    saver = Saver(
        options, names, run.plan.save_every_n_epochs(options), accelerator.is_main_process, write_model, run.save_state,
        together(accelerator), method.companion_files, lambda: run.check_weights(precision.save),
    )
    if accelerator.is_main_process:
        remove_leftovers(names, method.companion_files(names.last()))
    skipped = options.training.skip_until_initial_step
    done = run.position.step
    log = progress.RunLog(
        run, [group.name for group in groups], method.tracker_name,
        total=run.plan.max_steps - (done if skipped else 0), done=0 if skipped else done,
    )
    return Outputs(saver, sampler, log)


def run_facts(run: Run, started_at: float) -> RunFacts:
    """What the metadata of every saved file says about this run."""
    plan, created = run.plan, run.optimizer
    return RunFacts(
        started_at=started_at, seed=run.seed, batches_per_epoch=plan.batches_per_epoch, epochs=plan.epochs,
        max_steps=plan.max_steps, optimizer=created.name, optimizer_args=created.args_text,
        learning_rate=created.learning_rate, lr_scheduler=created.lr_scheduler,
        group_learning_rates_removed=created.group_learning_rates_removed,
        num_processes=run.accelerator.num_processes,
    )
