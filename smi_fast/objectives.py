"""What is minimised: loss terms, and the ready-made objectives made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Objective(Protocol):
    """A loss that is told which pixels are kept; a plain function of (logits, images, targets) does as well."""

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: Tensor | None) -> Tensor:
        """The scalar to minimise.

        Args:
            logits: (B, num_classes), of the images seen through this iteration's view.
            images: (B, C, H, W) float32 in the model's normalised space, in the plain view.
            targets: (B,) int64.
            kept: (B, 1, H, W) bool, True where a pixel's patch is not stopped; None while nothing is stopped.
        """
        ...


# The neighbours that total variation compares: right, down, and the two diagonals. (dy, dx) from the upper pixel.
NEIGHBOURS = ((0, 1), (1, 0), (1, -1), (1, 1))


def total_variation(images: Tensor, kept: Tensor | None = None) -> Tensor:
    """Sum over four neighbour directions of the l2 norm, over the whole batch, of the differences.

    The image prior of DeepInversion (Yin et al., CVPR 2020) as the published sparse inversion uses it. The gradient is
    0 in a direction whose norm is 0.

    Args:
        images: (B, C, H, W).
        kept: (B, 1, H, W) bool; only pairs of pixels that are both kept count. None: all.

    Returns:
        A scalar.
    """
    total = images.new_zeros(())
    for dy, dx in NEIGHBOURS:
        first, second = _shifted(images, dy, dx)
        difference = first - second
        if kept is not None:
            first_kept, second_kept = _shifted(kept, dy, dx)
            difference = difference * (first_kept & second_kept)
        total = total + l2_norm(difference)
    return total


def _shifted(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pixel pairs that are (dy, dx) apart."""
    height, width = x.shape[-2:]
    first = x[..., : height - dy, max(0, -dx) : width - max(0, dx)]
    second = x[..., dy:, max(0, dx) : width - max(0, -dx)]
    return first, second


def l2_norm(x: Tensor) -> Tensor:
    """The l2 norm of all elements together, with gradient 0 (not NaN) at 0."""
    squared = x.square().sum()
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


@dataclass(frozen=True)
class deep_inversion:
    """Mean cross-entropy + tv_l2 * total variation + l2 * norm, the objective of DeepInversion for ViTs.

    Defaults are those of Sparse Model Inversion (ICML 2024). Both priors see kept pixels of the plain image only.
    """

    tv_l2: float = 1e-4
    l2: float = 0.0

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: Tensor | None) -> Tensor:
        loss = F.cross_entropy(logits.float(), targets)
        if self.tv_l2:
            loss = loss + self.tv_l2 * total_variation(images, kept)
        if self.l2:
            loss = loss + self.l2 * l2_norm(images if kept is None else images * kept)
        return loss


def as_objective(objective: Objective | Loss) -> Objective:
    """An objective out of an objective or a plain function of (logits, images, targets).

    Raises:
        TypeError: neither.
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise TypeError(
            f"an objective is a function of (logits, images, targets) or has a method loss, got {objective!r}"
        )
    return _UserLoss(objective)


@dataclass(frozen=True)
class _UserLoss:
    function: Loss

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: Tensor | None) -> Tensor:
        return self.function(logits, images, targets)
