"""Records that travel between the data rooms, the families and the training loop. No logic beyond moving tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LatentSpec:
    """Everything the data rooms and the objectives need to know about one family's latents.

    Model input = (z - shift) * scale, where z is a sample of the VAE posterior.
    """

    channels: int
    downsample: int
    bucket_step: int  # `bucket_reso_steps` must be a multiple of it
    scale: float
    shift: float
    cache_suffix: str  # file name ending of a latent cache, e.g. "_sd.npz"
    cache_keys_have_size: bool = False  # keys in the file end in `_<h>x<w>` (latent units)
    cache_is_scaled: bool = False  # cached values are model input already
    pixel_unit: int = 8  # sides of training images are multiples of it

    def normalize(self, z: Tensor) -> Tensor:
        """VAE latents [B,C,h,w] -> model input."""
        return (z - self.shift) * self.scale if self.shift else z * self.scale

    def denormalize(self, x: Tensor) -> Tensor:
        """Model latents [B,C,h,w] -> VAE latents."""
        return x / self.scale + self.shift


@dataclass(frozen=True)
class TextCacheSpec:
    """What the data rooms need to know about one family's cached text-encoder outputs.

    An entry holds one array per name of `arrays`, without a batch dimension; the same names appear in
    `Batch.text_outputs`.
    """

    suffix: str  # file name ending, e.g. "_te_outputs.npz"
    arrays: tuple[str, ...]
    flags: Mapping[str, bool] = field(default_factory=dict)  # boolean scalars in the file that must be as here
    lengths: Mapping[str, int] = field(default_factory=dict)  # array -> first dimension that it must have


@dataclass(frozen=True)
class BatchRequest:
    """What a data worker is asked for: everything random in a batch derives from (seed, epoch, sample)."""

    epoch: int  # 1-based
    index: int  # position in that epoch's order of batches, 0-based
    step: int  # optimizer steps completed before this batch (token warm-up)


@dataclass
class ImageRecord:
    """One image of one subset; sizes are (width, height)."""

    key: str  # unique in its dataset: absolute path, or the metadata key
    path: Path | None
    caption: str
    subset_index: int
    num_repeats: int = 1
    is_reg: bool = False
    image_size: tuple[int, int] = (0, 0)  # after EXIF orientation
    bucket_size: tuple[int, int] = (0, 0)
    resized_size: tuple[int, int] = (0, 0)
    train_resolution: tuple[int, int] | None = None  # the bucket, where a metadata file has fixed it
    conditioning_path: Path | None = None
    latents_path: Path | None = None  # cache file on disk
    latents: Any = None  # cache.CachedLatents when kept in memory
    text_outputs_path: Path | None = None
    text_outputs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Batch:
    """One training batch; B samples of one bucket. All sizes are pixels unless said otherwise."""

    captions: list[str]
    loss_weights: Tensor  # float32 [B]
    original_sizes_hw: Tensor  # int64 [B,2]
    crop_top_lefts: Tensor  # int64 [B,2]
    target_sizes_hw: Tensor  # int64 [B,2]
    network_multipliers: Tensor  # float32 [B]; stays on the CPU
    image_keys: list[str]
    flippeds: list[bool] = field(default_factory=list)
    custom_attributes: list[dict[str, Any]] = field(default_factory=list)
    images: Tensor | None = None  # float32 [B,3,H,W] in [-1,1]; None when latents are cached
    latents: Tensor | None = None  # [B,C,h,w] as cached (LatentSpec.cache_is_scaled)
    tokens: dict[str, Tensor] | None = None  # the family's tokenizer output, first dimension B
    text_outputs: dict[str, Tensor] | None = None  # cached text-encoder outputs, first dimension B
    alpha_masks: Tensor | None = None  # float32 [B,H,W] in [0,1]
    conditioning_images: Tensor | None = None  # float32 [B,3,H,W] in [-1,1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(value: Any) -> Any:
            if hasattr(value, "to"):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {name: move(item) for name, item in value.items()}
            return value

        return self._with_tensors(move)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for copies to a GPU beside the computation."""

        def pin(value: Any) -> Any:
            if hasattr(value, "pin_memory"):
                return value.pin_memory()
            if isinstance(value, dict):
                return {name: pin(item) for name, item in value.items()}
            return value

        return self._with_tensors(pin)

    def _with_tensors(self, change: Callable[[Any], Any]) -> Batch:
        names = (f.name for f in fields(self) if f.name != "network_multipliers")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def select(self, rows: Tensor) -> Batch:
        """The samples at `rows` (int64 [n]) of every field."""
        indices = rows.tolist()

        def pick(value: Any) -> Any:
            if isinstance(value, list):
                return [value[i] for i in indices] if value else value
            if isinstance(value, dict):
                return {name: pick(item) for name, item in value.items()}
            return value if value is None else value[rows]

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.captions)
