"""Objectives: losses of a model's outputs that an inversion minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.backbones.base import Outputs
from smi_fast.backbones.batch_norm import BatchNormStatistics
from smi_fast.inversion.priors import NORMS, ImagePrior, check_coefficient, l2_norm, total_variation, total_variation_l1
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
            targets: (B,) int64, the classes, or (B, classes) float32, soft labels.
        """
        ...


def classification(outputs: Outputs, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of the logits and the targets, (B,) classes or (B, classes) soft labels, as the "mean"
    or "sum" over the images."""
    if targets.is_floating_point():
        exact = torch.promote_types(outputs.logits.dtype, torch.float32)
        return F.cross_entropy(outputs.logits.to(exact), targets.to(exact), reduction=reduction)
    backend = outputs.backend if outputs.logits.shape[1] <= MAX_CHANNELS else "auto"  # which has no limit
    return cross_entropy(outputs.logits, targets, reduction=reduction, backend=backend)


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
        return classification(outputs, targets, "mean" if self.norm == "batch" else "sum")


@dataclass(frozen=True)
class deep_inversion_cnn:
    """DeepInversion's loss of a CNN with BatchNorm (Yin et al., CVPR 2020, Eq. 2 to 4): the cross-entropy, the distance
    between the statistics of the batch and those that the BatchNorm layers have learnt, and priors of the images.

    For the input of layer l, the distance r_l is ||running_var - var||_2 + ||running_mean - mean||_2, with the mean
    and the biased variance of each channel over the batch and all places, and norms over the channels. The term is
    batch_norm * (first_batch_norm * r_1 + r_2 + r_3 + ...). As in the published code, the priors are those of the
    images as the model sees them, rolled and mirrored, and the total variation runs over the whole batch.

    The defaults are the settings of the published command for ImageNet. The paper's settings for CIFAR-10 are
    `deep_inversion_cnn(batch_norm=10, first_batch_norm=1, tv_l2=2.5e-5, l2=0, l2_norm="batch")`.

    Args:
        batch_norm: weight of the BatchNorm term. With 0 the objective asks for no statistics.
        first_batch_norm: factor of the first layer within that term.
        tv_l1, tv_l2: weights of `total_variation_l1` and `total_variation`.
        l2: weight of the l2 norm.
        l2_norm: "image" takes the mean over the batch of each image's norm, "batch" one norm over the whole batch.

    Raises:
        ValueError: a weight is negative or not finite, or `l2_norm` is neither of the two.
    """

    batch_norm: float = 0.01
    first_batch_norm: float = 10.0
    tv_l1: float = 0.0
    tv_l2: float = 1e-4
    l2: float = 1e-5
    l2_norm: str = "image"

    def __post_init__(self):
        for name in ("batch_norm", "first_batch_norm", "tv_l1", "tv_l2", "l2"):
            check_coefficient(name, getattr(self, name))
        if self.l2_norm not in NORMS:
            raise ValueError(f"l2_norm must be one of {', '.join(NORMS)}, got {self.l2_norm!r}")

    @property
    def features(self) -> tuple[str, ...]:
        """The statistics that the objective asks the backbone for."""
        return ("batch_norm",) if self.batch_norm else ()

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the loss of the targets: (B,) int64, or soft labels (B, num_classes)."""
        loss = classification(outputs, targets)
        if self.batch_norm:
            if not outputs.batch_norm:
                raise ValueError(
                    "there are no statistics of BatchNorm: the model's forward pass reaches no BatchNorm2d"
                )
            first, *others = (_distance(layer) for layer in outputs.batch_norm)
            loss = loss + self.batch_norm * sum(others, self.first_batch_norm * first)
        if self.tv_l1 or self.tv_l2 or self.l2:
            loss = loss + self._prior(outputs)
        return loss

    def _prior(self, outputs: Outputs) -> Tensor:
        images, kept = outputs.seen()
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        kept = None if outputs.grid.num_patches == 1 else kept  # then all of each image is kept
        prior = images.new_zeros(())
        if self.tv_l1:
            prior = prior + self.tv_l1 * total_variation_l1(images, kept)
        if self.tv_l2:
            prior = prior + self.tv_l2 * total_variation(images, kept)
        if self.l2:
            count = len(images) if self.l2_norm == "image" else 1
            prior = prior + self.l2 * l2_norm(images, kept, self.l2_norm) / count
        return prior


def _distance(layer: BatchNormStatistics) -> Tensor:
    """Return r_l of a layer, a scalar."""
    mean, var = layer.mean, layer.var
    of_var = torch.linalg.vector_norm(layer.running_var.to(var.dtype) - var)
    return of_var + torch.linalg.vector_norm(layer.running_mean.to(mean.dtype) - mean)


def features_of(objective: Objective | Loss) -> tuple[str, ...]:
    """Return the names of the places in the model that an objective reads.

    Raises:
        TypeError: they are given as one text.
    """
    features = getattr(objective, "features", ())
    if isinstance(features, str):
        raise TypeError(f"an objective's features are a sequence of names, got the text {features!r}")
    return tuple(features)


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
