"""Pictures of inverted images: grids, and how images come about."""

from __future__ import annotations

import os

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smi_fast.data.files import atomic_write

GAP = 4
MIN_SIDE = 96  # pixels; smaller images are enlarged
FONT = ImageFont.load_default(14)
INK = "#404040"


def save_grid(images: Tensor, path: str | os.PathLike, columns: int, labels: list[str] | None = None) -> None:
    """Write a PNG of images row by row.

    Images with a side below 96 pixels are enlarged by an integer factor, so that each pixel becomes a square.

    Args:
        images: (N, 3, H, W) in [0, 1].
        path: the PNG.
        columns: number of images in a row.
        labels: a text for each row, which stands left of it.

    Raises:
        ValueError: the images are not (N, 3, H, W) with N > 0, there are no columns, or there is not one label for each
            row.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    tiles = _tiles(images)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    _save_table(rows, path, labels or [], [])


def save_process(snapshots: list[Tensor], path: str | os.PathLike, titles: list[str]) -> None:
    """Write a PNG that shows how images come about, with a row for each image and a column for each snapshot.

    Args:
        snapshots: S tensors (N, 3, H, W) in [0, 1].
        path: the PNG.
        titles: a text for each snapshot, such as "iteration 60 · 45 patches", which stands over its column. Texts that
            are too long for their columns are broken at " · ".

    Raises:
        ValueError: there are no snapshots, their shapes differ, or there is not one title for each.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not snapshots or len(titles) != len(snapshots):
        raise ValueError(f"{len(titles)} titles for {len(snapshots)} snapshots")
    if len({snapshot.shape for snapshot in snapshots}) > 1:
        raise ValueError(f"snapshots differ in shape: {[tuple(snapshot.shape) for snapshot in snapshots]}")
    _save_table(list(zip(*map(_tiles, snapshots), strict=True)), path, [], titles)


def _tiles(images: Tensor) -> list[Image.Image]:
    """Turn images (N, 3, H, W) in [0, 1] into N pictures, which are enlarged if they are small."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images must be (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
    factor = max(1, -(-MIN_SIDE // min(images.shape[2:])))
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def _save_table(rows: list, path: str | os.PathLike, labels: list[str], titles: list[str]) -> None:
    """Write pictures of one size as a table on white, with `labels` left of the rows and `titles` over the columns."""
    width, height = rows[0][0].size
    if any(FONT.getlength(title) > width for title in titles):
        titles = [title.replace(" · ", "\n") for title in titles]
    lines = [line for title in titles for line in title.split("\n")]
    cell = max([width, *(int(FONT.getlength(line)) + GAP for line in lines)])
    left = GAP + max([0, *(int(FONT.getlength(label)) + 3 * GAP for label in labels)])
    top = GAP + max([0, *(18 * (title.count("\n") + 1) + GAP for title in titles)])
    columns = max(map(len, rows))
    table = Image.new("RGB", (left + columns * (cell + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(table)
    for column, title in enumerate(titles):
        middle = left + column * (cell + GAP) + cell / 2
        draw.multiline_text((middle, top - GAP), title, INK, FONT, anchor="md", align="center", spacing=4)
    for row, label in enumerate(labels):
        draw.text((left - 2 * GAP, top + row * (height + GAP) + height / 2), label, INK, FONT, anchor="rm")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            x = left + column * (cell + GAP) + (cell - width) // 2
            table.paste(picture, (x, top + row * (height + GAP)))
    with atomic_write(path) as partial:
        table.save(partial, format="PNG")
