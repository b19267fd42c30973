"""Priors: losses that depend only on the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.kernels.pixels import NEIGHBOURS, pixel_pairs

NORMS = ("batch", "image")
PixelLoss = Callable[[Tensor, Tensor], Tensor]  # a function of images and of the mask of kept pixels


@dataclass(frozen=True)
class ImagePrior:
    """tv_l2 * total variation + l2 * norm of the kept pixels, as in DeepInversion (Yin et al., CVPR 2020, Eq. 3).

    Its gradient is part of the pixels' step (`kernels.pixel_step`). `total_variation` and `l2_norm` define the terms.

    Args:
        tv_l2: weight of the total variation.
        l2: weight of the l2 norm.
        norm: "batch" takes norms over the whole batch, as the published code does. "image" takes them over each image
            and adds up the images, so that no image depends on the others.

    Raises:
        ValueError: a weight is negative or not finite, or the norm is neither of the two.
    """

    tv_l2: float = 1e-4
    l2: float = 0.0
    norm: str = "batch"

    def __post_init__(self):
        for name, value in (("tv_l2", self.tv_l2), ("l2", self.l2)):
            check_coefficient(name, value)
        _check_norm(self.norm)


def total_variation(images: Tensor, kept: Tensor | None = None, norm: str = "batch") -> Tensor:
    """Compute the sum over four neighbour directions (two axes, two diagonals) of the l2 norm of the differences.

    A direction whose norm is 0 has the gradient 0; there, gradients of a higher order are NaN.

    Args:
        images: (B, C, H, W).
        kept: (B, 1, H, W) bool. Only pairs of pixels that are both kept count. None: all pairs count.
        norm: "batch" takes one norm over the batch, "image" adds up the norms over each image.

    Returns:
        A scalar.

    Raises:
        ValueError: another norm.
    """
    return sum(_norm(difference, norm) for difference, _ in _differences(images, kept))


def total_variation_l1(images: Tensor, kept: Tensor | None = None, norm: str = "batch") -> Tensor:
    """Compute the sum over four neighbour directions of the mean absolute difference, as DeepInversion's published code
    does. The mean runs over the pairs that count; a direction without any has 0.

    Arguments and result are those of `total_variation`, with means in the place of norms.
    """
    _check_norm(norm)
    over = None if norm == "batch" else (1, 2, 3)  # dimensions of the mean
    total = images.new_zeros(())
    for difference, counts in _differences(images, kept):
        if counts is None:
            total = total + difference.abs().mean(over).sum()
        else:
            count = images.shape[1] * counts.sum(over)
            total = total + (difference.abs().sum(over) / count.clamp(min=1)).sum()
    return total


def l2_norm(images: Tensor, kept: Tensor | None = None, norm: str = "batch") -> Tensor:
    """Compute the l2 norm of the kept pixels. Arguments and result are those of `total_variation`."""
    return _norm(images if kept is None else torch.where(kept, images, 0.0), norm)


def _differences(images: Tensor, kept: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the differences (B, C, H', W') of the pixel pairs in each direction, 0 where a pair does not count, and
    which pairs count, (B, 1, H', W') bool, or None if all do."""
    for dy, dx in NEIGHBOURS:
        first, second = pixel_pairs(images, dy, dx)
        if kept is None:
            yield first - second, None
        else:
            counts = torch.logical_and(*pixel_pairs(kept, dy, dx))
            yield torch.where(counts, first - second, 0.0), counts


def _norm(x: Tensor, norm: str) -> Tensor:
    _check_norm(norm)
    return torch.linalg.vector_norm(x) if norm == "batch" else torch.linalg.vector_norm(x.flatten(1), dim=1).sum()


def check_coefficient(name: str, value: float) -> None:
    """Raise ValueError, naming the weight of a term, if it is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
