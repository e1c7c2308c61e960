"""A run's caches, filled with its family's own encoders before training: latents and text-encoder outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import devices
from library.data.cache import CacheOptions, CacheReport, cache_latents, remake_latents
from library.data.dataset import DatasetGroup
from library.data.text_cache import EncodeCaptions, TextCacheOptions, cache_text_outputs, remake_text_outputs
from library.families.base import ModelFamily, Tokenize
from library.generation.engine import evaluation_mode, on_device
from library.methods.base import TrainingMethod
from library.model_files import TEXT
from library.train_util import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options import Options

logger = logging.getLogger(__name__)


def fill_latent_caches(
    options: Options, family: ModelFamily, group: DatasetGroup, accelerator: Accelerator
) -> CacheReport:
    """`--cache_latents`: encode every image once, in memory or on disk."""
    choices = CacheOptions(
        to_disk=options.cache.cache_latents_to_disk, vae_batch_size=options.cache.vae_batch_size,
        skip_check=options.cache.skip_cache_check, vae_identity=family.vae_identity,
        high_vram=options.training.highvram,
    )
    with torch.no_grad():
        report = cache_latents(
            group, family.encode_images, spec=family.latent, options=choices, rank=accelerator.process_index,
            world_size=accelerator.num_processes, device=accelerator.device,
        )
    logger.info("%s", report)
    return report


# --- text-encoder outputs -----------------------------------------------------------------------------------
def text_option_problems(options: Options, family: ModelFamily, method: TrainingMethod) -> list[str]:
    """Why `--cache_text_encoder_outputs` cannot be with this family and method; needs no data and no models."""
    if not options.cache.cache_text_encoder_outputs:
        return []
    if family.text_cache is None:
        return ["--cache_text_encoder_outputs does not work with this kind of model; leave it out."]
    try:
        released = released_text_encoders(options, family, method)
    except ValueError as error:
        return [str(error)]
    if not any(released):
        return [
            "--cache_text_encoder_outputs: every text encoder is trained, so there is nothing to cache. Leave it out, "
            "or do not train the text encoders."
        ]
    return []


def released_text_encoders(options: Options, family: ModelFamily, method: TrainingMethod) -> list[bool]:
    """Which text encoders are forgotten once their outputs are cached; known before models are loaded."""
    if not options.cache.cache_text_encoder_outputs:
        return [False] * len(family.text_encoder_names)
    return family.cached_text_encoders(method.trained_text_encoders())


def fill_text_caches(
    options: Options, family: ModelFamily, tokenize: Tokenize, group: DatasetGroup, accelerator: Accelerator
) -> CacheReport:
    """`--cache_text_encoder_outputs`: encode every caption once, in memory or on disk. See `text_encoding`."""
    spec, cache = family.text_cache, options.cache
    if spec is None:
        raise ValueError("--cache_text_encoder_outputs does not work with this kind of model; leave it out.")
    to_disk = cache.cache_text_encoder_outputs_to_disk
    choices = TextCacheOptions(
        to_disk=to_disk, batch_size=cache.text_encoder_batch_size, skip_check=cache.skip_cache_check,
        encoders=family.text_identity if to_disk else "",
    )
    report = cache_text_outputs(
        group, caption_encoder(family, tokenize, accelerator.device), spec=spec, options=choices,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )
    logger.info("%s", report)
    return report


def caption_encoder(family: ModelFamily, tokenize: Tokenize, device: torch.device | str) -> EncodeCaptions:
    """Captions -> the arrays of the family's text cache."""

    def encode(captions: Sequence[str]) -> Mapping[str, Tensor]:
        return family.encode_text_for_cache({name: ids.to(device) for name, ids in tokenize(captions).items()})

    return encode


@contextmanager
def text_encoding(family: ModelFamily, accelerator: Accelerator) -> Iterator[None]:
    """All text encoders on the device, in eval mode, under autocast, without gradients; afterwards back again."""
    encoders = family.text_encoders
    with torch.no_grad(), on_device(encoders, accelerator.device), evaluation_mode(encoders), accelerator.autocast():
        yield
    devices.empty_cache()


# --- while a run trains -------------------------------------------------------------------------------------
class CacheRepair:
    """Makes spoilt cache files of a run anew, between two steps and without touching its random numbers.

    Text encoders that the run has released are read again for it, on the CPU. A file whose encoders cannot be had
    again (the model was changed after it was read) stays spoilt.
    """

    def __init__(self, method: TrainingMethod, group: DatasetGroup, accelerator: Accelerator) -> None:
        self._method = method
        self._group = group
        self._accelerator = accelerator

    def __call__(self, path: Path) -> bool:
        """Whether the file is whole again."""
        with torch.random.fork_rng(devices=self._random_devices()):
            return self._remake_latents(path) or self._remake_text(path)

    def _random_devices(self) -> list[torch.device]:
        return [self._accelerator.device] if self._accelerator.device.type == "cuda" else []

    def _remake_latents(self, path: Path) -> bool:
        family, device = self._method.family, self._accelerator.device
        with on_device([family.vae], device), evaluation_mode([family.vae]):
            return remake_latents(self._group, path, family.encode_images, device=device)

    def _remake_text(self, path: Path) -> bool:
        if not self._group.text_encoders:
            return False
        trained = self._method.family
        family = type(trained)(trained.options)
        family.parts = frozenset({TEXT})
        dtype = Precision.from_options(family.options).weight
        family.load(weight_dtype=dtype, vae_dtype=dtype, device="cpu")
        if family.text_identity != self._group.text_encoders:
            return False
        encode = caption_encoder(family, self._method.tokenize, "cpu")
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return remake_text_outputs(self._group, path, encode)
