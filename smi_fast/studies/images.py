"""The images of a comparison: inverted images, real images and noise, whole or with a part of their patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from smi_fast.backbones.base import frozen
from smi_fast.data.sparse import InvertedDataset
from smi_fast.runs.inversion import first_of_each_class
from smi_fast.studies.experiment import BATCH, Experiment, Variant
from smi_fast.studies.pictures import GREY, save_grid

MIN_COLUMNS, MAX_WIDTH = 4, 1200  # of a picture, the width in pixels


def inverted_pool(run: Experiment, variant: Variant, rounds: int) -> InvertedDataset:
    """Return the inverted images of all rounds of a transfer."""
    batches = [run.inverted(variant, number, run.settings.samples) for number in range(rounds)]
    return batches[0].join(batches)


def real_images(run: Experiment, count: int, seed: int) -> InvertedDataset:
    """Return random images of the training split."""
    data = run.load("train")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    images, labels = zip(*(data[number] for number in chosen.tolist()), strict=True)
    return whole_images(run, torch.stack(images), torch.tensor(labels))


def noise(run: Experiment, count: int, seed: int) -> Tensor:
    """Draw standard normal noise in normalised space, (count, C, H, W), with which the published code calibrates."""
    shape = (count, run.fast.num_channels, *run.grid.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_images(run: Experiment, images: Tensor, targets: Tensor) -> InvertedDataset:
    """Make a dataset of normalised images with all their patches. Values outside the range of pixels are clamped."""
    return _dataset(run, (images * run.std + run.mean).clamp(0, 1), None, targets)


@torch.no_grad()
def most_attended(run: Experiment, dataset: InvertedDataset, count: int) -> InvertedDataset:
    """Reduce each image to the `count` patches that get the most of the class token's attention."""
    images, keep = dataset.images(), []
    with frozen(run.fast):
        for batch in run.watched(images.split(BATCH)):
            _, attention = run.fast(((batch - run.mean) / run.std).to(run.device), return_attention=True)
            keep.append(attention.topk(count).indices.sort().values.cpu())
    return _dataset(run, images, torch.cat(keep), dataset.targets)


def save_rows(path: Path, sets: dict[str, InvertedDataset], names: Sequence[str]) -> None:
    """Write a PNG with a row of images for each set, labelled with its name, and a column for each class that all sets
    have: ten small images or fewer large ones. `names` are those of the classes."""
    first = [first_of_each_class(dataset.targets) for dataset in sets.values()]
    columns = max(MIN_COLUMNS, MAX_WIDTH // next(iter(sets.values())).image_size[1])
    classes = [label for label in first[0] if all(label in others for others in first)][: min(columns, 10)]
    rows = [
        dataset.images([numbers[label] for label in classes], stopped=GREY)
        for dataset, numbers in zip(sets.values(), first, strict=True)
    ]
    save_grid(torch.cat(rows), path, len(classes), list(sets), [names[label] for label in classes])


def _dataset(run: Experiment, images: Tensor, keep: Tensor | None, targets: Tensor) -> InvertedDataset:
    return InvertedDataset.from_images(images, keep, targets, run.grid.patch_size, run.normalisation)
