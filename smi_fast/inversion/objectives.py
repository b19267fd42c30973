"""Objectives: losses of a model's outputs that an inversion minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from smi_fast.backbones.base import Outputs
from smi_fast.inversion.priors import ImagePrior
from smi_fast.kernels import cross_entropy
from smi_fast.kernels.norm import MAX_CHANNELS

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # a function of logits, images and targets


@runtime_checkable
class Objective(Protocol):
    """A loss of a model's outputs. A plain function of (logits, images, targets) can be used instead.

    An objective may have these attributes: `features`, the names of the places in the model whose tokens it reads, as
    the backbone's `outputs` takes them; `prior`, an `ImagePrior` or a function, which a run uses unless it is given
    another prior; `models`, further backbones that it runs, which are frozen during a run; and `check`, a function of
    the `Inverter`, called when that is made, which raises ValueError if the objective does not fit it.
    """

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the scalar to minimise.

        Args:
            outputs: the model's outputs for the images as they are seen through this iteration's view.
            targets: (B,) int64, the classes.
        """
        ...


@dataclass(frozen=True)
class deep_inversion:
    """The classification loss and image prior of DeepInversion (Yin et al., CVPR 2020, Eq. 2 and 3) without its term of
    BatchNorm statistics, which ViTs do not have: cross-entropy + tv_l2 * total variation + l2 * l2 norm.

    With norm="batch" (published) the cross-entropy is a mean over the batch and the norms run over all of it. With
    norm="image" the loss is the sum over images of each image's own loss, so that no image depends on the others.

    Args:
        tv_l2, l2, norm: see `ImagePrior`.

    Raises:
        ValueError: see `ImagePrior`.
    """

    tv_l2: float = 1e-4
    l2: float = 0.0
    norm: str = "batch"

    def __post_init__(self):
        _ = self.prior  # checks the numbers

    @property
    def prior(self) -> ImagePrior:
        """The prior of the pixels."""
        return ImagePrior(self.tv_l2, self.l2, self.norm)

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the targets."""
        reduction = "mean" if self.norm == "batch" else "sum"
        backend = outputs.backend if outputs.logits.shape[1] <= MAX_CHANNELS else "auto"  # which has no limit
        return cross_entropy(outputs.logits, targets, reduction=reduction, backend=backend)


def as_loss(objective: Objective | Loss) -> Callable[[Outputs, Tensor, Tensor], Tensor]:
    """Return a function of (outputs, images, targets) that computes the loss of an objective or of a plain function.

    Raises:
        TypeError: `objective` is neither.
    """
    is_class = isinstance(objective, type)  # such as deep_inversion without its brackets
    if isinstance(objective, Objective) and not is_class:
        return lambda outputs, images, targets: objective.loss(outputs, targets)
    if not callable(objective) or is_class:
        raise TypeError(
            f"an objective is a function of (logits, images, targets) or has a method loss, got {objective!r}"
        )
    return lambda outputs, images, targets: objective(outputs.logits, images, targets)
