"""The pictures of a run of `smi-fast invert`: its images, how they came about, and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import load_state
from smi_fast.packed import PackedTokens
from smi_fast.runs.inversion import SNAPSHOTS
from smi_fast.studies.pictures import GREY, MIN_SIDE, fitted, save_animation, save_classes, save_process
from smi_fast.studies.plots import save_curve

MAX_CLASSES, MAX_COLUMNS = 50, 10  # of images in a picture
MAX_HEIGHT = 1200  # pixels of the images of process.png
LABEL_WIDTH = 120  # pixels of a class's name beside a picture


def numbers_shown(dataset: InvertedDataset) -> list[int]:
    """Return the numbers of the images that are shown: the first ones of the first classes, class by class."""
    classes = list(dict.fromkeys(dataset.targets.tolist()))[:MAX_CLASSES]
    rows = [(dataset.targets == target).nonzero().flatten()[:MAX_COLUMNS].tolist() for target in classes]
    return [number for row in rows for number in row]


def draw(folder: Path, dataset: InvertedDataset, first: dict[str, Any], names: dict[int, str]) -> list[str]:
    """Draw the pictures, and return the names of those that could be drawn."""
    drawn, shown = ["grid.png"], numbers_shown(dataset)
    titles = [names[target] for target in dataset.targets[shown].tolist()]
    save_classes(dataset.images(shown, stopped=GREY), titles, folder / "grid.png")
    if (folder / SNAPSHOTS).exists():
        drawn += draw_process(folder, dataset, names)
    tokens = [count for start, end, count in first["tokens"] for _ in range(start, end)][: len(first["loss"])]
    tokens += tokens[-1:] * (len(first["loss"]) - len(tokens))
    if tokens and save_curve(first["loss"], tokens, folder / "curve.png") is not False:
        drawn.append("curve.png")
    return drawn


def draw_process(folder: Path, dataset: InvertedDataset, names: dict[int, str]) -> list[str]:
    """Draw how the first images came about, as a picture and as an animation, and return the names of the files."""
    snapshots = load_state(folder / SNAPSHOTS)
    frames = snapshots.get("frames")
    if not frames:  # a stream whose images left before, or a run of an earlier version
        return []
    images = [frame_images(frame, dataset) for frame in frames]
    labels = [names[target] for target in dataset.targets[snapshots["numbers"]].tolist()]
    ends = [number for number, frame in enumerate(frames) if frame["is_end"]] or [len(frames) - 1]
    rows = max(1, MAX_HEIGHT // max(MIN_SIDE, dataset.image_size[1]))
    titles = [frame_title(frame, dataset) for frame in frames]
    save_process(
        [images[end][:rows] for end in ends],
        folder / "process.png",
        [titles[end] for end in ends],
        [fitted(label, LABEL_WIDTH, lines=3) for label in labels[:rows]],
    )
    save_animation(images, folder / "process.webp", titles, labels)
    return ["process.png", "process.webp"]


def frame_images(frame: dict[str, Any], dataset: InvertedDataset) -> Tensor:
    """Return the images (N, C, H, W) of a snapshot, with stopped patches dark grey."""
    values, cu_seqlens = frame["values"].float() / 255, frame["cu_seqlens"]
    keep = PackedTokens(values, frame["positions"], cu_seqlens, int(cu_seqlens.diff().max()))
    return dataset.grid.scatter(keep.values, keep, torch.full((keep.batch_size, *dataset.image_size), GREY))


def frame_title(frame: dict[str, Any], dataset: InvertedDataset) -> str:
    """Return the iteration of a snapshot and, if patches can stop, how many patches were left."""
    is_sparse = dataset.grid.num_patches > 1
    return f"iteration {frame['iteration']}" + f" · {frame['patches']:.4g} patches" * is_sparse
