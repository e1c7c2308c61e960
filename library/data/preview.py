"""`--debug_dataset`: the first samples of an epoch as a contact sheet and a text; a window where there is a display."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageShow, features
from torch import Tensor

from library.data.augmentation import face_from_name
from library.data.buckets import crop_offset
from library.data.dataset import BucketDataset, DatasetGroup
from library.data.records import Batch, BatchRequest, ImageRecord

TILE = 192  # pixels; the longer side of a picture on the sheet
TILES_PER_ROW = 6
CAPTION_LINES = 4
LINE = 13  # pixels
GAP = 6


@dataclass(frozen=True)
class _Shown:
    """One sample: row `row` of the batch at `position`; its dataset and record where images come from folders."""

    number: int
    position: int
    batch: Batch
    row: int
    dataset: BucketDataset | None
    record: ImageRecord | None


def show_dataset(group: DatasetGroup, output_dir: str | Path, limit: int = 64) -> list[Path]:
    """Write what training would see in epoch 1, at most `limit` samples; returns the files.

    `samples.txt` describes datasets, buckets and every sample; `contact_sheet.png` shows the samples as they are
    trained (cut, flipped, colours changed), each with its mask and conditioning image to the right. Samples with cached
    latents are described only.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs, cells = [_summary(group)], []
    for shown in _samples(group, limit):
        paragraphs.append("\n".join([f"#{shown.number} batch {shown.position}", *_lines(_facts(shown))]))
        if shown.batch.images is not None:
            cells.append(_cell(shown))
    text, sheet = folder / "samples.txt", folder / "contact_sheet.png"
    text.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8", errors="backslashreplace")
    if not cells:
        sheet.unlink(missing_ok=True)
        return [text]
    _arrange(cells).save(sheet)
    return [text, sheet]


def open_window(sheet: Path) -> bool:
    """Show the picture with the system's viewer; False without a display, or when nobody sits before the program."""
    has_display = sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if not has_display or not sys.stdout.isatty():
        return False
    with Image.open(sheet) as image:
        return bool(ImageShow.show(image, title="training samples"))


# --- text -----------------------------------------------------------------------------------------------------
def _summary(group: DatasetGroup) -> str:
    lines = [
        f"{len(group)} batches per epoch, {group.num_train_images} training images (with repeats), "
        f"{group.num_reg_images} regularisation images"
    ]
    for index, dataset in enumerate(group.datasets):
        config, statistics = dataset.config, dataset.bucket_statistics()
        width, height = config.resolution
        lines.append(
            f"dataset {index} ({config.kind}): resolution {width}x{height}, batch size {config.batch_size}, "
            f"{len(dataset)} batches, {dataset.num_samples} samples"
        )
        if statistics is None:
            lines.append("  no buckets")
            continue
        lines += [
            f"  bucket {bucket['resolution'][0]}x{bucket['resolution'][1]}: {bucket['count']} samples"
            for bucket in statistics["buckets"].values()
        ]
        lines.append(f"  mean error of the aspect ratio: {statistics['mean_img_ar_error']:.4f}")
    return "\n".join(lines)


def _facts(shown: _Shown) -> dict[str, Any]:
    batch, row = shown.batch, shown.row
    content = batch.images if batch.images is not None else batch.latents
    facts = {"key": batch.image_keys[row], "caption": batch.captions[row]} | _facts_of_record(shown)
    facts |= {
        "original size (h, w)": batch.original_sizes_hw[row].tolist(),
        "crop (top, left)": batch.crop_top_lefts[row].tolist(),
        "target size (h, w)": batch.target_sizes_hw[row].tolist(),
        "flipped": batch.flippeds[row],
        "loss weight": batch.loss_weights[row].item(),
        "network multiplier": batch.network_multipliers[row].item(),
        "custom attributes": batch.custom_attributes[row],
        "images" if batch.images is not None else "latents": list(content[row].shape) if content is not None else None,
    }
    if batch.alpha_masks is not None:
        facts["alpha mask"] = f"{batch.alpha_masks[row].mean().item():.1%} of the picture counts"
    if batch.conditioning_images is not None:
        facts["conditioning image"] = list(batch.conditioning_images[row].shape)
    if batch.tokens is not None:
        facts["tokens"] = {name: list(value[row].shape) for name, value in batch.tokens.items()}
    return facts


def _facts_of_record(shown: _Shown) -> dict[str, Any]:
    dataset, record = shown.dataset, shown.record
    if dataset is None or record is None:
        return {}
    subset = dataset.config.subsets[record.subset_index]
    facts: dict[str, Any] = {
        "subset": f"{record.subset_index} ({subset.image_dir or subset.metadata_file})",
        "repeats": record.num_repeats, "regularisation": record.is_reg,
        "bucket": _size(record.bucket_size), "resized to": _size(record.resized_size),
        "cut at (left, top)": _place_of_cut(shown),
    }
    if record.conditioning_path is not None:
        facts["conditioning file"] = str(record.conditioning_path)
    return facts


def _place_of_cut(shown: _Shown) -> str:
    dataset, record = shown.dataset, shown.record
    assert dataset is not None and record is not None
    subset = dataset.config.subsets[record.subset_index]
    if subset.face_crop_aug_range and record.path and face_from_name(record.path):
        return "around the face"
    if subset.random_crop and record.resized_size != record.bucket_size:
        return "a random place"
    return str(crop_offset(record.resized_size, record.bucket_size))


def _lines(facts: dict[str, Any]) -> list[str]:
    return [f"  {name}: {value}" for name, value in facts.items()]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- pictures -------------------------------------------------------------------------------------------------
def _samples(group: DatasetGroup, limit: int) -> Iterator[_Shown]:
    number = 0
    for position in range(len(group)):
        request = BatchRequest(epoch=1, index=position, step=0)
        batch, source = group[request], group.source_of(request)
        for row in range(len(batch)):
            if number == limit:
                return
            dataset, record = (source[0], source[1][row]) if source else (None, None)
            yield _Shown(number, position, batch, row, dataset, record)
            number += 1


def _cell(shown: _Shown) -> Image.Image:
    """The pictures of a sample side by side, and its text below."""
    batch, row = shown.batch, shown.row
    assert batch.images is not None
    tiles = [_tile(batch.images[row])]
    if batch.alpha_masks is not None:
        tiles.append(_tile(batch.alpha_masks[row].expand(3, -1, -1) * 2 - 1))
    if batch.conditioning_images is not None:
        tiles.append(_tile(batch.conditioning_images[row]))
    lines = _words_below(shown, columns=len(tiles) * TILE // 6)
    cell = Image.new("RGB", (len(tiles) * TILE + GAP, TILE + LINE * (CAPTION_LINES + 2) + GAP), "white")
    for column, tile in enumerate(tiles):
        cell.paste(tile, (column * TILE + (TILE - tile.width) // 2, (TILE - tile.height) // 2))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((2, TILE + LINE * number), line, fill="black", font=_font())
    return cell


def _words_below(shown: _Shown, columns: int) -> list[str]:
    """Two lines about the sample, then its caption in as many lines as fit."""
    batch, row = shown.batch, shown.row
    height, width = batch.target_sizes_hw[row].tolist()
    first, second = [f"#{shown.number} {_size((width, height))}"], []
    if batch.flippeds[row]:
        first.append("flipped")
    if shown.record is not None:
        first.append(f"x{shown.record.num_repeats}" + (" reg" if shown.record.is_reg else ""))
        second = [f"of {_size(shown.record.resized_size)} at {_place_of_cut(shown)}"]
    words = textwrap.wrap(batch.captions[row] or "(no caption)", columns) or [""]
    if len(words) > CAPTION_LINES:
        words = [*words[: CAPTION_LINES - 1], f"{words[CAPTION_LINES - 1][: columns - 3]}..."]
    lines = [", ".join(first), *second, *words]
    if features.check("freetype2"):
        return lines
    return [line.encode("latin-1", "replace").decode("latin-1") for line in lines]  # all that the built-in font has


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(11)


def _tile(image: Tensor) -> Image.Image:
    """float [3,H,W] in [-1,1] -> a picture of at most TILE pixels."""
    pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    tile = Image.fromarray(pixels)
    tile.thumbnail((TILE, TILE))
    return tile


def _arrange(cells: list[Image.Image]) -> Image.Image:
    """All cells in rows; a row is about TILES_PER_ROW pictures wide."""
    width, height = max(cell.width for cell in cells), cells[0].height
    columns = min(max(1, TILES_PER_ROW * TILE // (width - GAP)), len(cells))
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % columns * width, index // columns * height))
    return sheet
