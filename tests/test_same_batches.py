"""The same batches whatever fetches them: any number of workers, one or several starts, any state of the process."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.config_schema import SubsetConfig
from library.data.dataset import DatasetGroup
from library.data.loader import BatchLoader
from library.data.records import Batch, ImageRecord
from tests.picture_folder import dataset_config, group_of, records_of, save_pictures

SHUFFLE = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text(encoding="utf-8"))["bucket_shuffle"]
EPOCHS = 2
STEPS_BEFORE = 3
CAPTION = "{first|second} word, red, {green|lime|olive}, blue\nanother {a|b} line, c, d, e\nthird, f, g"
EVERYTHING = SubsetConfig(
    flip_aug=True, color_aug=True, random_crop=True, alpha_mask=True, shuffle_caption=True, keep_tokens=1,
    enable_wildcard=True, caption_tag_dropout_rate=0.3, caption_dropout_rate=0.1, token_warmup_step=20,
    caption_prefix="{one|two}:",
)
FACES = SubsetConfig(face_crop_aug_range=(1.0, 3.0), random_crop=True, color_aug=True, flip_aug=True)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Pictures of several shapes, with transparency, and two with a face in their name."""
    rng = np.random.default_rng(5)
    paths = save_pictures(tmp_path)
    for name in ("one_80_90_50_60.png", "two_60_60_40_40.png"):
        Image.fromarray(rng.integers(0, 256, (200, 190, 4), dtype=np.uint8)).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def everything(pictures: list[Path]) -> DatasetGroup:
    """Two datasets with everything that is random switched on."""
    return group_of(
        (dataset_config(EVERYTHING), records_of(pictures, num_repeats=2, caption=CAPTION)),
        (dataset_config(FACES, enable_bucket=False, resolution=(96, 64), batch_size=3), records_of(pictures[5:])),
    )


def assert_same(served: list[Batch], expected: list[Batch]) -> None:
    assert len(served) == len(expected)
    for one, other in zip(served, expected, strict=True):
        for field in fields(Batch):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, Tensor):
                assert torch.equal(a, b), field.name
            elif isinstance(a, dict):
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), field.name
            else:
                assert a == b, field.name


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many workers as are asked for, on any machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    yield


def epochs(group: DatasetGroup, **settings: int | bool) -> list[Batch]:
    loader = BatchLoader(group, **settings)
    steps = range(1, EPOCHS + 1)
    return [batch for epoch in steps for batch in loader.epoch(epoch, first_step=(epoch - 1) * len(group))]


@pytest.fixture
def straight(pictures: list[Path]) -> list[Batch]:
    """Two epochs without workers; everything random happens in them."""
    batches = epochs(everything(pictures))
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert {True, False} == {flipped for batch in batches for flipped in batch.flippeds}
    captions = [caption for batch in batches for caption in batch.captions]
    assert any(text.startswith("one:") for text in captions) and any(text.startswith("two:") for text in captions)
    assert any("lime" in text for text in captions) and "" in captions
    assert [batch.image_keys for batch in first] != [batch.image_keys for batch in second]
    assert len({batch.images.sum().item() for batch in batches}) > len(batches) - 3
    return batches


@pytest.mark.parametrize(("workers", "stay"), [(1, False), (1, True), (4, False), (4, True)])
def test_workers_change_nothing(
    pictures: list[Path], straight: list[Batch], four_cpus: None, *, workers: int, stay: bool
) -> None:
    assert_same(epochs(everything(pictures), num_workers=workers, persistent_workers=stay), straight)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_resumed_run_sees_what_the_straight_run_saw(
    pictures: list[Path], straight: list[Batch], four_cpus: None, workers: int
) -> None:
    group = everything(pictures)
    loader = BatchLoader(group, num_workers=workers)
    rest = list(loader.epoch(1, start=STEPS_BEFORE, first_step=STEPS_BEFORE))
    rest += loader.epoch(2, first_step=len(group))
    assert_same(rest, straight[STEPS_BEFORE:])


def test_what_else_the_process_draws_changes_nothing(pictures: list[Path], straight: list[Batch]) -> None:
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    group = everything(pictures)
    served = []
    for epoch in (1, 2):
        for batch in BatchLoader(group).epoch(epoch, first_step=(epoch - 1) * len(group)):
            random.random()
            np.random.rand()
            torch.rand(1)
            served.append(batch)
    assert_same(served, straight)


def test_another_seed_gives_other_batches(pictures: list[Path], straight: list[Batch]) -> None:
    group = everything(pictures)
    group.seed += 1
    other = epochs(group)
    assert [batch.image_keys for batch in other] != [batch.image_keys for batch in straight]


def test_samples_of_one_epoch_are_independent(tmp_path: Path) -> None:
    """Neither workers nor neighbours share a random stream: 64 copies of a picture get many captions and crops."""
    (picture,) = save_pictures(tmp_path, [(160, 150)])
    subset = SubsetConfig(random_crop=True, shuffle_caption=True)
    group = group_of((dataset_config(subset, batch_size=8), records_of([picture], num_repeats=64)))
    batches = list(BatchLoader(group, num_workers=2).epoch(1))
    captions = [caption for batch in batches for caption in batch.captions]
    sums = [image.sum().item() for batch in batches for image in batch.images]
    assert len(set(captions)) > 15  # of 24 orders
    assert len(set(sums)) > 5  # of 10 crops


@pytest.mark.parametrize("name", ["reference_example", "wanted_example"])
def test_epochs_have_the_batches_of_the_recorded_example_in_an_order_of_their_own(name: str) -> None:
    example = SHUFFLE[name]
    shapes = [(64, 128 + 64 * index) for index in range(len(example["initial_buckets"]))]
    records = [
        ImageRecord(key=key, path=None, caption="", subset_index=0, image_size=shape)
        for shape, keys in zip(shapes, example["initial_buckets"], strict=True) for key in keys
    ]
    group = group_of((dataset_config(batch_size=example["batch_size"], bucket_no_upscale=True), records))
    for state in example["states"]:
        plan = group.epoch_plan(state["epoch"] + 1)
        assert len(plan) == len(state["batch_index_order"])
        for recorded in state["buckets"]:
            batches = [keys for _, keys in plan if set(keys) <= set(recorded)]
            assert sorted(key for keys in batches for key in keys) == sorted(recorded)
            expected = [example["batch_size"]] * (len(recorded) // example["batch_size"])
            expected += [len(recorded) % example["batch_size"]] if len(recorded) % example["batch_size"] else []
            assert sorted(map(len, batches), reverse=True) == expected
