"""Pictures of inverted images: grids, the inversion process, the loss curve."""

from __future__ import annotations

import os

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smi_fast.data.files import atomic_write

GAP = 4
MIN_SIDE = 96  # smaller images are enlarged
FONT = ImageFont.load_default(14)
INK = "#404040"


def save_grid(images: Tensor, path: str | os.PathLike, columns: int, labels: list[str] | None = None) -> None:
    """Write a PNG of images (N, 3, H, W) in [0, 1], row by row, `columns` in a row.

    Images with a side below 96 pixels are enlarged by an integer factor, each pixel a square.

    Args:
        labels: one a row, drawn at its left.

    Raises:
        ValueError: not (N, 3, H, W) with N > 0, no columns, or not one label a row.
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
    """Write a PNG of the inversion: one row an image, one column a snapshot.

    Args:
        snapshots: S tensors (N, 3, H, W) in [0, 1].
        titles: one a snapshot, over its column, such as "iteration 60 · 45 patches"; breaks at " · " to fit.

    Raises:
        ValueError: no snapshots, snapshots of differing shape, or not one title a snapshot.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not snapshots or len(titles) != len(snapshots):
        raise ValueError(f"{len(titles)} titles for {len(snapshots)} snapshots")
    if len({snapshot.shape for snapshot in snapshots}) > 1:
        raise ValueError(f"snapshots differ in shape: {[tuple(snapshot.shape) for snapshot in snapshots]}")
    _save_table(list(zip(*map(_tiles, snapshots), strict=True)), path, [], titles)


def save_curve(history: list[dict], path: str | os.PathLike) -> bool:
    """Write a PNG of loss (left axis) and tokens per image (right axis, a step line) against the iteration.

    Args:
        history: records with the keys iteration, loss and tokens.

    Returns:
        Whether it was written: False, without an error, where matplotlib (the extra `viz`) is missing.

    Raises:
        ValueError: the history is empty.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not history:
        raise ValueError("the history is empty")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return False
    iteration, loss, tokens = ([record[key] for record in history] for key in ("iteration", "loss", "tokens"))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    left.plot(iteration, loss, color="#1f5fa8", linewidth=1.0)
    right.step(iteration, tokens, where="post", color="#d9822b", linewidth=1.4)
    left.set_xlabel("iteration")
    left.set_ylabel("loss", color="#1f5fa8")
    right.set_ylabel("tokens per image", color="#d9822b")
    if min(loss) > 0:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("")
    right.set_ylim(0, 1.05 * max(tokens))
    left.margins(x=0)
    left.grid(alpha=0.25)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True


def save_accuracy(curves: dict[str, list[tuple[float, float]]], path: str | os.PathLike) -> bool:
    """Write a PNG of accuracy against samples, a line for each name (Fig. 4 of Sparse Model Inversion).

    Args:
        curves: name -> points (samples, accuracy in [0, 1]).

    Returns:
        Whether it was written: False where matplotlib (the extra `viz`) is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        samples, accuracy = zip(*points, strict=True)
        axes.plot(samples, [100 * value for value in accuracy], marker="o", markersize=3, label=name)
    axes.set_xlabel("samples")
    axes.set_ylabel("test accuracy in %")
    return _finish_plot(figure, axes, path)


def save_ranges(sources: dict[str, dict[str, tuple[float, float]]], path: str | os.PathLike) -> bool:
    """Write a PNG of the range of activations at each place of observation, one bar for each source of calibration.

    Args:
        sources: name -> place -> (smallest, largest).

    Returns:
        As `save_accuracy`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    places = list(next(iter(sources.values())))
    figure = Figure(figsize=(max(6, 0.16 * len(places)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(sources)
    for number, (name, ranges) in enumerate(sources.items()):
        left = [place + (number - (len(sources) - 1) / 2) * width for place in range(len(places))]
        low, high = zip(*(ranges[place] for place in places), strict=True)
        axes.bar(left, [b - a for a, b in zip(low, high, strict=True)], width, low, label=name)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xticks(range(len(places)), places, rotation=90, fontsize=6)
    axes.use_sticky_edges = False
    axes.margins(x=0.01, y=0.05)
    axes.set_ylabel("activation")
    return _finish_plot(figure, axes, path)


def _finish_plot(figure, axes, path: str | os.PathLike) -> bool:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True


def _tiles(images: Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W) in [0, 1] as N pictures, enlarged if they are small."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images must be (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
    factor = max(1, -(-MIN_SIDE // min(images.shape[2:])))
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def _save_table(rows: list, path: str | os.PathLike, labels: list[str], titles: list[str]) -> None:
    """Write equally large pictures as a table on white: `labels` left of the rows, `titles` over the columns."""
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
