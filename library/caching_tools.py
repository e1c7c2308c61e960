"""What the caching tools do: the caches of a training, made before it, with nothing loaded but the encoders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from library import devices
from library.caching import fill_latent_caches, fill_text_caches, text_encoding
from library.config_util import SupportedKinds, describe, load_data_config
from library.data.cache import CacheReport, check_cacheable
from library.data.dataset import DatasetGroup, build_group
from library.data.discovery import Surroundings, discover_all
from library.data.text_cache import text_cache_problems
from library.families.base import ModelFamily
from library.model_files import TEXT, VAE
from library.options.errors import UserError
from library.train_util import Precision, make_accelerator, resolve_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

logger = logging.getLogger(__name__)

ChooseFamily = Callable[["Options"], ModelFamily]


def cache_latents(options: Options, choose_family: ChooseFamily, kinds: SupportedKinds) -> None:
    """`tools/cache_latents.py`: latents of every image, in files beside the images."""
    family, accelerator = _begin(options, choose_family, VAE)
    groups = _groups(options, family, kinds, accelerator)
    for group in groups:
        check_cacheable(group)
    _load(options, family, accelerator)
    family.vae.to(accelerator.device)
    reports = [fill_latent_caches(options, family, group, accelerator) for group in groups]
    _finish(reports, accelerator)


def cache_text_encoder_outputs(options: Options, choose_family: ChooseFamily, kinds: SupportedKinds) -> None:
    """`tools/cache_text_encoder_outputs.py`: text-encoder outputs of every caption, in files beside the images."""
    family, accelerator = _begin(options, choose_family, TEXT)
    groups = _groups(options, family, kinds, accelerator)
    problems = [text for group in groups for text in text_cache_problems(group)]
    if problems:
        raise UserError(problems)
    _load(options, family, accelerator)
    with text_encoding(family, accelerator):
        reports = [fill_text_caches(options, family, family.tokenize, group, accelerator) for group in groups]
    _finish(reports, accelerator)


def _begin(options: Options, choose_family: ChooseFamily, part: str) -> tuple[ModelFamily, Accelerator]:
    family = choose_family(options)
    family.parts = frozenset({part})
    problems = family.check_options()
    if options.dataset.dataset_class:
        problems.append("--dataset_class: such a dataset makes its own batches, so there is nothing to cache.")
    if problems:
        raise UserError(problems)
    accelerator = make_accelerator(options, time.time())
    devices.seed_all(resolve_seed(options, None, accelerator) + accelerator.process_index)
    return family, accelerator


def _groups(
    options: Options, family: ModelFamily, kinds: SupportedKinds, accelerator: Accelerator
) -> list[DatasetGroup]:
    """The images that train, and those that validate if there are any."""
    config = load_data_config(
        options.dataset, kinds, bucket_step=family.latent.bucket_step, resolution_step=family.latent.pixel_unit,
        validation_seed=options.training.seed,
    )
    found = discover_all(config, Surroundings(family.latent, accelerator.is_main_process))
    training, validation = [parts.training for parts in found], [parts.validation for parts in found]
    logger.info("%s", describe(config, training))
    groups = [
        build_group(config, records, spec=family.latent, tokenize=None, seed=0, is_validation=is_validation)
        for records, is_validation in ((training, False), (validation, True))
        if any(records)
    ]
    for group in groups:
        group.check_bucket_sizes(family.latent.pixel_unit)
    return groups


def _load(options: Options, family: ModelFamily, accelerator: Accelerator) -> None:
    precision = Precision.from_options(options)
    family.load(
        weight_dtype=precision.weight, vae_dtype=precision.vae,
        device=accelerator.device if options.training.lowram else torch.device("cpu"),
    )


def _finish(reports: list[CacheReport], accelerator: Accelerator) -> None:
    for report in reports:
        accelerator.print(report)
    accelerator.wait_for_everyone()
