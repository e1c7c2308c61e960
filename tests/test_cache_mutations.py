"""Over a thousand seeded mutations of cache files and of what they were made from: all are found and made anew.

After every mutation the batches must hold exactly what the encoders give for the images and captions as they are now.
Half of the mutations of files happen before a start, half while a run trains.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.cache import CacheOptions, cache_latents, remake_latents
from library.data.dataset import DatasetGroup
from library.data.loader import BatchLoader
from library.data.records import Batch, LatentSpec, TextCacheSpec
from library.data.text_cache import TextCacheOptions, cache_text_outputs, remake_text_outputs
from tests.picture_folder import dataset_config, group_of, records_of

pytestmark = pytest.mark.slow  # long in all; `--quick` leaves it out

MUTATIONS_PER_KIND = 105
SIZES = ((64, 64), (64, 64), (128, 64), (70, 130))


# --- what is cached -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """What a mutation may change besides files; everything that the cached values depend on."""

    resolution: int = 64
    second_resolution: int | None = None
    interpolation: str | None = None
    flip: bool = False
    mask: bool = False
    prefix: str | None = None
    encoder: int = 1  # which VAE or text encoders


class Kind:
    """One kind of cache: how it is filled, remade, and what batches must then hold."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def group(self, folder: Path, settings: Settings) -> DatasetGroup:
        """The datasets over the pictures of `folder`."""
        subset = SubsetConfig(
            flip_aug=settings.flip, alpha_mask=settings.mask, resize_interpolation=settings.interpolation,
            caption_prefix=settings.prefix,
        )
        sizes = [settings.resolution, *([settings.second_resolution] if settings.second_resolution else [])]
        captions = {path: path.with_suffix(".txt").read_text("utf-8") for path in sorted(folder.glob("*.png"))}
        datasets = []
        for size in sizes:
            records = [record for path in captions for record in records_of([path], caption=captions[path])]
            config = dataset_config(
                subset, resolution=(size, size), min_bucket_reso=32, max_bucket_reso=256, bucket_reso_steps=32
            )
            datasets.append((config, records))
        return group_of(*datasets, spec=self.spec)

    spec = LatentSpec(4, 8, 32, 1.0, 0.0, "_sd.npz")

    def fill(self, group: DatasetGroup, settings: Settings) -> int:
        """Fill the caches; returns how many entries were made."""
        raise NotImplementedError

    def remake(self, group: DatasetGroup, settings: Settings) -> Callable[[Path], bool]:
        """What a run calls for a spoilt file."""
        raise NotImplementedError

    def check(self, group: DatasetGroup, batch: Batch, settings: Settings) -> None:
        """Assert that the batch is what the encoders give now."""
        raise NotImplementedError


def encode_latents(images: Tensor, channels: int, encoder: int) -> Tensor:
    """Stands in for a VAE: different for other pixels, mirrored pixels and other encoders."""
    sampled = images[..., 3::8, 3::8].float()
    repeated = sampled.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
    return repeated * torch.arange(1, channels + 1)[None, :, None, None] * encoder


class Latents(Kind):
    def __init__(self, spec: LatentSpec, **settings: Any) -> None:
        super().__init__(Settings(**settings))
        self.spec = spec

    def _encode(self, settings: Settings) -> Callable[[Tensor], Tensor]:
        return lambda images: encode_latents(images, self.spec.channels, settings.encoder)

    def fill(self, group: DatasetGroup, settings: Settings) -> int:
        options = CacheOptions(to_disk=True, vae_batch_size=2, vae_identity=f"vae-{settings.encoder}")
        return cache_latents(group, self._encode(settings), spec=self.spec, options=options).encoded

    def remake(self, group: DatasetGroup, settings: Settings) -> Callable[[Path], bool]:
        return lambda path: remake_latents(group, path, self._encode(settings), device="cpu")

    def check(self, group: DatasetGroup, batch: Batch, settings: Settings) -> None:
        assert batch.latents is not None and batch.images is None
        for row, key in enumerate(batch.image_keys):
            dataset = next(d for d in group.datasets if self._bucket(d, key) == self._hw(batch))
            record = next(r for r in dataset.records if r.key == key)
            pixels = dataset.sample_maker.pixels(record)
            image = torch.from_numpy(pixels[..., :3].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            image = image.flip(-1) if batch.flippeds[row] else image
            wanted = self._encode(settings)(image)[0]
            assert torch.allclose(batch.latents[row], wanted, atol=1e-4)
            assert batch.original_sizes_hw[row].tolist() == list(record.image_size[::-1])
            if settings.mask:
                mask = torch.from_numpy(pixels[..., 3].astype(np.float32) / 255)
                assert batch.alpha_masks is not None
                assert torch.allclose(batch.alpha_masks[row], mask.flip(-1) if batch.flippeds[row] else mask)
        assert settings.mask or batch.alpha_masks is None

    def _bucket(self, dataset: Any, key: str) -> tuple[int, int]:
        width, height = next(r.bucket_size for r in dataset.records if r.key == key)
        return height // self.spec.downsample, width // self.spec.downsample

    def _hw(self, batch: Batch) -> tuple[int, ...]:
        assert batch.latents is not None
        return tuple(batch.latents.shape[2:])


class Texts(Kind):
    def __init__(self, text: TextCacheSpec) -> None:
        super().__init__()
        self.text = text

    def _encode(self, settings: Settings) -> Callable[[Sequence[str]], dict[str, Tensor]]:
        return lambda captions: encode_texts(captions, self.text, settings.encoder)

    def fill(self, group: DatasetGroup, settings: Settings) -> int:
        options = TextCacheOptions(to_disk=True, encoders=f"encoders-{settings.encoder}")
        return cache_text_outputs(group, self._encode(settings), spec=self.text, options=options).encoded

    def remake(self, group: DatasetGroup, settings: Settings) -> Callable[[Path], bool]:
        return lambda path: remake_text_outputs(group, path, self._encode(settings))

    def check(self, group: DatasetGroup, batch: Batch, settings: Settings) -> None:
        for row, key in enumerate(batch.image_keys):
            caption = Path(key).with_suffix(".txt").read_text("utf-8")
            caption = f"{settings.prefix} {caption}" if settings.prefix else caption
            wanted = encode_texts([caption], self.text, settings.encoder)
            assert batch.captions[row] == caption and batch.text_outputs is not None
            for name in self.text.arrays:
                assert torch.equal(batch.text_outputs[name][row], wanted[name][0].float()), name


def encode_texts(captions: Sequence[str], spec: TextCacheSpec, encoder: int) -> dict[str, Tensor]:
    """Stands in for text encoders: numbers that follow from the caption."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in spec.arrays}
    for caption in captions:
        rng = np.random.default_rng([encoder, *caption.encode()])
        for name in spec.arrays:
            length = spec.lengths.get(name)
            if "mask" in name:
                outputs[name].append(torch.from_numpy(rng.integers(0, 2, length or 8)))
            else:
                shape = (length, 6) if length else (6,)
                outputs[name].append(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))
    return {name: torch.stack(rows) for name, rows in outputs.items()}


KINDS: dict[str, Callable[[], Kind]] = {
    "latents SD": lambda: Latents(LatentSpec(4, 8, 32, 0.18215, 0.0, "_sd.npz")),
    "latents SDXL, flipped": lambda: Latents(LatentSpec(4, 8, 32, 0.13025, 0.0, "_sdxl.npz"), flip=True),
    "latents SD3, flipped, masks": lambda: Latents(
        LatentSpec(16, 8, 8, 1.5305, 0.0609, "_sd3.npz", cache_keys_have_size=True), flip=True, mask=True
    ),
    "latents FLUX": lambda: Latents(
        LatentSpec(16, 8, 32, 0.3611, 0.1159, "_flux.npz", cache_keys_have_size=True, cache_is_scaled=True)
    ),
    "latents SD, masks": lambda: Latents(LatentSpec(4, 8, 32, 0.18215, 0.0, "_sd.npz"), mask=True),
    "latents SDXL, two sizes": lambda: Latents(
        LatentSpec(4, 8, 32, 0.13025, 0.0, "_sdxl.npz"), second_resolution=96, flip=True
    ),
    "latents FLUX, two sizes, masks": lambda: Latents(
        LatentSpec(16, 8, 32, 0.3611, 0.1159, "_flux.npz", cache_keys_have_size=True, cache_is_scaled=True),
        second_resolution=96, mask=True,
    ),
    "texts SDXL": lambda: Texts(
        TextCacheSpec("_te_outputs.npz", ("hidden_state1", "hidden_state2", "pool2"),
                      lengths={"hidden_state1": 7, "hidden_state2": 7})
    ),
    "texts FLUX": lambda: Texts(
        TextCacheSpec("_flux_te.npz", ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask"), {"apply_t5_attn_mask": True},
                      dict.fromkeys(("t5_out", "txt_ids", "t5_attn_mask"), 9))
    ),
    "texts SD3": lambda: Texts(
        TextCacheSpec(
            "_sd3_te.npz", ("lg_out", "t5_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"),
            {"apply_lg_attn_mask": False, "apply_t5_attn_mask": True}, {"lg_out": 7, "t5_out": 9},
        )
    ),
}  # fmt: skip


# --- mutations ------------------------------------------------------------------------------------------------
@dataclass
class State:
    """A folder with pictures and caches, and the settings of the run that comes."""

    folder: Path
    settings: Settings
    rng: random.Random

    def caches(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def any_cache(self) -> Path:
        return self.rng.choice(self.caches())

    def any_picture(self) -> Path:
        return self.rng.choice(sorted(self.folder.glob("*.png")))


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    change(arrays)
    with open(path, "wb") as target:
        np.savez(target, **arrays)  # type: ignore[arg-type]


def truncate(state: State) -> None:
    path = state.any_cache()
    content = path.read_bytes()
    path.write_bytes(content[: state.rng.randrange(len(content))])


def flip_bytes(state: State) -> None:
    path = state.any_cache()
    content = bytearray(path.read_bytes())
    for _ in range(state.rng.choice((1, 1, 8))):
        content[state.rng.randrange(len(content))] ^= 1 << state.rng.randrange(8)
    path.write_bytes(content)


def overwrite_part(state: State) -> None:
    path = state.any_cache()
    content = bytearray(path.read_bytes())
    start, length = state.rng.randrange(len(content)), state.rng.randrange(1, 400)
    content[start : start + length] = state.rng.randbytes(len(content[start : start + length]))
    path.write_bytes(content)


def empty(state: State) -> None:
    state.any_cache().write_bytes(b"")


def remove(state: State) -> None:
    state.any_cache().unlink()


def swap_files(state: State) -> None:
    first, second = state.rng.sample(state.caches(), 2)
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content)
    second.write_bytes(first_content)


def _any_key(state: State, arrays: dict[str, np.ndarray]) -> str:
    return state.rng.choice([key for key in sorted(arrays) if not key.startswith("identity")])


def other_values(state: State) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        key = _any_key(state, arrays)
        arrays[key] = ~arrays[key] if arrays[key].dtype == bool else arrays[key] + 1

    rewrite(state.any_cache(), change)


def other_dtype(state: State) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        key = _any_key(state, arrays)
        arrays[key] = arrays[key].astype(state.rng.choice((np.float16, np.int16, np.float64)))

    rewrite(state.any_cache(), change)


def other_shape(state: State) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        key = _any_key(state, arrays)
        arrays[key] = arrays[key][..., None] if state.rng.random() < 0.5 else np.concatenate([arrays[key].ravel()] * 2)

    rewrite(state.any_cache(), change)


def swap_arrays(state: State) -> None:
    """Arrays of one file in each other's place: orientations, sizes, encoders."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        first, second = state.rng.sample(sorted(arrays), 2)
        arrays[first], arrays[second] = arrays[second], arrays[first]

    rewrite(state.any_cache(), change)


def foreign_identity(state: State) -> None:
    """Good arrays with the record of another file's, or good arrays of another file with the record of this one."""
    first, second = state.rng.sample(state.caches(), 2)
    with np.load(second) as file:
        others = {key: file[key] for key in file.files}

    def change(arrays: dict[str, np.ndarray]) -> None:
        for key in arrays:
            if key.startswith("identity") and key in others:
                arrays[key] = others[key]

    rewrite(first, change)


def missing_array(state: State) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays[_any_key(state, arrays)]

    rewrite(state.any_cache(), change)


def edit_picture(state: State) -> None:
    path = state.any_picture()
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[:32, :32] = 255 - pixels[:32, :32]
    Image.fromarray(pixels).save(path)


def edit_caption(state: State) -> None:
    path = state.any_picture().with_suffix(".txt")
    path.write_text(path.read_text("utf-8") + f" {state.rng.random()}", encoding="utf-8")


def other_encoder(state: State) -> None:
    state.settings = replace(state.settings, encoder=state.rng.randrange(2, 9))


def other_resolution(state: State) -> None:
    state.settings = replace(state.settings, resolution=state.rng.choice((96, 128)), second_resolution=None)


def other_crop(state: State) -> None:
    """The same bucket, cut from another part: the picture is rotated, so its resized size is another one."""
    path = state.any_picture()
    with Image.open(path) as image:
        image.load()
        turned = image.transpose(Image.Transpose.ROTATE_180).resize((image.width + 6, image.height))
    turned.save(path)


def other_interpolation(state: State) -> None:
    state.settings = replace(state.settings, interpolation=state.rng.choice(("lanczos", "nearest", "box")))


def toggle_flip(state: State) -> None:
    state.settings = replace(state.settings, flip=not state.settings.flip)


def toggle_mask(state: State) -> None:
    state.settings = replace(state.settings, mask=not state.settings.mask)


def other_prefix(state: State) -> None:
    state.settings = replace(state.settings, prefix=f"photo {state.rng.randrange(99)},")


Mutation = Callable[[State], None]
OF_FILES: tuple[Mutation, ...] = (
    truncate, flip_bytes, flip_bytes, flip_bytes, overwrite_part, empty, remove, swap_files, other_values, other_dtype,
    other_shape, swap_arrays, foreign_identity, missing_array,
)  # fmt: skip
OF_LATENTS: tuple[Mutation, ...] = (
    edit_picture, other_encoder, other_resolution, other_crop, other_interpolation, toggle_flip, toggle_mask
)  # fmt: skip
OF_TEXTS: tuple[Mutation, ...] = (edit_caption, other_encoder, other_prefix)


# --- the test -------------------------------------------------------------------------------------------------
def save_folder(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).save(folder / f"a{index}.png")
        (folder / f"a{index}.txt").write_text(f"caption {index}", encoding="utf-8")


def run_epochs(kind: Kind, group: DatasetGroup, settings: Settings, epochs: Sequence[int]) -> Iterator[Batch]:
    loader = BatchLoader(group, remake=kind.remake(group, settings))
    for epoch in epochs:
        yield from loader.epoch(epoch)


@pytest.mark.parametrize("name", KINDS)
def test_mutations_are_never_used(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, done = KINDS[name](), Counter[str]()
    original = tmp_path / "original"
    save_folder(original)
    kind.fill(kind.group(original, kind.settings), kind.settings)
    own = OF_TEXTS if isinstance(kind, Texts) else OF_LATENTS
    used_silently: list[str] = []
    for number in range(MUTATIONS_PER_KIND):
        rng = random.Random(f"{name} {number}")
        mutate = rng.choice(OF_FILES if rng.random() < 0.6 else own)
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        state = State(folder, kind.settings, rng)
        in_training = mutate in OF_FILES and number % 2 == 1
        if in_training:
            group = kind.group(folder, state.settings)
            kind.fill(group, state.settings)
            mutate(state)
        else:
            mutate(state)
            group = kind.group(folder, state.settings)
            kind.fill(group, state.settings)
        try:
            for batch in run_epochs(kind, group, state.settings, (1, 2) if state.settings.flip else (1,)):
                kind.check(group, batch, state.settings)
        except AssertionError as error:
            used_silently.append(f"{mutate.__name__} {number}: {error}")
        done[mutate.__name__] += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{name}: {done.total()} mutations of {len(done)} kinds, {len(used_silently)} used silently")
    assert used_silently == []


def test_there_are_more_than_a_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    count = MUTATIONS_PER_KIND * len(KINDS)
    with capsys.disabled():
        print(f"\ncache mutations in all: {count}")
    assert count >= 1000
