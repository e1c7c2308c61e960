"""The base of a user's own dataset class (`--dataset_class`), public as `library.train_util.MinimalDataset`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from library.config_schema import SubsetConfig
from library.data import images
from library.data.captions import CaptionContext, process_caption

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

_SUBSET_FIELDS = tuple(field.name for field in fields(SubsetConfig))


class TokenizeStrategy:
    """The tokenizers of the model that is trained: `tokenize(text or texts)` gives what `input_ids_list` holds.

    Stable Diffusion: one tensor [B,n,77]; SDXL: two; FLUX: CLIP-L, T5, T5 mask; SD3: CLIP-L, CLIP-G, T5 and the masks
    of the three.
    """

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize = tokenize

    def tokenize(self, text: str | Sequence[str]) -> list[Tensor]:
        """int64 [B,...] per tokenizer; a single text counts as a list of one."""
        tokens = self._tokenize([text] if isinstance(text, str) else list(text))
        return [tokens[name] for name in list_order(tokens)]


def list_order(tokens: Mapping[str, Any]) -> list[str]:
    """The names of token tensors in the order of `input_ids_list`: ids, then masks."""
    return sorted(tokens, key=lambda name: name.endswith("_mask"))


class MinimalDataset(Dataset[dict[str, Any]]):
    """Subclass it and override `__len__` (number of batches) and `__getitem__(i)` (one whole batch as a dictionary).

    A batch holds `images` (float32 [B,3,H,W] in [-1,1]) or `latents` ([B,C,h,w]), `captions` (B texts) and
    `loss_weights` ([B]); optional are `input_ids_list` (see `TokenizeStrategy`; or `input_ids`, the only tensor of such
    a list), `alpha_masks`, `conditioning_images`, `original_sizes_hw`, `crop_top_lefts`, `target_sizes_hw`,
    `flippeds`, `custom_attributes`, `image_keys`. Captions are tokenized where `input_ids_list` is absent.

    The trainer makes `Class(None, max_token_length, (width, height) or None, debug_dataset)`. Python's, NumPy's and
    torch's generators are seeded for every batch, so what `__getitem__` draws from them depends on nothing but
    `--seed`, the epoch and i.
    """

    #: set once the trainer has taken the dataset over
    tokenize_strategy: TokenizeStrategy | None = None
    #: for `get_input_ids`: to be set by the subclass
    tokenizers: Sequence[Any] = ()
    tokenizer_max_length: int | None = None

    _strategy_of_run: TokenizeStrategy | None = None
    _rng: random.Random | None = None

    def __init__(
        self, resolution: tuple[int, int] | None, network_multiplier: float, debug_dataset: bool = False
    ) -> None:
        self.resolution = resolution
        self.width: Any = resolution[0] if resolution else None
        self.height: Any = resolution[1] if resolution else None
        self.network_multiplier = network_multiplier
        self.debug_dataset = debug_dataset
        self.datasets: list[Any] = [self]
        self.subsets: list[Any] = [self]
        self.num_train_images = 0
        self.num_reg_images = 0
        self.batch_size = 1
        self.num_repeats = 1
        self.img_count = 1
        self.bucket_info: dict[str, Any] = {}
        self.is_reg = False
        self.image_dir = "dummy"
        self.image_data: dict[str, Any] = {}
        self.seed = 0
        self.current_epoch = 0
        self.current_step = 0
        self.max_train_steps = 0
        self.replacements: dict[str, str | list[str]] = {}

    def __len__(self) -> int:
        """Number of batches."""
        raise NotImplementedError(f"{type(self).__name__} must define __len__: the number of its batches")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Batch `index`."""
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__: one batch as a dictionary")

    # --- what the trainer says --------------------------------------------------------------------------------
    def set_seed(self, seed: int) -> None:
        """`--seed`, or what was drawn in its place; once, before the first batch."""
        self.seed = seed

    def set_current_epoch(self, epoch: int) -> None:
        """The epoch (1-based) of the batch that is fetched next. Nothing is shuffled: the trainer permutes batches."""
        self.current_epoch = epoch

    def set_current_step(self, step: int) -> None:
        """Optimizer steps completed before the batch that is fetched next."""
        self.current_step = step

    def set_max_train_steps(self, max_train_steps: int) -> None:
        """How many steps the run has."""
        self.max_train_steps = max_train_steps

    def set_current_strategies(self) -> None:
        """From now on `tokenize_strategy` is the one of the model that is trained."""
        self.tokenize_strategy = self._strategy_of_run

    def add_replacement(self, text: str, replacement: str | list[str]) -> None:
        """`process_caption` puts `replacement` (or one of them) in place of `text`; "" replaces whole captions."""
        self.replacements[text] = replacement

    # --- what the trainer asks --------------------------------------------------------------------------------
    def is_latent_cacheable(self) -> bool:
        """Whether `--cache_latents` may be given: only if the batches hold latents themselves."""
        return False

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        """Raise ValueError here if the sizes of the batches do not fit a model that needs multiples of `min_steps`."""

    def get_resolutions(self) -> list[tuple[int, int]]:
        """The (width, height) that are trained, for models that want to know them before."""
        return []

    # --- helpers for `__getitem__` ----------------------------------------------------------------------------
    def image_transforms(self, image: Any) -> Tensor:
        """A Pillow image or uint8 array [H,W,3] -> float32 [3,H,W] in [-1,1]."""
        return images.to_tensor(image if isinstance(image, np.ndarray) else np.array(image.convert("RGB")))

    def process_caption(self, subset: Any, caption: str) -> str:
        """The caption after everything that `subset` says about captions (`shuffle_caption`, `caption_prefix`, ...).

        `subset` is any object with attributes named like the keys of a dataset file; keys that it lacks have their
        defaults. Random steps draw from a stream of (seed, epoch, batch).
        """
        known = {name: getattr(subset, name) for name in _SUBSET_FIELDS if hasattr(subset, name)}
        context = CaptionContext(
            self.current_epoch, self.current_step, max_train_steps=self.max_train_steps, replacements=self.replacements
        )
        return process_caption(caption, SubsetConfig(**known), self._rng or random.Random(self.seed), context)

    def get_input_ids(self, caption: str, tokenizer: Any = None) -> Tensor:
        """int64 [n,77]: the caption by a CLIP `tokenizer`, or `tokenizers[0]`, cut at `tokenizer_max_length`.

        The length counts the start and end marks: 77, 152 or 227. Raises ValueError when the class has set neither.
        """
        from library.text.clip import ClipTokenizer

        tokenizer = tokenizer or (self.tokenizers[0] if self.tokenizers else None)
        if tokenizer is None or self.tokenizer_max_length is None:
            raise ValueError(
                f"{type(self).__name__}.get_input_ids needs self.tokenizers and self.tokenizer_max_length; "
                "self.tokenize_strategy.tokenize(captions) needs nothing"
            )
        clip = ClipTokenizer(tokenizer, source=f"{type(self).__name__}.tokenizers")
        return clip.windows([caption], self.tokenizer_max_length - 2)[0]
