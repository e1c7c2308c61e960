"""Latents that stand for images: sets prepared by older tools (`train_resolution`), and caches without their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.config_schema import DataConfig, DatasetConfig, SubsetConfig
from library.data.buckets import crop_ltrb
from library.data.dataset import DatasetGroup, build_group
from library.data.discovery import Surroundings, discover_all
from library.data.loader import make_loader
from library.data.records import LatentSpec
from library.options.errors import UserError
from tests.training import train

SPEC = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd.npz")
SIZES = {"a": ((100, 130), (64, 128)), "b": ((130, 70), (128, 64)), "c.d": ((80, 200), (64, 128))}  # original, bucket


def write_latents(path: Path, original: tuple[int, int], bucket: tuple[int, int], *, flipped: bool = False) -> None:
    """The arrays of the older tools: no suffix in the keys, no word about their origin."""
    latents = np.full((4, bucket[1] // 8, bucket[0] // 8), original[0] / 100, np.float32)
    arrays = {
        "latents": latents, "original_size": np.array(original), "crop_ltrb": np.array(crop_ltrb(original, bucket))
    }  # fmt: skip
    np.savez(path, **arrays, **({"latents_flipped": -latents} if flipped else {}))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder with latents and metadata, and no images."""
    for stem, (original, bucket) in SIZES.items():
        write_latents(tmp_path / f"{stem}.npz", original, bucket)
    entries = {
        stem + (".png" if stem == "b" else ""): {"caption": f"picture {stem}", "train_resolution": list(bucket)}
        for stem, (_, bucket) in SIZES.items()
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def group_of(folder: Path, *, dataset: dict[str, Any] | None = None, **subset: Any) -> DatasetGroup:
    subsets = (
        SubsetConfig(
            kind="fine_tuning", image_dir=str(folder), metadata_file=str(folder / "meta.json"), location="set", **subset
        ),
    )
    config = DataConfig(
        (DatasetConfig((64, 64), subsets, "fine_tuning", location="set", **(dataset or {})),), "set", from_file=True
    )
    found = discover_all(config, Surroundings(SPEC))
    return build_group(config, [parts.training for parts in found], spec=SPEC, tokenize=None, seed=0)


def test_prepared_latents_are_trained_in_their_own_buckets(prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    group = group_of(prepared, dataset={"batch_size": 2})
    assert "training from prepared latents (3 files" in caplog.text
    assert group.datasets[0].config.enable_bucket
    batches = {tuple(sorted(batch.captions)): batch for batch in make_loader(group, epoch=1)}
    assert set(batches) == {("picture a", "picture c.d"), ("picture b",)}
    wide = batches["picture b",]
    assert wide.images is None
    assert wide.latents.shape == (1, 4, 8, 16)
    assert wide.original_sizes_hw.tolist() == [[70, 130]]
    assert np.allclose(wide.latents, 1.3)


def test_images_beside_prepared_latents_are_not_read(prepared: Path) -> None:
    (prepared / "b.png").write_bytes(b"not an image")
    Image.new("RGB", SIZES["a"][0]).save(prepared / "a.png")
    records = group_of(prepared).datasets[0].records
    assert {record.path.name for record in records} == {"a.png", "b.png", "c.d"}
    assert {record.latents_path.name for record in records} == {"a.npz", "b.npz", "c.d.npz"}


def test_flips_need_flipped_latents(prepared: Path) -> None:
    for stem, sizes in SIZES.items():
        write_latents(prepared / f"{stem}.npz", *sizes, flipped=True)
    group = group_of(prepared, flip_aug=True)
    seen = {
        (flipped, bool(batch.latents.min() < 0)) for epoch in range(1, 9) for batch in make_loader(group, epoch=epoch)
        for flipped in batch.flippeds
    }  # fmt: skip
    assert seen == {(False, False), (True, True)}


def without_one(folder: Path) -> None:
    (folder / "a.npz").unlink()


def with_other_size(folder: Path) -> None:
    write_latents(folder / "a.npz", SIZES["a"][0], (64, 64))


def with_damage(folder: Path) -> None:
    (folder / "a.npz").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("change", "subset", "reason"),
    [
        (without_one, {}, "1 images lack them: there is no "),
        (with_other_size, {}, "1 images lack them: "),
        (with_damage, {}, "1 images lack them: "),
        (lambda folder: None, {"flip_aug": True}, None),  # no image has what it needs: as if there were none
        (lambda folder: None, {"random_crop": True}, "random_crop changes the images"),
    ],
)
def test_incomplete_sets_are_like_any_other_dataset(
    change: Any, subset: dict[str, Any], reason: str | None, prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for stem, (original, _) in SIZES.items():
        Image.new("RGB", original).save(prepared / f"{stem}.png")
    change(prepared)
    group = group_of(prepared, **subset)
    assert {record.latents_path for record in group.datasets[0].records} == {None}
    assert {record.bucket_size for record in group.datasets[0].records} == {(64, 64)}
    assert ("are ignored, because" in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text


def test_prepared_buckets_exclude_no_upscale(prepared: Path) -> None:
    with pytest.raises(UserError, match="bucket_no_upscale cannot be used with prepared latents"):
        group_of(prepared, dataset={"enable_bucket": True, "bucket_no_upscale": True})


def test_a_script_trains_from_prepared_latents_without_images(prepared: Path) -> None:
    words = ["--in_json", prepared / "meta.json", "--train_data_dir", prepared, "--resolution", "64"]
    model = train(*words, "--max_train_epochs", "1", output_dir=prepared / "out")
    assert any(t.abs().max() > 0 for key, t in load_file(model).items() if "lora_up" in key)
    with safe_open(model, "pt") as file:
        assert [64, 128] in [b["resolution"] for b in json.loads(file.metadata()["ss_bucket_info"])["buckets"].values()]


def test_a_script_trains_from_caches_without_their_images(tmp_path: Path) -> None:
    entries = {}
    for stem, (original, _) in SIZES.items():
        write_latents(tmp_path / f"{stem}_{original[0]:04d}x{original[1]:04d}_sd.npz", original, (64, 64))
        entries[stem] = {"caption": stem}
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    words = [
        "--in_json", tmp_path / "meta.json", "--train_data_dir", tmp_path, "--resolution", "64", "--cache_latents",
        "--cache_latents_to_disk", "--train_batch_size", "3",
    ]  # fmt: skip
    model = train(*words, "--max_train_epochs", "1", output_dir=tmp_path / "out")
    assert any(t.abs().max() > 0 for key, t in load_file(model).items() if "lora_up" in key)
