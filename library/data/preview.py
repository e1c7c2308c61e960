"""`--debug_dataset` without a screen: the first samples of an epoch as a contact sheet and a text file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from library.data.dataset import DatasetGroup
from library.data.records import Batch, BatchRequest

TILE = 160  # pixels
COLUMNS = 8


def show_dataset(group: DatasetGroup, output_dir: str | Path, limit: int = 64) -> list[Path]:
    """Write what training would see in epoch 1, at most `limit` samples; returns the files.

    `samples.txt` describes every sample; `contact_sheet.png` shows it, with its mask and conditioning image to the
    right, numbered as in the text. Samples with cached latents are described only.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{len(group)} batches per epoch, {group.num_train_images} training images (with repeats), "
        f"{group.num_reg_images} regularisation images"
    ]
    tiles: list[Image.Image] = []
    for number, (position, batch, row) in enumerate(_samples(group, limit)):
        lines.append(_describe(number, position, batch, row))
        tiles += _tiles(number, batch, row)
    text = folder / "samples.txt"
    text.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    if not tiles:
        return [text]
    sheet = folder / "contact_sheet.png"
    _arrange(tiles).save(sheet)
    return [text, sheet]


def _samples(group: DatasetGroup, limit: int) -> Iterator[tuple[int, Batch, int]]:
    """(position of the batch in the epoch, batch, row in it)."""
    shown = 0
    for position in range(len(group)):
        batch = group[BatchRequest(epoch=1, index=position, step=0)]
        for row in range(len(batch)):
            if shown == limit:
                return
            shown += 1
            yield position, batch, row


def _describe(number: int, position: int, batch: Batch, row: int) -> str:
    content = batch.images if batch.images is not None else batch.latents
    facts = {
        "key": batch.image_keys[row],
        "caption": batch.captions[row],
        "original size (h, w)": batch.original_sizes_hw[row].tolist(),
        "crop (top, left)": batch.crop_top_lefts[row].tolist(),
        "target size (h, w)": batch.target_sizes_hw[row].tolist(),
        "flipped": batch.flippeds[row],
        "loss weight": batch.loss_weights[row].item(),
        "network multiplier": batch.network_multipliers[row].item(),
        "custom attributes": batch.custom_attributes[row],
        "images" if batch.images is not None else "latents": list(content[row].shape) if content is not None else None,
    }
    if batch.tokens is not None:
        facts["tokens"] = {name: list(value[row].shape) for name, value in batch.tokens.items()}
    return "\n".join([f"#{number} batch {position}", *(f"  {name}: {value}" for name, value in facts.items())])


def _tiles(number: int, batch: Batch, row: int) -> list[Image.Image]:
    if batch.images is None:
        return []
    tiles = [_tile(_to_pixels(batch.images[row]), f"#{number}")]
    if batch.alpha_masks is not None:
        tiles.append(_tile(_to_pixels(batch.alpha_masks[row].expand(3, -1, -1) * 2 - 1), f"#{number} mask"))
    if batch.conditioning_images is not None:
        tiles.append(_tile(_to_pixels(batch.conditioning_images[row]), f"#{number} cond"))
    return tiles


def _to_pixels(image: Tensor) -> np.ndarray:
    return ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def _tile(pixels: np.ndarray, label: str) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((TILE, TILE))
    tile = Image.new("RGB", (TILE, TILE + 14), "white")
    tile.paste(image, ((TILE - image.width) // 2, 14 + (TILE - image.height) // 2))
    ImageDraw.Draw(tile).text((2, 1), f"{label} {pixels.shape[1]}x{pixels.shape[0]}", fill="black")
    return tile


def _arrange(tiles: list[Image.Image]) -> Image.Image:
    columns = min(COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet
