"""Pictures for people: images of classes, how they come about, and grids. A stopped patch is dark grey in them, so that
it can be told from a black one."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smi_fast.data.files import atomic_write

GREY = 64 / 255  # of a stopped patch
GAP = 4
MIN_SIDE = 96  # pixels; smaller images are enlarged
MAX_PIXELS = 8 * 2**20  # of all images in a picture; if they have more, they are reduced
WIDTH = 1200  # of a picture that breaks its lines
FONT, LARGE_FONT = ImageFont.load_default(14), ImageFont.load_default(18)
LINE, HEAD = 18, 36  # pixels from one line of text to the next, and of the title of an animation
INK, GREY_INK = "#404040", "#808080"  # the second one is read on white and on black
FRAME, LAST_FRAME = 350, 3000  # milliseconds
QUALITIES = (70, 45, 25, 10)  # of an animation: the first one with which it is not larger than
MAX_BYTES = 3 * 10**6


def save_grid(
    images: Tensor,
    path: str | os.PathLike,
    columns: int,
    labels: Sequence[str] | None = None,
    titles: Sequence[str] = (),
) -> None:
    """Write a PNG of images row by row.

    Images with a side below 96 pixels are enlarged by an integer factor, so that each pixel becomes a square. Very many
    images are reduced by an integer factor.

    Args:
        images: (N, 3, H, W) in [0, 1], or (N, 1, H, W) if they are grey.
        path: the PNG.
        columns: number of images in a row.
        labels: a text for each row, which stands left of it.
        titles: a text for each column, which stands over it, shortened as in `save_classes`.

    Raises:
        ValueError: the images do not have this shape, N is 0, there are no columns, or there is not one label for each
            row or one title for each column.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    tiles = _tiles(images)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    if titles and len(titles) != len(rows[0]):
        raise ValueError(f"{len(titles)} titles for {len(rows[0])} columns")
    _save_table(rows, path, labels or [], [fitted(title, tiles[0].width) for title in titles])


def save_classes(images: Tensor, names: Sequence[str], path: str | os.PathLike) -> None:
    """Write a PNG of images with the names of their classes over them. Neighbours of one name share it.

    Args:
        images: as `save_grid` takes, enlarges and reduces them.
        names: the N names. A long one takes two lines, and is cut where that does not suffice.
        path: the PNG.

    Raises:
        ValueError: the images do not have this shape or N is 0, or there is not one name for each.
        FileNotFoundError: the folder of `path` does not exist.
    """
    tiles = _tiles(images)
    if len(names) != len(tiles):
        raise ValueError(f"{len(names)} names for {len(tiles)} images")
    blocks: list[tuple[str, list[Image.Image]]] = []
    for name, tile in zip(names, tiles, strict=True):
        if not blocks or blocks[-1][0] != name:
            blocks.append((name, []))
        blocks[-1][1].append(tile)
    with atomic_write(path) as partial:
        _flow(blocks, WIDTH, "white", INK).convert("RGB").save(partial, format="PNG")


def save_process(
    snapshots: Sequence[Tensor], path: str | os.PathLike, titles: Sequence[str], labels: Sequence[str] = ()
) -> None:
    """Write a PNG that shows how images come about, with a row for each image and a column for each snapshot.

    Args:
        snapshots: S tensors of images as `save_grid` takes them.
        path: the PNG.
        titles: a text for each snapshot, such as "iteration 60 · 45 patches", which stands over its column. Texts that
            are too long for their columns are broken at " · ".
        labels: a text for each image, which stands left of its row.

    Raises:
        ValueError: there are no snapshots, their shapes differ, or there is not one title for each snapshot and, if
            there are labels, one label for each image.
        FileNotFoundError: the folder of `path` does not exist.
    """
    columns = _snapshots(snapshots, titles, labels)
    _save_table(list(zip(*columns, strict=True)), path, labels, titles)


def save_animation(
    snapshots: Sequence[Tensor], path: str | os.PathLike, titles: Sequence[str], names: Sequence[str]
) -> None:
    """Write an animated WebP that shows how images come about, on a transparent ground.

    Images that are enlarged are compressed without loss, others so that the file has at most 3 MB if possible.

    Args:
        snapshots, path, titles: as `save_process` takes them. A title stands over all images.
        names: a text for each image, which stands over it.

    Raises:
        ValueError, FileNotFoundError: as in `save_process`.
    """
    frames, widest = [], 2 * GAP + max((int(LARGE_FONT.getlength(title)) for title in titles), default=0)
    for tiles, title in zip(_snapshots(snapshots, titles, names), titles, strict=True):
        images = _flow([(name, [tile]) for name, tile in zip(names, tiles, strict=True)], WIDTH, (0, 0, 0, 0), GREY_INK)
        frame = Image.new("RGBA", (max(images.width, widest), images.height + HEAD))
        ImageDraw.Draw(frame).text((GAP, HEAD / 2), title, GREY_INK, LARGE_FONT, anchor="lm")
        frame.paste(images, (0, HEAD))
        frames.append(frame)
    durations = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    options = {"format": "WEBP", "save_all": True, "append_images": frames[1:], "loop": 0, "duration": durations}
    is_enlarged = min(snapshots[0].shape[2:]) < MIN_SIDE
    for quality in (100,) if is_enlarged else QUALITIES:
        film = io.BytesIO()
        frames[0].save(film, lossless=is_enlarged, quality=quality, **options)
        if film.tell() <= MAX_BYTES:
            break
    with atomic_write(path) as partial:
        partial.write_bytes(film.getvalue())


def _snapshots(snapshots: Sequence[Tensor], titles: Sequence[str], names: Sequence[str]) -> list[list[Image.Image]]:
    """Check snapshots, their titles and the names of their images, and turn them into pictures."""
    if not snapshots or len(titles) != len(snapshots):
        raise ValueError(f"{len(titles)} titles for {len(snapshots)} snapshots")
    if len({snapshot.shape for snapshot in snapshots}) > 1:
        raise ValueError(f"snapshots differ in shape: {[tuple(snapshot.shape) for snapshot in snapshots]}")
    if names and len(names) != len(snapshots[0]):
        raise ValueError(f"{len(names)} names for {len(snapshots[0])} images")
    return [_tiles(snapshot) for snapshot in snapshots]


def _tiles(images: Tensor) -> list[Image.Image]:
    """Turn images, as `save_grid` takes them, into N pictures, enlarged if they are small and reduced if together
    they are large."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must be (N, 3, H, W) or (N, 1, H, W) with N > 0, not {tuple(images.shape)}")
    factor = max(1, -(-MIN_SIDE // min(images.shape[2:])))
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tiles = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    less = math.ceil(math.sqrt(len(tiles) * tiles[0].width * tiles[0].height / MAX_PIXELS))
    return tiles if less == 1 else [tile.reduce(less) for tile in tiles]


def _flow(blocks: Sequence[tuple[str, list[Image.Image]]], width: int, ground: str | tuple, ink: str) -> Image.Image:
    """Draw blocks, each a title over a row of pictures of one size, line by line as a text breaks its lines."""
    tile, most = blocks[0][1][0], max(len(tiles) for _, tiles in blocks)
    block = most * (tile.width + GAP) - GAP
    titles = [fitted(title, block) for title, _ in blocks]
    across = min(len(blocks), max(1, width // (block + 3 * GAP)))
    top = LINE * max(1 + title.count("\n") for title in titles) + GAP
    size = across * (block + 3 * GAP), -(-len(blocks) // across) * (top + tile.height + 3 * GAP)
    picture = Image.new("RGBA", size, ground)
    draw = ImageDraw.Draw(picture)
    for number, (title, (_, tiles)) in enumerate(zip(titles, blocks, strict=True)):
        x = GAP + number % across * (block + 3 * GAP)
        y = GAP + number // across * (top + tile.height + 3 * GAP) + top
        draw.multiline_text((x, y - GAP), title, ink, FONT, anchor="ld", spacing=LINE - 14)
        for column, picture_of in enumerate(tiles):
            picture.paste(picture_of, (x + column * (tile.width + GAP), y))
    return picture


def fitted(text: str, width: int, lines: int = 2) -> str:
    """Break a text at its spaces into lines of at most `width` pixels, and cut what does not fit with an ellipsis."""
    words, broken = text.replace("_", " ").split(), [""]
    while words:
        longer = f"{broken[-1]} {words[0]}".strip()
        if FONT.getlength(longer) <= width or not broken[-1]:
            broken[-1] = longer
            words.pop(0)
        elif len(broken) < lines:
            broken.append("")
        else:
            broken[-1] = " ".join((broken[-1], *words))
            break
    return "\n".join(_cut(line, width) for line in broken)


def _cut(line: str, width: int) -> str:
    if FONT.getlength(line) <= width:
        return line
    while line and FONT.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _save_table(rows: list, path: str | os.PathLike, labels: Sequence[str], titles: Sequence[str]) -> None:
    """Write pictures of one size as a table on white, with `labels` left of the rows and `titles` over the columns."""
    width, height = rows[0][0].size
    if any(FONT.getlength(title) > width for title in titles):
        titles = [title.replace(" · ", "\n") for title in titles]
    lines = [line for title in titles for line in title.split("\n")]
    cell = max([width, *(int(FONT.getlength(line)) + GAP for line in lines)])
    left = GAP + max([0, *(int(FONT.getlength(line)) + 3 * GAP for label in labels for line in label.split("\n"))])
    top = GAP + max([0, *(LINE * (title.count("\n") + 1) + GAP for title in titles)])
    columns = max(map(len, rows))
    table = Image.new("RGB", (left + columns * (cell + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(table)
    for column, title in enumerate(titles):
        middle = left + column * (cell + GAP) + cell / 2
        draw.multiline_text((middle, top - GAP), title, INK, FONT, anchor="md", align="center", spacing=4)
    for row, label in enumerate(labels):
        middle = top + row * (height + GAP) + height / 2
        draw.multiline_text((left - 2 * GAP, middle), label, INK, FONT, anchor="rm", align="right", spacing=4)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            x = left + column * (cell + GAP) + (cell - width) // 2
            table.paste(picture, (x, top + row * (height + GAP)))
    with atomic_write(path) as partial:
        table.save(partial, format="PNG")
