"""Picture grids with labels and a small chart of loss curves, with Pillow only.

As a script: `python demo/grid.py pictures/known --output grid.png` lays a folder's pictures out in a grid;
`python demo/grid.py --curve work/denoiser_loss.csv --output curve.png` draws a loss log.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from judge import picture_files
from PIL import Image, ImageDraw

_PAPER, _INK, _LINE = (255, 255, 255), (40, 42, 48), (210, 212, 218)
_CURVES = ((48, 88, 214), (218, 46, 52), (52, 168, 83), (158, 66, 200))
_LABEL_HEIGHT = 14


def picture_grid(
    pictures: Sequence[np.ndarray], columns: int, labels: Sequence[str] = (), zoom: int = 1, gap: int = 2
) -> Image.Image:
    """Lay out uint8 RGB pictures [H, W, 3] of one size row by row; a label, if any, stands under its picture."""
    if not pictures:
        raise ValueError("no pictures to lay out")
    height, width = (side * zoom for side in pictures[0].shape[:2])
    cell_height = height + gap + (_LABEL_HEIGHT if labels else 0)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * cell_height + gap), _PAPER)
    draw = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        left, top = gap + index % columns * (width + gap), gap + index // columns * cell_height
        grid.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if index < len(labels):
            draw.text((left + 1, top + height + 1), labels[index], fill=_INK)
    return grid


def read_loss_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Curves name -> [(step, value)] of a log with lines "step,seconds,name=value,..."."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        step, _, *values = line.split(",")
        for value in values:
            name, number = value.split("=")
            curves.setdefault(name, []).append((float(step), float(number)))
    return curves


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Running mean over the last `window` values."""
    values = np.array([value for _, value in points])
    sums = np.cumsum(np.insert(values, 0, 0.0))
    return [(step, float((sums[i + 1] - sums[max(0, i + 1 - window)]) / (i + 1 - max(0, i + 1 - window))))
            for i, (step, _) in enumerate(points)]


def loss_chart(
    curves: dict[str, list[tuple[float, float]]], size: tuple[int, int] = (640, 320), window: int = 5
) -> Image.Image:
    """A line chart of the curves over the step, logarithmic upwards."""
    chart = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(chart)
    left, top, right, bottom = 56, 12, size[0] - 12, size[1] - 26
    smoothed = {name: [(step, max(value, 1e-9)) for step, value in smooth(points, window)]
                for name, points in curves.items() if points}
    if not smoothed:
        raise ValueError("the log holds no values")
    steps = [step for points in smoothed.values() for step, _ in points]
    logs = [float(np.log10(value)) for points in smoothed.values() for _, value in points]
    low, high, last = min(logs), max(logs) + 1e-6, max(steps)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), fill=_LINE)
        draw.text((4, y - 6), f"{10 ** (low + share * (high - low)):.3g}", fill=_INK)
        draw.text((left + share * (right - left) - 12, bottom + 8), f"{share * last:.0f}", fill=_INK)
    for index, (name, points) in enumerate(smoothed.items()):
        colour = _CURVES[index % len(_CURVES)]
        line = [(left + step / last * (right - left),
                 bottom - (float(np.log10(value)) - low) / (high - low) * (bottom - top)) for step, value in points]
        if len(line) > 1:
            draw.line(line, fill=colour, width=2)
        draw.text((right - 90, top + 14 * index), name, fill=colour)
    return chart


def main() -> None:
    """Command line: a grid of pictures or a chart of a loss log."""
    parser = argparse.ArgumentParser(description="lay out pictures in a grid, or draw a loss log")
    parser.add_argument("paths", nargs="*", type=Path, help="picture files or folders")
    parser.add_argument("--curve", type=Path, help="loss log (CSV) to draw instead of a grid")
    parser.add_argument("--columns", type=int, default=9, help="pictures per row")
    parser.add_argument("--zoom", type=int, default=1, help="enlargement")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    if arguments.curve:
        loss_chart(read_loss_log(arguments.curve)).save(arguments.output)
        return
    files = picture_files(arguments.paths)
    if not files:
        parser.error("no pictures given")
    pictures = []
    for path in files:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    picture_grid(pictures, arguments.columns, zoom=arguments.zoom).save(arguments.output)


if __name__ == "__main__":
    main()
