"""Latent caches: round trips, what makes an entry stale, damage, interrupted writes, foreign files, refusals."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.buckets import crop_ltrb
from library.data.cache import CacheOptions, CacheReport, cache_latents
from library.data.cache_files import cache_path, read
from library.data.dataset import DatasetGroup
from library.data.npz_files import CacheError
from library.data.records import BatchRequest, ImageRecord, LatentSpec
from library.options.errors import UserError
from tests.picture_folder import SIZED_SPEC, SPEC, dataset_config, encode, group_of, records_of, save_pictures

DISK = CacheOptions(to_disk=True, vae_batch_size=2, vae_identity="vae-1")
MEMORY = CacheOptions(vae_batch_size=2)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return save_pictures(tmp_path)


def group(pictures: list[Path], subset: SubsetConfig | None = None, spec: LatentSpec = SPEC, **dataset: object):
    return group_of((dataset_config(subset, **dataset), records_of(pictures)), spec=spec)


def cache(target: DatasetGroup, options: CacheOptions = DISK, **settings: object) -> CacheReport:
    return cache_latents(target, settings.pop("encode", encode), spec=target.spec, options=options, **settings)


def counts(report: CacheReport) -> tuple[int, int, int]:
    return report.encoded, report.reused, report.remade


def batches(target: DatasetGroup, epoch: int = 1) -> Iterator[object]:
    return (target[BatchRequest(epoch, index, 0)] for index in range(len(target)))


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def expected_latents(target: DatasetGroup, record: ImageRecord, *, flipped: bool = False) -> Tensor:
    """What the uncached path would encode for a record."""
    pixels = target.datasets[0].sample_maker.pixels(record)[..., :3].astype(np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    return encode(image.flip(-1) if flipped else image)[0]


# --- round trips ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
@pytest.mark.parametrize("spec", [SPEC, SIZED_SPEC], ids=["plain keys", "sized keys"])
def test_cached_batches_hold_what_the_encoder_made(
    pictures: list[Path], options: CacheOptions, spec: LatentSpec
) -> None:
    target = group(pictures, SubsetConfig(flip_aug=True), spec)
    uncached = [batch for epoch in (1, 2, 3) for batch in batches(target, epoch)]
    assert counts(cache(target, options)) == (5, 0, 0)
    cached = [batch for epoch in (1, 2, 3) for batch in batches(target, epoch)]
    flips = set()
    for before, after in zip(uncached, cached, strict=True):
        assert after.images is None
        assert torch.allclose(after.latents, encode(before.images), atol=1e-5)
        for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            assert torch.equal(getattr(after, name), getattr(before, name))
        assert after.flippeds == before.flippeds and after.captions == before.captions
        flips |= set(after.flippeds)
    assert flips == {True, False}


def one_sided(images: Tensor) -> Tensor:
    """A convolution that is not its own mirror image: what it makes of a mirrored picture is no mirrored latent."""
    kernel = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.conv2d(images.float(), kernel, stride=8)


@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
def test_a_mirrored_picture_is_encoded_mirrored_not_its_latents(pictures: list[Path], options: CacheOptions) -> None:
    target = group(pictures[:1], SubsetConfig(flip_aug=True))
    pixels = target.datasets[0].sample_maker.pixels(target.datasets[0].records[0])[..., :3].astype(np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    cache(target, options, encode=one_sided)
    seen = set()
    for epoch in range(1, 12):
        [batch] = batches(target, epoch)
        wanted = one_sided(image.flip(-1) if batch.flippeds[0] else image)
        assert torch.allclose(batch.latents, wanted, atol=1e-4)
        seen.add(batch.flippeds[0])
    assert seen == {True, False}


def test_file_name_keys_and_types(pictures: list[Path]) -> None:
    target = group(pictures[2:3], SubsetConfig(flip_aug=True, alpha_mask=True))
    cache(target)
    path = pictures[2].with_name("a2_0200x0220_sd.npz")
    stored = arrays_in(path)
    assert set(stored) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask", "identity"}
    assert stored["latents"].dtype == np.float32 and stored["latents"].shape == (4, 16, 16)
    assert stored["alpha_mask"].shape == (128, 128) and stored["alpha_mask"].dtype == np.float32
    assert stored["original_size"].tolist() == [200, 220]
    assert stored["crop_ltrb"].dtype == np.float64
    assert stored["crop_ltrb"].tolist() == list(crop_ltrb((200, 220), (128, 128)))
    identity = json.loads(stored["identity"].tobytes())
    assert identity["file_size"] == pictures[2].stat().st_size and identity["vae"] == "vae-1"


def test_sized_keys_name_the_latent_size(pictures: list[Path]) -> None:
    cache(group(pictures[3:4], spec=SIZED_SPEC))
    assert "latents_8x32" in arrays_in(pictures[3].with_name("a3_0256x0064_sd3.npz"))


def test_mask_is_cached_unflipped_and_mirrored_with_the_sample(tmp_path: Path) -> None:
    pixels = np.full((128, 128, 4), 255, np.uint8)
    pixels[:, :32, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "a.png")
    target = group([tmp_path / "a.png"], SubsetConfig(flip_aug=True, alpha_mask=True))
    for options in (DISK, MEMORY):
        cache(target, options)
        seen = {}
        for epoch in range(1, 20):
            (batch,) = batches(target, epoch)
            seen[batch.flippeds[0]] = batch.alpha_masks[0, 0]
        assert seen[False][0] == pytest.approx(0.2) and seen[False][-1] == 1
        assert torch.equal(seen[True], seen[False].flip(0))
        target = group([tmp_path / "a.png"], SubsetConfig(flip_aug=True, alpha_mask=True))


def test_memory_keeps_the_encoder_dtype(pictures: list[Path]) -> None:
    target = group(pictures)
    cache(target, MEMORY, encode=lambda images: encode(images).to(torch.bfloat16), dtype=torch.bfloat16)
    assert all(batch.latents.dtype == torch.bfloat16 for batch in batches(target))


def test_images_are_encoded_in_order_of_area_and_shape_in_full_batches(tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, [(128, 64), (64, 128), (128, 64), (64, 64), (64, 128)])
    shapes = []

    def recorded(images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return encode(images)

    cache(group(paths, max_bucket_reso=128, resolution=(96, 96)), MEMORY, encode=recorded)
    assert shapes == [(1, 3, 64, 64), (2, 3, 128, 64), (2, 3, 64, 128)]


# --- what is reused and what is made anew ---------------------------------------------------------------------
def test_second_run_reuses_everything(pictures: list[Path]) -> None:
    cache(group(pictures))
    second = group(pictures)
    assert counts(cache(second)) == (0, 5, 0)
    assert sum(batch.latents.shape[0] for batch in batches(second)) == 5


def test_edited_image_is_encoded_again(pictures: list[Path]) -> None:
    cache(group(pictures))
    Image.new("RGB", (160, 150), "red").save(pictures[1])
    target = group(pictures)
    assert counts(cache(target)) == (1, 4, 1)
    record = target.datasets[0].records[1]
    sample = read(target.datasets[0].sample_maker.latent_entry(record, record.latents_path), is_flipped=False)
    assert torch.allclose(sample.latents, expected_latents(target, record), atol=1e-5)


def test_edit_of_equal_length_is_noticed_by_time_and_content(pictures: list[Path]) -> None:
    bitmap = pictures[0].with_suffix(".bmp")
    Image.new("RGB", (128, 128), "red").save(bitmap)
    cache(group([bitmap]))
    size = bitmap.stat().st_size
    Image.new("RGB", (128, 128), "blue").save(bitmap)
    os.utime(bitmap, ns=(1, 1))
    assert bitmap.stat().st_size == size
    assert counts(cache(group([bitmap]))) == (1, 0, 1)


def test_new_time_with_equal_content_is_no_change(pictures: list[Path]) -> None:
    cache(group(pictures))
    for path in pictures:
        os.utime(path, ns=(1, 1))
    assert counts(cache(group(pictures))) == (0, 5, 0)


@pytest.mark.parametrize("change", ["vae", "interpolation", "flip", "mask"])
def test_changed_settings_make_entries_anew(pictures: list[Path], change: str) -> None:
    cache(group(pictures))
    options = replace(DISK, vae_identity="vae-2") if change == "vae" else DISK
    subset = {
        "vae": SubsetConfig(), "interpolation": SubsetConfig(resize_interpolation="lanczos"),
        "flip": SubsetConfig(flip_aug=True), "mask": SubsetConfig(alpha_mask=True),
    }[change]
    assert counts(cache(group(pictures, subset), options)) == (5, 0, 5)
    assert counts(cache(group(pictures, subset), options)) == (0, 5, 0)


def test_surplus_flip_and_mask_are_accepted_and_the_mask_is_not_used(pictures: list[Path]) -> None:
    cache(group(pictures, SubsetConfig(flip_aug=True, alpha_mask=True)))
    plain = group(pictures)
    assert counts(cache(plain)) == (0, 5, 0)
    assert all(batch.alpha_masks is None for batch in batches(plain))


@pytest.mark.parametrize("change", ["image", "filter"])
def test_rewriting_drops_the_old_arrays_of_the_same_size(pictures: list[Path], change: str) -> None:
    cache(group(pictures[:1], SubsetConfig(flip_aug=True, alpha_mask=True)))
    if change == "image":
        Image.new("RGB", (128, 128), "red").save(pictures[0])
    cache(group(pictures[:1], SubsetConfig(resize_interpolation="box" if change == "filter" else None)))
    stored = arrays_in(cache_path(pictures[0], (128, 128), "_sd.npz"))
    assert set(stored) == {"latents", "original_size", "crop_ltrb", "identity"}


@pytest.mark.parametrize("spec", [SPEC, SIZED_SPEC], ids=["plain keys", "sized keys"])
def test_two_resolutions_live_in_one_file(pictures: list[Path], spec: LatentSpec) -> None:
    def both() -> DatasetGroup:
        small, large = dataset_config(), dataset_config(resolution=(256, 256), max_bucket_reso=512)
        return group_of((small, records_of(pictures)), (large, records_of(pictures)), spec=spec)

    for expected in ((10, 0, 0), (0, 10, 0)):
        target = both()
        assert counts(cache(target)) == expected
        for batch in batches(target):
            assert batch.latents.shape[2:] == tuple(side // 8 for side in batch.target_sizes_hw[0].tolist())
    stored = arrays_in(cache_path(pictures[0], (128, 128), spec.cache_suffix))
    first = "latents" if spec is SPEC else "latents_16x16"
    assert stored[first].shape == (4, 16, 16) and stored["latents_32x32"].shape == (4, 32, 32)


def test_editing_the_image_removes_its_entries_of_other_sizes(pictures: list[Path]) -> None:
    cache(group(pictures[:1]))
    cache(group(pictures[:1], resolution=(256, 256)))
    Image.new("RGB", (128, 128), "red").save(pictures[0])
    cache(group(pictures[:1], resolution=(256, 256)))
    assert "latents_16x16" not in (stored := arrays_in(cache_path(pictures[0], (128, 128), "_sd.npz")))
    assert [value.shape for key, value in stored.items() if key.startswith("latents")] == [(4, 32, 32)]


def test_one_image_in_two_datasets_of_equal_size_is_encoded_once(pictures: list[Path]) -> None:
    plain, flipping = dataset_config(), dataset_config(SubsetConfig(flip_aug=True, alpha_mask=True))
    target = group_of((plain, records_of(pictures)), (flipping, records_of(pictures)))
    assert counts(cache(target)) == (5, 0, 0)
    assert "latents_flipped" in (stored := arrays_in(cache_path(pictures[0], (128, 128), "_sd.npz")))
    assert "alpha_mask" in stored


def test_two_images_with_one_cache_name_are_refused(tmp_path: Path) -> None:
    (png,) = save_pictures(tmp_path, [(128, 128)])
    Image.new("RGB", (128, 128)).save(jpg := png.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"a0\.png and .*a0\.jpg would share"):
        cache(group([png, jpg]))
    assert counts(cache(group([png, jpg]), MEMORY)) == (2, 0, 0)


# --- damage ---------------------------------------------------------------------------------------------------
def test_truncated_and_empty_files_are_made_anew(pictures: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    cache(group(pictures))
    first = cache_path(pictures[0], (128, 128), "_sd.npz")
    first.write_bytes(first.read_bytes()[:300])
    second = cache_path(pictures[3], (256, 64), "_sd.npz")
    second.write_bytes(b"")
    target = group(pictures)
    with caplog.at_level(logging.WARNING):
        assert counts(cache(target)) == (2, 3, 2)
    assert first.name in caplog.text and second.name in caplog.text
    assert sum(len(batch) for batch in batches(target)) == 5


def test_changed_bytes_are_never_used(pictures: list[Path]) -> None:
    target = group(pictures[:1])
    cache(target)
    path = cache_path(pictures[0], (128, 128), "_sd.npz")
    stored = arrays_in(path)
    stored["latents"][0, 0, 0] += 1
    np.savez(path, **stored)
    with pytest.raises(CacheError, match=r"a0_0128x0128_sd\.npz.*`latents` does not match its checksum"):
        list(batches(target))
    path.unlink()
    assert counts(cache(group(pictures[:1]))) == (1, 0, 0)


def test_kill_before_the_rename_leaves_the_old_entry_and_the_next_write_succeeds(pictures: list[Path]) -> None:
    cache(group(pictures[:1]))
    path = cache_path(pictures[0], (128, 128), "_sd.npz")
    before = path.read_bytes()
    leftover, busy = path.with_name(f".{path.name}.1.tmp"), path.with_name(f".{path.name}.2.tmp")
    leftover.write_bytes(before[:100])
    os.utime(leftover, ns=(1, 1))
    busy.write_bytes(before[:100])  # another process may be at it
    assert counts(cache(group(pictures[:1]))) == (0, 1, 0)
    assert path.read_bytes() == before
    Image.new("RGB", (128, 128), "red").save(pictures[0])
    target = group(pictures[:1])
    assert counts(cache(target)) == (1, 0, 1)
    assert len(list(batches(target))) == 1
    assert not leftover.exists() and busy.exists()


def test_failing_write_leaves_the_old_entry(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache(group(pictures[:1]))
    path = cache_path(pictures[0], (128, 128), "_sd.npz")
    before = path.read_bytes()
    Image.new("RGB", (128, 128), "red").save(pictures[0])

    def full_disk(file: object, **arrays: np.ndarray) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        cache(group(pictures[:1]))
    assert path.read_bytes() == before


def test_nan_latents_are_refused_with_the_image_name(pictures: list[Path]) -> None:
    def broken(images: Tensor) -> Tensor:
        return encode(images) * float("nan")

    with pytest.raises(UserError, match=r"a\d\.png.*NaN.*--no_half_vae"):
        cache(group(pictures), MEMORY, encode=broken)


def test_all_unreadable_images_are_listed_at_once(pictures: list[Path]) -> None:
    target = group(pictures)
    for path in pictures[1:3]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        cache(target, MEMORY)
    assert "a1.png" in str(caught.value) and "a2.png" in str(caught.value) and "a0.png" not in str(caught.value)


# --- files of other programs ----------------------------------------------------------------------------------
def write_reference_file(path: Path, shape: tuple[int, ...], image_size: tuple[int, int], ending: str = "") -> None:
    bucket = shape[2] * 8, shape[1] * 8
    np.savez(
        path, **{
            f"latents{ending}": np.full(shape, 0.5, np.float32), f"original_size{ending}": np.array(image_size),
            f"crop_ltrb{ending}": np.array(crop_ltrb(image_size, bucket)),
        },
    )


@pytest.mark.parametrize(("spec", "ending"), [(SPEC, ""), (SIZED_SPEC, "_16x16")])
def test_reference_file_is_used_when_it_fits_with_one_message(
    pictures: list[Path], spec: LatentSpec, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path, size in ((pictures[0], (128, 128)), (pictures[1], (160, 150))):
        write_reference_file(cache_path(path, size, spec.cache_suffix), (4, 16, 16), size, ending)
    target = group(pictures[:2], spec=spec)
    with caplog.at_level(logging.WARNING):
        report = cache(target)
    assert counts(report) == (0, 2, 0) and report.unverified == 2
    assert len(caplog.records) == 1 and "do not say what they were made from" in caplog.text
    (batch,) = batches(target)
    assert (batch.latents == 0.5).all()


@pytest.mark.parametrize("wrong", ["shape", "image size", "flip"])
def test_reference_file_that_does_not_fit_is_made_anew(pictures: list[Path], wrong: str) -> None:
    path = cache_path(pictures[0], (128, 128), "_sd.npz")
    shape = (16, 16, 16) if wrong == "shape" else (4, 16, 16)
    write_reference_file(path, shape, (120, 128) if wrong == "image size" else (128, 128))
    subset = SubsetConfig(flip_aug=wrong == "flip")
    assert cache(group(pictures[:1], subset)).encoded == 1
    assert counts(cache(group(pictures[:1], subset))) == (0, 1, 0)


def test_plain_entry_of_another_size_is_kept_beside_the_new_one(pictures: list[Path]) -> None:
    path = cache_path(pictures[0], (128, 128), "_sd.npz")
    write_reference_file(path, (4, 32, 32), (128, 128))
    target = group(pictures[:1])
    cache(target)
    stored = arrays_in(path)
    assert stored["latents"].shape == (4, 32, 32) and stored["latents_16x16"].shape == (4, 16, 16)
    (batch,) = batches(target)
    assert torch.allclose(batch.latents[0], expected_latents(target, target.datasets[0].records[0]), atol=1e-5)


def test_oldest_file_name_is_read_but_not_written(pictures: list[Path]) -> None:
    legacy = pictures[0].with_suffix(".npz")
    write_reference_file(legacy, (4, 16, 16), (128, 128))
    before = legacy.read_bytes()
    target = group(pictures[:1])
    assert counts(cache(target)) == (0, 1, 0)
    (batch,) = batches(target)
    assert (batch.latents == 0.5).all()
    assert counts(cache(group(pictures[:1], SubsetConfig(flip_aug=True)))) == (1, 0, 0)
    assert legacy.read_bytes() == before


def test_cache_without_an_image_trains_and_its_loss_of_fit_is_an_error(pictures: list[Path]) -> None:
    cache(group(pictures[:1]))
    records = records_of(pictures[:1], latents_path=cache_path(pictures[0], (128, 128), "_sd.npz"))
    pictures[0].unlink()
    target = group_of((dataset_config(), records))
    assert counts(cache(target)) == (0, 1, 0)
    assert len(list(batches(target))) == 1
    large = group_of((dataset_config(resolution=(256, 256)), records))
    with pytest.raises(CacheError, match="does not fit.*its image is missing"):
        cache(large)


# --- options --------------------------------------------------------------------------------------------------
def test_skip_check_accepts_unopened_and_a_missing_key_is_named_when_read(pictures: list[Path]) -> None:
    cache(group(pictures[:1]))
    target = group(pictures[:1], SubsetConfig(flip_aug=True))
    assert counts(cache(target, replace(DISK, skip_check=True, vae_identity="other"))) == (0, 1, 0)
    with pytest.raises(CacheError, match=r"a0_0128x0128_sd\.npz: .*latents_flipped missing"):
        for epoch in range(1, 20):
            list(batches(target, epoch))


@pytest.mark.parametrize(
    ("option", "value"), [("color_aug", True), ("random_crop", True), ("face_crop_aug_range", (1.0, 2.0))]
)
def test_changing_pixels_exclude_caching(pictures: list[Path], option: str, value: object) -> None:
    subset = SubsetConfig(**{option: value}, location="d.toml, datasets[0].subsets[0]")
    target = group_of((dataset_config(subset, enable_bucket=False), records_of(pictures)))
    with pytest.raises(UserError, match=rf"--cache_latents.*{option}.*d\.toml, datasets\[0\]\.subsets\[0\]"):
        cache(target, MEMORY)
    assert all(record.latents is None for record in target.datasets[0].records)


def test_processes_share_out_the_files(pictures: list[Path]) -> None:
    groups = [group(pictures) for _ in range(2)]
    reports = [cache(target, rank=rank, world_size=2) for rank, target in enumerate(groups)]
    assert [report.encoded for report in reports] == [3, 2]
    for target in groups:
        assert sum(len(batch) for batch in batches(target)) == 5


def test_only_the_first_process_shows_a_bar(pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for rank in (0, 1):
        cache(group(pictures), rank=rank, world_size=2)
        shown.append(capsys.readouterr().err)
    assert "caching latents: 100%" in shown[0] and shown[1] == ""


def test_vae_is_compared_only_when_the_run_names_one(pictures: list[Path]) -> None:
    cache(group(pictures[:1]), replace(DISK, vae_identity=""))
    assert counts(cache(group(pictures[:1]))) == (1, 0, 1)
    assert counts(cache(group(pictures[:1]), replace(DISK, vae_identity=""))) == (0, 1, 0)
