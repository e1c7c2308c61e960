"""From records to batches: order, repeats, reproducibility with workers and processes, and every batch value."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.dataset import DatasetGroup
from library.data.decode_check import check_images
from library.data.discovery import discover
from library.data.images import ImageError
from library.data.loader import BatchLoader, make_loader
from library.data.records import Batch, BatchRequest, ImageRecord
from library.options.errors import UserError
from tests.picture_folder import dataset_config, group_of, records_of, save_pictures

GOLDEN = Path(__file__).parent / "data" / "golden"
SIZE_VALUES = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
RANDOM = SubsetConfig(
    flip_aug=True, color_aug=True, random_crop=True, shuffle_caption=True, caption_tag_dropout_rate=0.3,
    caption_dropout_rate=0.1,
)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return save_pictures(tmp_path)


def random_group(pictures: list[Path], seed: int = 11) -> DatasetGroup:
    """Two datasets of different resolution and batch size with everything random switched on."""
    return group_of(
        (dataset_config(RANDOM), records_of(pictures, num_repeats=2)),
        (dataset_config(RANDOM, resolution=(64, 64), batch_size=3), records_of(pictures)),
        seed=seed,
    )


def bare_record(index: int, size: tuple[int, int], **settings: object) -> ImageRecord:
    defaults = {"key": f"k{index}", "path": None, "caption": "", "subset_index": 0, "image_size": size}
    return ImageRecord(**(defaults | settings))


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
        elif isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), field.name
        else:
            assert a == b, field.name


# --- order ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(st.sampled_from([(100, 100), (200, 100), (100, 300)]), st.integers(0, 4)), min_size=1),
    batch_size=st.integers(1, 5), epoch=st.integers(1, 50), seed=st.integers(0, 2**32),
)
def test_epoch_covers_every_image_exactly_its_repeats(
    images: list[tuple[tuple[int, int], int]], batch_size: int, epoch: int, seed: int
) -> None:
    records = [bare_record(i, size, num_repeats=repeats) for i, (size, repeats) in enumerate(images)]
    if not any(repeats for _, repeats in images):
        return
    group = group_of((dataset_config(batch_size=batch_size), records), seed=seed)
    plan = group.epoch_plan(epoch)
    assert len(plan) == len(group)
    served = Counter(key for _, keys in plan for key in keys)
    assert served == {record.key: record.num_repeats for record in records if record.num_repeats}
    buckets = {record.key: record.bucket_size for record in records}
    sizes = Counter()
    for _, keys in plan:
        assert len({buckets[key] for key in keys}) == 1 and 1 <= len(keys) <= batch_size
        sizes[buckets[keys[0]], len(keys) == batch_size] += 1
    assert all(sizes[bucket, False] <= 1 for bucket in set(buckets.values()))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def plan(seed: int, epoch: int) -> list[tuple[int, tuple[str, ...]]]:
        records = [bare_record(i, (100, 100 + 100 * (i % 2))) for i in range(12)]
        group = group_of((dataset_config(), records), (dataset_config(batch_size=3), records), seed=seed)
        group.epoch_plan(epoch + 3)
        random.seed(epoch)
        return group.epoch_plan(epoch)

    assert plan(1, 1) == plan(1, 1)
    assert len({tuple(plan(seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}) == 6
    mixed = [index for index, _ in plan(1, 1)]
    assert mixed != sorted(mixed)


def test_batches_are_cut_after_shuffling_so_neighbours_change() -> None:
    group = group_of((dataset_config(), [bare_record(i, (100, 100)) for i in range(20)]))
    pairs = {frozenset(keys) for epoch in range(1, 4) for _, keys in group.epoch_plan(epoch)}
    assert len(pairs) > 20


# --- reproducibility ------------------------------------------------------------------------------------------
def test_same_batches_with_any_number_of_workers(pictures: list[Path]) -> None:
    group = random_group(pictures)
    expected = [group[BatchRequest(epoch, index, index)] for epoch in (1, 2) for index in range(len(group))]
    assert len({tuple(batch.flippeds) for batch in expected}) > 1
    for workers in (0, 1, 2):
        loader = BatchLoader(random_group(pictures), num_workers=workers, persistent_workers=workers == 2)
        served = [batch for epoch in (1, 2) for batch in loader.epoch(epoch)]
        assert len(served) == len(expected)
        for one, other in zip(served, expected, strict=True):
            assert_equal(one, other)


def test_resuming_gives_the_identical_tail_and_loads_nothing_before_it(pictures: list[Path]) -> None:
    group = random_group(pictures)
    whole = list(BatchLoader(group, accumulation=2).epoch(3, first_step=7))
    first_keys = {key for _, keys in group.epoch_plan(3)[:2] for key in keys}
    later_keys = {key for _, keys in group.epoch_plan(3)[2:] for key in keys}
    for key in first_keys - later_keys:
        Path(key).unlink()
    tail = list(BatchLoader(random_group(pictures), accumulation=2).epoch(3, start=2, first_step=8))
    for one, other in zip(tail, whole[2:], strict=True):
        assert_equal(one, other)


def test_skipped_images_are_not_opened(pictures: list[Path]) -> None:
    group = group_of((dataset_config(batch_size=1), records_of(pictures)))
    plan = group.epoch_plan(1)
    Path(plan[0][1][0]).unlink()
    tail = list(BatchLoader(group).epoch(1, start=1))
    assert [batch.image_keys[0] for batch in tail] == [keys[0] for _, keys in plan[1:]]
    with pytest.raises(ImageError, match="does not exist"):
        next(BatchLoader(group).epoch(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(pictures: list[Path], workers: int) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(BatchLoader(random_group(pictures), num_workers=workers).epoch(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


def test_samples_are_augmented_independently_of_batch_neighbours(pictures: list[Path]) -> None:
    def flips(batch_size: int) -> list[tuple[str, bool]]:
        subset = SubsetConfig(flip_aug=True)
        group = group_of((dataset_config(subset, batch_size=batch_size), records_of(pictures[:3], num_repeats=4)))
        return sorted(
            (key, flipped) for batch in BatchLoader(group).epoch(1)
            for key, flipped in zip(batch.image_keys, batch.flippeds, strict=True)
        )

    assert flips(1) == flips(4)


def test_flip_rate_is_one_half(tmp_path: Path) -> None:
    (picture,) = save_pictures(tmp_path, [(8, 8)])
    config = dataset_config(SubsetConfig(flip_aug=True), resolution=(8, 8), enable_bucket=False, batch_size=1000)
    group = group_of((config, records_of([picture], num_repeats=1000)))
    (batch,) = BatchLoader(group).epoch(1)
    assert abs(sum(batch.flippeds) - 500) < 4 * 250**0.5


def test_group_can_travel_to_another_process(pictures: list[Path]) -> None:
    group = random_group(pictures)
    group.epoch_plan(1)
    copy = pickle.loads(pickle.dumps(group))
    assert_equal(copy[BatchRequest(2, 1, 0)], group[BatchRequest(2, 1, 0)])


# --- loader ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_get_equal_shares_that_cover_the_epoch(pictures: list[Path], world_size: int) -> None:
    group = group_of((dataset_config(batch_size=1), records_of(pictures)))
    plan = [keys[0] for _, keys in group.epoch_plan(1)]
    shares = [
        [batch.image_keys[0] for batch in make_loader(group, epoch=1, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    rounds = -(-len(plan) // world_size)
    assert [len(share) for share in shares] == [rounds] * world_size
    assert len(BatchLoader(group, world_size=world_size)) == rounds
    in_order = [share[position] for position in range(rounds) for share in shares]
    assert in_order == [plan[i % len(plan)] for i in range(rounds * world_size)]


def test_step_advances_with_accumulation(pictures: list[Path]) -> None:
    subset = SubsetConfig(token_warmup_step=4, token_warmup_min=1)
    group = group_of((dataset_config(subset, batch_size=1), records_of(pictures, num_repeats=2)))
    captions = [batch.captions[0] for batch in BatchLoader(group, accumulation=2).epoch(1, start=1, first_step=0)]
    assert [caption.count(",") + 1 for caption in captions] == [1, 1, 1, 1, 2, 2, 3, 3, 4]


def test_warmup_fraction_uses_max_train_steps(pictures: list[Path]) -> None:
    group = group_of((dataset_config(SubsetConfig(token_warmup_step=0.5), batch_size=1), records_of(pictures)))
    group.max_train_steps = 8
    assert group[BatchRequest(1, 0, 0)].captions[0].count(",") == 0
    assert group[BatchRequest(1, 0, 4)].captions[0].count(",") == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_batch_reaches_the_training_process_as_it_is(pictures: list[Path], workers: int) -> None:
    group = group_of((dataset_config(), records_of(pictures)))
    for path in pictures:
        path.write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        list(BatchLoader(group, num_workers=workers).epoch(1))
    assert str(caught.value).startswith(str(pictures[0].parent)) and "Traceback" not in str(caught.value)


def test_persistent_workers_without_workers_is_a_warning(
    pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    group = group_of((dataset_config(), records_of(pictures)))
    loader = BatchLoader(group, num_workers=0, persistent_workers=True)
    assert "persistent_data_loader_workers is ignored" in caplog.text
    assert len(list(loader.epoch(1))) == len(list(loader.epoch(2))) == len(loader)


def test_abandoned_epoch_does_not_leak_into_the_next(pictures: list[Path]) -> None:
    group = group_of((dataset_config(batch_size=1), records_of(pictures, num_repeats=3)))
    loader = BatchLoader(group, num_workers=2, persistent_workers=True)
    next(loader.epoch(1))
    served = [batch.image_keys[0] for batch in loader.epoch(2)]
    assert served == [keys[0] for _, keys in group.epoch_plan(2)]


# --- batch values ---------------------------------------------------------------------------------------------
def test_batch_values(pictures: list[Path]) -> None:
    subsets = SubsetConfig(custom_attributes={"diff_output_preservation": True}), SubsetConfig(is_reg=True)
    config = dataset_config(resolution=(128, 128), network_multiplier=0.5)
    config = type(config)(**{**config.__dict__, "subsets": subsets})
    records = [*records_of(pictures[:1]), *records_of(pictures[2:3], subset_index=1, is_reg=True)]
    group = group_of((config, records), prior_loss_weight=0.25)
    (batch,) = BatchLoader(group).epoch(1)
    train, reg = batch.image_keys.index(str(pictures[0])), batch.image_keys.index(str(pictures[2]))
    assert batch.images.shape == (2, 3, 128, 128) and batch.images.dtype == torch.float32
    assert -1 <= batch.images.min() < -0.9 and 0.9 < batch.images.max() <= 1
    assert batch.latents is None and batch.alpha_masks is None and batch.text_outputs is None
    assert batch.loss_weights[train] == 1 and batch.loss_weights[reg] == 0.25
    assert batch.original_sizes_hw[reg].tolist() == [220, 200] and batch.original_sizes_hw.dtype == torch.int64
    assert batch.crop_top_lefts[reg].tolist() == [0, 5]
    assert batch.target_sizes_hw.tolist() == [[128, 128], [128, 128]]
    assert batch.network_multipliers.tolist() == [0.5, 0.5] and batch.network_multipliers.dtype == torch.float32
    assert batch.custom_attributes[train] == {"diff_output_preservation": True} and batch.custom_attributes[reg] == {}
    assert batch.captions[train] == "a0, red, green, blue" and batch.tokens["ids"].shape == (2, 8)
    assert batch.flippeds == [False, False]
    assert (group.num_train_images, group.num_reg_images) == (1, 1)


def test_batch_values_equal_the_recorded_ones_of_the_reference() -> None:
    folder = GOLDEN / "dataset"
    config = dataset_config(SubsetConfig(image_dir=str(folder), caption_extension=".txt"))
    group = group_of((config, discover(config, 0)))
    found = {
        Path(batch.image_keys[row]).stem: (
            batch.captions[row], batch.loss_weights[row].item(),
            *(getattr(batch, name)[row].tolist() for name in SIZE_VALUES),
        )
        for batch in BatchLoader(group).epoch(1) for row in range(len(batch))
    }
    steps = json.loads((GOLDEN / "runs" / "sd1_lora.json").read_text(encoding="utf-8"))["steps"]
    recorded = {
        key: (step["captions"][row], step["loss_weights"][row], *(step[name][row] for name in SIZE_VALUES))
        for step in steps for row, key in enumerate(step["image_keys"])
    }
    assert len(recorded) == 6 and found == recorded


def test_exact_pixels_of_an_unchanged_image(pictures: list[Path]) -> None:
    group = group_of((dataset_config(), records_of(pictures[:1])))
    (batch,) = BatchLoader(group).epoch(1)
    expected = (torch.from_numpy(np.asarray(Image.open(pictures[0])).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.equal(batch.images[0], expected)


def test_flip_mirrors_pixels_mask_and_crop_offset(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (103, 100, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    subset = SubsetConfig(flip_aug=True, alpha_mask=True)
    group = group_of((dataset_config(subset), records_of([tmp_path / "a.png"])))
    seen = {batch.flippeds[0]: batch for epoch in range(1, 30) for batch in BatchLoader(group).epoch(epoch)}
    plain, flipped = seen[False], seen[True]
    assert torch.equal(flipped.images, plain.images.flip(-1))
    assert torch.equal(flipped.alpha_masks, plain.alpha_masks.flip(-1))
    assert not torch.equal(flipped.alpha_masks, plain.alpha_masks)
    assert plain.crop_top_lefts.tolist() == [[0, 1]]  # the letter-boxed image is 124.27 of 128 wide
    assert flipped.crop_top_lefts.tolist() == [[0, 2]]


def test_samples_without_a_mask_are_opaque_beside_masked_ones(pictures: list[Path]) -> None:
    config = dataset_config()
    config = type(config)(**{**config.__dict__, "subsets": (SubsetConfig(), SubsetConfig(alpha_mask=True))})
    Image.new("RGBA", (128, 128), (0, 0, 0, 102)).save(pictures[1])
    records = [*records_of(pictures[:1]), *records_of(pictures[1:2], subset_index=1)]
    (batch,) = BatchLoader(group_of((config, records))).epoch(1)
    masked = batch.image_keys.index(str(pictures[1]))
    assert batch.alpha_masks.shape == (2, 128, 128) and batch.alpha_masks.dtype == torch.float32
    assert batch.alpha_masks[masked].unique().tolist() == pytest.approx([0.4])
    assert batch.alpha_masks[1 - masked].unique().tolist() == [1]


@pytest.mark.parametrize("size", [(300, 300), (300, 200), (320, 180), (120, 360)])
@pytest.mark.parametrize("enable_bucket", [True, False])
def test_conditioning_image_stays_aligned(tmp_path: Path, size: tuple[int, int], enable_bucket: bool) -> None:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 255
    for name in ("image.png", "mask.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    records = records_of([tmp_path / "image.png"], conditioning_path=tmp_path / "mask.png")
    group = group_of((dataset_config(SubsetConfig(flip_aug=True), enable_bucket=enable_bucket), records))
    flips = set()
    for epoch in range(1, 12):
        (batch,) = BatchLoader(group).epoch(epoch)
        assert torch.equal(batch.conditioning_images, batch.images)
        flips |= set(batch.flippeds)
    assert flips == {True, False} and batch.conditioning_images.max() == 1


def test_conditioning_image_of_another_size_is_refused_with_buckets(pictures: list[Path]) -> None:
    records = records_of(pictures[:1], conditioning_path=pictures[1])
    with pytest.raises(ImageError, match=r"a1\.png: size of .* is not match.*160x150.*a0\.png.*128x128"):
        next(BatchLoader(group_of((dataset_config(), records))).epoch(1))
    (batch,) = BatchLoader(group_of((dataset_config(enable_bucket=False), records))).epoch(1)
    assert batch.conditioning_images.shape == (1, 3, 128, 128)


def test_random_crop_moves_the_window_but_not_the_conditioning_values(pictures: list[Path]) -> None:
    group = group_of((dataset_config(SubsetConfig(random_crop=True)), records_of(pictures[2:3])))
    batches = [batch for epoch in range(1, 9) for batch in BatchLoader(group).epoch(epoch)]
    assert len({batch.images.sum().item() for batch in batches}) > 1
    assert {tuple(batch.crop_top_lefts[0].tolist()) for batch in batches} == {(0, 5)}


def test_without_buckets_images_are_resized_to_cover_and_cut(pictures: list[Path]) -> None:
    group = group_of((dataset_config(enable_bucket=False), records_of(pictures)))
    assert group.datasets[0].bucket_statistics() is None
    for batch in BatchLoader(group).epoch(1):
        assert batch.images.shape[2:] == (128, 128)
    assert group.datasets[0].records[3].resized_size == (512, 128)


def test_face_crop_follows_the_file_name(tmp_path: Path) -> None:
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[180:220, 80:120] = 255
    Image.fromarray(pixels).save(path := tmp_path / "girl_100_200_40_40.png")
    subset = SubsetConfig(face_crop_aug_range=(4.0, 4.0))
    group = group_of((dataset_config(subset, enable_bucket=False, resolution=(160, 160)), records_of([path])))
    (batch,) = BatchLoader(group).epoch(1)
    rows, columns = torch.nonzero(batch.images[0, 0] > 0, as_tuple=True)
    assert batch.images.shape == (1, 3, 160, 160)
    assert (rows.float().mean().round().item(), columns.float().mean().round().item()) == (80, 80)


def test_cached_text_outputs_are_stacked_and_padded(pictures: list[Path]) -> None:
    records = records_of(pictures[:2])
    for length, record in enumerate(records, start=2):
        record.text_outputs = {"hidden": np.full((length, 4), length, np.float16), "pool": torch.full((4,), 2.0)}
    group = group_of((dataset_config(), records), tokenize=None)
    (batch,) = BatchLoader(group).epoch(1)
    assert batch.tokens is None
    assert batch.text_outputs["hidden"].shape == (2, 3, 4) and batch.text_outputs["hidden"].dtype == torch.float32
    assert batch.text_outputs["pool"].shape == (2, 4)
    short = batch.image_keys.index(str(pictures[0]))
    assert (batch.text_outputs["hidden"][short, :2] == 2).all() and (batch.text_outputs["hidden"][short, 2:] == 0).all()
    records[0].text_outputs = None
    with pytest.raises(ValueError, match=r"missing or incomplete for: .*a0\.png"):
        list(BatchLoader(group).epoch(1))


def test_caption_replacements_reach_the_captions(pictures: list[Path]) -> None:
    group = group_of((dataset_config(), records_of(pictures[:1])))
    group.caption_replacements = {"red": "tok tok1"}
    assert next(BatchLoader(group).epoch(1)).captions == ["a0, tok tok1, green, blue"]


# --- validation and checks ------------------------------------------------------------------------------------
def test_validation_has_a_fixed_order_and_nothing_random(pictures: list[Path]) -> None:
    subset = SubsetConfig(**{**RANDOM.__dict__, "caption_dropout_rate": 1.0, "caption_dropout_every_n_epochs": 1})
    group = group_of((dataset_config(subset), records_of(pictures)), is_validation=True)
    first, second = list(BatchLoader(group).epoch(1)), list(BatchLoader(group).epoch(5))
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
        assert not any(one.flippeds)
        assert all(caption.endswith(", red, green, blue") for caption in one.captions)
    plain = group_of((dataset_config(), records_of(pictures)), is_validation=True)
    for one, other in zip(first, BatchLoader(plain).epoch(1), strict=True):
        assert torch.equal(one.images, other.images)


def test_validation_group_may_be_empty_but_training_may_not() -> None:
    assert len(group_of((dataset_config(), []), is_validation=True)) == 0
    with pytest.raises(UserError, match="No data found.*test.toml"):
        group_of((dataset_config(), []))


def test_images_that_fit_no_bucket_are_all_named() -> None:
    records = [bare_record(0, (30, 200)), bare_record(1, (200, 200)), bare_record(2, (200, 30))]
    with pytest.raises(UserError, match=r"(?s)k0: .*empty bucket.*k2: .*empty bucket") as caught:
        group_of((dataset_config(bucket_no_upscale=True), records))
    assert "k1" not in str(caught.value)


def test_every_subset_whose_face_crop_cannot_be_had_is_named() -> None:
    face = SubsetConfig(face_crop_aug_range=(1.5, 3.0))
    subsets = (
        SubsetConfig(location="s0"), replace(face, location="s1"), SubsetConfig(location="s2"),
        replace(face, location="s3", conditioning_data_dir="c"),
    )  # fmt: skip
    records = [bare_record(0, (128, 128))]
    with pytest.raises(UserError) as caught:
        group_of((replace(dataset_config(), subsets=subsets), records), (dataset_config(face), records))
    assert [re.sub(r"face_crop_aug_range( \(s.\))? (has no effect|cannot be combined).*", r"\1 \2", problem).strip()
            for problem in caught.value.problems] == [
        "(s1) has no effect", "(s3) has no effect", "(s3) cannot be combined", "has no effect",
    ]  # fmt: skip
    group_of((dataset_config(face, enable_bucket=False), records))


def test_sizes_that_are_no_whole_latents_are_refused() -> None:
    with pytest.raises(UserError, match=r"multiples of 8, but 100x100.*Change resolution"):
        group_of((dataset_config(resolution=(100, 100), enable_bucket=False), [bare_record(0, (100, 100))]))
    odd = dataset_config(resolution=(100, 100), bucket_reso_steps=20, min_bucket_reso=60, max_bucket_reso=200)
    with pytest.raises(UserError, match="100x100.*Change bucket_reso_steps"):
        group_of((odd, [bare_record(0, (99, 99))]))
    group = group_of((dataset_config(resolution=(72, 72), enable_bucket=False), [bare_record(0, (100, 100))]))
    with pytest.raises(UserError, match="multiples of 16"):
        group.check_bucket_sizes(16)
    sides = [(400, 100), (100, 400), (100, 100), (300, 100), (100, 300), (200, 100), (100, 200)]
    with pytest.raises(UserError) as caught:
        group_of((odd, [bare_record(number, size) for number, size in enumerate(sides)]))
    named = re.findall(r"(\d+)x(\d+)", str(caught.value))
    assert len(named) > 4 and named == sorted(named, key=lambda size: (int(size[0]), int(size[1])))


def test_face_crop_with_buckets_is_refused() -> None:
    subset = SubsetConfig(face_crop_aug_range=(1.0, 2.0), location="d.toml, datasets[0].subsets[0]")
    with pytest.raises(UserError, match=r"face_crop_aug_range.*datasets\[0\]\.subsets\[0\].*enable_bucket"):
        group_of((dataset_config(subset), [bare_record(0, (100, 100))]))


def test_recorded_size_that_is_not_the_files_is_an_error(pictures: list[Path]) -> None:
    records = records_of(pictures[:1], image_size=(64, 64))
    with pytest.raises(ImageError, match=r"a0\.png: the image is 128x128 \(upright\), but 64x64 is recorded"):
        next(BatchLoader(group_of((dataset_config(), records))).epoch(1))


def test_transparency_is_reported_once_per_subset(pictures: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for path in pictures[:2]:
        Image.new("RGBA", (128, 128), (9, 9, 9, 0)).save(path)
    list(BatchLoader(group_of((dataset_config(), records_of(pictures)))).epoch(1))
    assert len([record for record in caplog.records if "has transparency" in record.message]) == 1


def test_missing_sizes_are_read_from_the_files(pictures: list[Path]) -> None:
    group = group_of((dataset_config(), records_of(pictures, image_size=(0, 0))))
    assert [record.image_size for record in group.datasets[0].records][:2] == [(128, 128), (160, 150)]


def test_images_are_decoded_once_and_all_broken_ones_are_listed(pictures: list[Path], tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "decoded.json"

    def group() -> DatasetGroup:
        return group_of((dataset_config(), records_of(pictures[:1], conditioning_path=pictures[0]) + rest))

    rest = records_of(pictures[1:])
    assert check_images(group(), memory) == 5
    assert check_images(group(), memory) == 0
    Image.new("RGB", (160, 150)).save(pictures[1])
    assert check_images(group(), memory) == 1
    for path in pictures[2:4]:
        path.write_bytes(path.read_bytes()[:500])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            check_images(group(), memory)
        assert "a2.png" in str(caught.value) and "a3.png" in str(caught.value) and "a1.png" not in str(caught.value)
