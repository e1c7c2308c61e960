"""A user's own dataset class (`--dataset_class`) in place of the datasets that a file or folders describe."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from library.data.captions import random_stream
from library.data.dataset import DatasetGroup
from library.data.minimal_dataset import MinimalDataset, Tokenize, TokenizeStrategy, list_order
from library.data.records import Batch, BatchRequest, LatentSpec
from library.options.errors import UserError

if TYPE_CHECKING:
    from library.options import Options

logger = logging.getLogger(__name__)

_REPLACED = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


class CustomGroup(DatasetGroup):
    """One `MinimalDataset` as the group of a run: an epoch is a permutation of its batches from (seed, epoch)."""

    def __init__(
        self, dataset: MinimalDataset, class_path: str, *, spec: LatentSpec, tokenize: Tokenize, seed: int,
        weighted_captions: bool = False,
    ) -> None:
        super().__init__([], spec=spec, tokenize=tokenize, seed=seed)
        self.custom = dataset
        self._class_path = class_path
        self._make_tokens = tokenize
        self._weighted_captions = weighted_captions  # token tensors then come from the captions alone
        self._shapes = {name: tuple(ids.shape[1:]) for name, ids in tokenize([""]).items()}
        self._length = _length(dataset, class_path)
        dataset._strategy_of_run = TokenizeStrategy(tokenize)
        dataset.set_current_strategies()
        dataset.set_seed(seed)

    @property
    def num_train_images(self) -> int:
        """As the class says."""
        return int(self.custom.num_train_images)

    @property
    def num_reg_images(self) -> int:
        """As the class says."""
        return int(self.custom.num_reg_images)

    @property
    def batch_sizes(self) -> list[int]:
        """As the class says."""
        return [int(self.custom.batch_size)]

    def facts(self) -> dict[str, Any]:
        """What the metadata of trained files says about the data, as for folders."""
        dataset = self.custom
        directory = {os.path.basename(str(dataset.image_dir)): {
            "n_repeats": dataset.num_repeats, "img_count": dataset.img_count
        }}  # fmt: skip
        return {
            "ss_dataset_class": self._class_path,
            "ss_batch_size_per_device": dataset.batch_size,
            "ss_resolution": dataset.resolution,
            "ss_dataset_dirs": json.dumps({} if dataset.is_reg else directory),
            "ss_reg_dataset_dirs": json.dumps(directory if dataset.is_reg else {}),
            "ss_tag_frequency": json.dumps({}),
            "ss_bucket_info": json.dumps(dataset.bucket_info),
        }

    def __len__(self) -> int:
        return self._length

    def epoch_plan(self, epoch: int) -> list[tuple[int, tuple[str, ...]]]:
        """(0, number of the batch as text) in the order of `BatchRequest.index`; its images only the class knows."""
        return [(0, (str(number),)) for number in self._order(epoch)]

    def source_of(self, request: BatchRequest) -> None:
        """None: only the class knows."""

    def __getitem__(self, request: BatchRequest) -> Batch:
        number = self._order(request.epoch)[request.index]
        dataset = self.custom
        dataset.set_current_epoch(request.epoch)
        dataset.set_current_step(request.step)
        dataset.set_max_train_steps(self.max_train_steps)
        dataset._rng = random_stream(self.seed, request.epoch, number, "caption")
        place = f"{self._class_path}[{number}]"
        with _derived_generators(self.seed, request.epoch, number):
            content = _call(place, lambda: dataset[number])
        return self._to_batch(content, place)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self._length))
        random_stream(self.seed, epoch, 0, "order").shuffle(order)
        return order

    # --- dictionary -> batch ----------------------------------------------------------------------------------
    def _to_batch(self, content: Any, place: str) -> Batch:
        reader = _BatchReader(content, place)
        captions = reader.captions()
        count = len(captions)
        images, latents = reader.tensor("images"), reader.tensor("latents")
        if (images is None) == (latents is None):
            reader.fail("it must hold either `images` (float [B,3,H,W] in [-1,1]) or `latents` ([B,C,h,w])")
        content_shape = (count, 3) if images is not None else (count, self.spec.channels)
        pixels = images if images is not None else latents
        assert pixels is not None
        if pixels.dim() != 4 or tuple(pixels.shape[:2]) != content_shape:
            name = "images" if images is not None else "latents"
            reader.fail(f"`{name}` has shape {list(pixels.shape)}, expected [{count},{content_shape[1]},height,width]")
        unit = 1 if images is not None else self.spec.downsample
        height, width = (int(side) * unit for side in pixels.shape[2:])
        if height % self.spec.pixel_unit or width % self.spec.pixel_unit:
            reader.fail(f"its images are {width}x{height}; both sides must be multiples of {self.spec.pixel_unit}")
        if reader.get("text_encoder_outputs_list") not in (None, []):
            reader.fail("`text_encoder_outputs_list` must be None: texts are encoded while training")
        whole = torch.tensor([[height, width]] * count)
        return Batch(
            captions=captions,
            loss_weights=reader.rows("loss_weights", torch.ones(count)),
            original_sizes_hw=reader.rows("original_sizes_hw", whole).to(torch.int64),
            crop_top_lefts=reader.rows("crop_top_lefts", torch.zeros_like(whole)).to(torch.int64),
            target_sizes_hw=reader.rows("target_sizes_hw", whole).to(torch.int64),
            network_multipliers=reader.rows(
                "network_multipliers", torch.full((count,), float(self.custom.network_multiplier))
            ),
            image_keys=[str(key) for key in reader.items("image_keys", [f"{place}, {row}" for row in range(count)])],
            flippeds=[bool(flipped) for flipped in reader.items("flippeds", [False] * count)],
            custom_attributes=[dict(table) for table in reader.items("custom_attributes", [{}] * count)],
            images=None if images is None else images.float(), latents=latents,
            tokens=self._tokens(reader, captions),
            alpha_masks=reader.optional_rows("alpha_masks"),
            conditioning_images=reader.optional_rows("conditioning_images"),
        )

    def _tokens(self, reader: _BatchReader, captions: list[str]) -> dict[str, Tensor]:
        """`input_ids_list`, or its old name for one tensor, or the captions tokenized."""
        given = reader.get("input_ids_list")
        single = reader.get("input_ids")
        if given is None and single is not None:
            given = [single]
        if given is None or self._weighted_captions:
            return self._make_tokens(captions)
        names = list_order(self._shapes)
        if not isinstance(given, (list, tuple)) or len(given) != len(names):
            reader.fail(f"`input_ids_list` must hold {len(names)} tensors ({', '.join(names)})")
        tokens = {}
        for name, value in zip(names, given, strict=True):
            ids, shape = torch.as_tensor(value), self._shapes[name]
            if tuple(ids.shape[1:]) == shape[1:] and shape[0] == 1:
                ids = ids.unsqueeze(1)  # [B,77] for a single window
            if tuple(ids.shape) != (len(captions), *shape):
                reader.fail(f"`input_ids_list`: {name} has shape {list(ids.shape)}, not {[len(captions), *shape]}")
            tokens[name] = ids.to(torch.int64)
        return tokens


class _BatchReader:
    """Reads the entries of a batch dictionary; what is wrong is an error that names class and batch."""

    def __init__(self, content: Any, place: str) -> None:
        self._place = place
        if not isinstance(content, Mapping):
            self.fail(f"it is a {type(content).__name__}, but a batch is a dictionary")
        self._content = content

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"--dataset_class: batch {self._place}: {problem}")

    def get(self, name: str) -> Any:
        return self._content.get(name)

    def captions(self) -> list[str]:
        captions = self.get("captions")
        texts = isinstance(captions, (list, tuple)) and all(isinstance(text, str) for text in captions)
        if not texts or not captions:
            self.fail("`captions` must be a list with one text per image")
        self._count = len(captions)
        return list(captions)

    def tensor(self, name: str) -> Tensor | None:
        value = self.get(name)
        try:
            return None if value is None else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            self.fail(f"`{name}` cannot be made a tensor: {error}")

    def rows(self, name: str, default: Tensor) -> Tensor:
        value = self.tensor(name)
        if value is None:
            return default
        if value.shape != default.shape:
            self.fail(f"`{name}` has shape {list(value.shape)}, expected {list(default.shape)}")
        return value.to(default.dtype)

    def optional_rows(self, name: str) -> Tensor | None:
        value = self.tensor(name)
        if value is not None and (value.dim() < 3 or len(value) != self._count):
            self.fail(f"`{name}` has shape {list(value.shape)}, expected {self._count} images")
        return None if value is None else value.float()

    def items(self, name: str, default: list[Any]) -> list[Any]:
        value = self.get(name)
        if value is None:
            return default
        if len(value) != self._count:
            self.fail(f"`{name}` has {len(value)} entries, expected {self._count}")
        return list(value)


def load_dataset_class(
    options: Options, *, spec: LatentSpec, tokenize: Tokenize, seed: int, bucket_step: int,
    caption_replacements: Mapping[str, str | list[str]],
) -> CustomGroup:
    """The group of `--dataset_class`. Raises UserError when the class is not there or not what a dataset must be."""
    data, path = options.dataset, str(options.dataset.dataset_class)
    _check_options(options, path)
    dataset_class = _find_class(path)
    arguments = (None, options.model.max_token_length, data.resolution, data.debug_dataset)
    signature = f"{path}(tokenizer, max_token_length, resolution, debug_dataset)"
    dataset = _call(signature, lambda: dataset_class(*arguments))
    if not hasattr(dataset, "num_train_images"):
        raise UserError(
            f"--dataset_class {path}: __init__ must call "
            "super().__init__(resolution, network_multiplier, debug_dataset)"
        )
    if options.cache.cache_latents and not dataset.is_latent_cacheable():
        raise UserError(
            f"--cache_latents cannot be used with --dataset_class {path}, whose is_latent_cacheable() is false; "
            "leave it out."
        )
    _call(f"{path}.verify_bucket_reso_steps", lambda: dataset.verify_bucket_reso_steps(bucket_step))
    group = CustomGroup(
        dataset, path, spec=spec, tokenize=tokenize, seed=seed, weighted_captions=data.weighted_captions
    )
    for text, replacement in caption_replacements.items():
        dataset.add_replacement(text, replacement)
    logger.info("dataset class %s: %d batches per epoch", path, len(group))
    return group


def _check_options(options: Options, path: str) -> None:
    """Refuse what cannot work with a class; warn about what it replaces."""
    if options.cache.cache_text_encoder_outputs:
        raise UserError(
            f"--cache_text_encoder_outputs cannot be used with --dataset_class {path}: captions exist only while "
            "training; leave it out."
        )
    if options.validation.validation_split:
        raise UserError(f"--validation_split cannot be used with --dataset_class {path}; leave it out.")
    replaced = [f"--{name}" for name in _REPLACED if getattr(options.dataset, name)]
    if replaced:
        logger.warning("%s ignored because --dataset_class is given", ", ".join(replaced))


def _find_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise UserError(f"--dataset_class {path}: give package.module.Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"--dataset_class {path}: {module_name} cannot be imported: {_described(error)}; modules are looked for in "
            "the working directory and where Python is told to (PYTHONPATH)"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, MinimalDataset):
        what = "there is no such class" if found is None else "it does not derive from MinimalDataset"
        raise UserError(f"--dataset_class {path}: {what}; subclass library.train_util.MinimalDataset")
    return found


def _length(dataset: MinimalDataset, path: str) -> int:
    length = _call(f"{path}.__len__", lambda: len(dataset))
    if length < 1:
        raise UserError(f"--dataset_class {path}: No data found: it has no batches")
    return length


def _call(place: str, function: Callable[[], Any]) -> Any:
    """What the user's code returns; its failures name their file and line."""
    try:
        return function()
    except Exception as error:
        raise UserError(f"--dataset_class: {place} failed: {_described(error)}") from error


def _described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


@contextmanager
def _derived_generators(seed: int, epoch: int, number: int) -> Iterator[None]:
    """Global generators seeded from (seed, epoch, batch), and afterwards as before: training draws from them too."""
    stream = random_stream(seed, epoch, number, "dataset class")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(stream.getrandbits(64))
    np.random.seed(stream.getrandbits(32))
    torch.default_generator.manual_seed(stream.getrandbits(63))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
