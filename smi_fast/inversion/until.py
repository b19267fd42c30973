"""Until: an inversion ends as soon as the model is sure of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Until:
    """The condition on which an image is finished before the last iteration.

    From the last stopping and the last change of the resolution on, the model classifies the kept patches in the plain
    view every so many iterations. An image is finished once the model was sure of its target in several checks in a
    row.

    Args:
        confidence: the probability of the target, in (0, 1), of which a sure model is. For soft labels p and the
            model's probabilities q it is sum_c min(p_c, q_c), which equals q of the target if p is one-hot.
        checks: the number of checks in a row.
        every: the number of iterations from one check to the next. A check costs the host one synchronisation and the
            device about a third of an iteration.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    confidence: float = 0.9
    checks: int = 3
    every: int = 25

    def __post_init__(self):
        if not 0 < self.confidence < 1:
            raise ValueError(f"the confidence that ends an inversion must lie in (0, 1), got {self.confidence}")
        for name, count in (("checks", self.checks), ("every", self.every)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an integer, got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")

    def count(self, confident: Sequence[int], logits: Tensor, targets: Tensor) -> list[int]:
        """Return for each image how many checks in a row the model was sure of its target, from the counts before.

        Args:
            confident: B counts.
            logits: (B, classes), of any floating dtype.
            targets: (B,) int64 classes, or (B, classes) soft labels.
        """
        passed = (certainty(logits.float().softmax(1), targets) >= self.confidence).tolist()
        return [1 + before if now else 0 for before, now in zip(confident, passed, strict=True)]


def certainty(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return how sure a model with these probabilities (B, classes) is of its targets, (B,) int64 classes or (B,
    classes) soft labels, as `Until` defines it: (B,)."""
    if targets.ndim == 1:
        return probabilities.gather(1, targets[:, None])[:, 0]
    return torch.minimum(probabilities, targets).sum(1)


def as_until(until: Until | float | None) -> Until | None:
    """Return a condition unchanged, or make one from the confidence alone.

    Raises:
        TypeError, ValueError: the argument is none of these, or see `Until`.
    """
    if until is None or isinstance(until, Until):
        return until
    if isinstance(until, bool) or not isinstance(until, (int, float)):
        raise TypeError(f"until must be an Until or a confidence in (0, 1), got {until!r}")
    return Until(float(until))
