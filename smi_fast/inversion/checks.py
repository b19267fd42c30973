"""What a user passes to an inversion, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from smi_fast.backbones.base import Backbone

SUM_TOLERANCE = 1e-3  # of the probabilities of soft labels


def check_numbers(iterations: int, lr: float, betas: tuple[float, float], flip: float, verify_every: int) -> None:
    """Check the numbers among the settings of an inversion.

    Raises:
        TypeError, ValueError: one is of the wrong type or out of range. The message names it.
    """
    for name, count in (("iterations", iterations), ("verify_every", verify_every)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must lie in [0, 1], got {flip}")


def check_functions(**functions: object) -> None:
    """Raise TypeError, naming the argument, if one is neither a function nor None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")


def check_jitter(jitter: float | int, image_size: Sequence[int]) -> float | int:
    """Check the largest shift of a view, a share of the image's side or an integer number of pixels, and return it.

    Raises:
        ValueError: it is negative or larger than the image.
    """
    if isinstance(jitter, Integral) and not isinstance(jitter, bool):
        if not 0 <= jitter <= min(image_size):
            raise ValueError(f"jitter must lie in 0 to {min(image_size)} pixels, got {jitter}")
        return int(jitter)
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter must be a share in [0, 1] or an integer number of pixels, got {jitter}")
    return float(jitter)


def check_pooling(
    pooling: Mapping[int, int] | None, backbone: Backbone, image_size: Sequence[int], iterations: int
) -> dict[int, int]:
    """Check by which factors the images are pooled from which iterations on, and return the iterations at which the
    factor changes, in order.

    Raises:
        TypeError: it is no mapping.
        ValueError: an iteration or a factor is out of range, a factor does not divide the images, or the model does not
            take whole images or images as small as this.
    """
    if not isinstance(pooling, Mapping | None):
        raise TypeError(f"pooling maps iterations to factors, got {pooling!r}")
    for iteration, factor in (pooling or {}).items():
        if not (isinstance(iteration, int) and 0 <= iteration < iterations):
            raise ValueError(f"pooling begins at iteration {iteration!r}, expected one of 0 to {iterations - 1}")
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"pooling at iteration {iteration} must be an integer from 1 on, got {factor!r}")
        if any(side % factor for side in image_size):
            size = "x".join(map(str, image_size))
            raise ValueError(f"images of {size} pixels cannot be pooled by {factor}, which does not divide them")
        if factor > 1 and backbone.grid(image_size).num_patches > 1:
            raise ValueError(
                f"images cannot be pooled by {factor}: the model takes patches of one size, not whole images"
            )
        backbone.grid([side // factor for side in image_size])
    factors, before = {}, 1
    for iteration, factor in sorted((pooling or {}).items()):
        if factor != before:
            factors[iteration] = before = factor
    return factors


def check_verifier(verifier: Backbone, backbone: Backbone, image_size: Sequence[int]) -> Backbone:
    """Check that a network can classify the images of an inversion, and return it.

    Raises:
        ValueError: it has other classes or channels, is on another device, or does not take images of this size.
    """
    for what in ("num_classes", "num_channels", "device"):
        theirs, ours = getattr(verifier, what), getattr(backbone, what)
        if theirs != ours:
            raise ValueError(f"the verifier's {what} is {theirs}, the inverted model's is {ours}")
    verifier.grid(image_size)
    return verifier


def check_normalization(
    backbone: Backbone, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, the model's own where None is given.

    Raises:
        ValueError: their number is not the model's number of channels, or a standard deviation is not positive.
    """
    mean = tuple(map(float, backbone.mean if mean is None else mean))
    std = tuple(map(float, backbone.std if std is None else std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != backbone.num_channels:
            raise ValueError(f"{name} has {len(values)} values, the model has {backbone.num_channels} channels")
    if not min(std) > 0:
        raise ValueError(f"std must be positive, got {std}")
    return mean, std


def check_views(views: Tensor, iterations: int, batch_size: int) -> Tensor:
    """Check what a user's function of views has returned, and return it as int32.

    Raises:
        ValueError: it has another shape or dtype.
    """
    shapes = (iterations, 3), (iterations, batch_size, 3)
    if (
        not isinstance(views, Tensor)
        or tuple(views.shape) not in shapes
        or views.dtype not in (torch.int32, torch.int64)
    ):
        found = f"{tuple(views.shape)} {views.dtype}" if isinstance(views, Tensor) else f"a {type(views).__name__}"
        raise ValueError(f"views returned {found}, expected integers {shapes[0]} or {shapes[1]}")
    return views.to("cpu", torch.int32)


def check_start(start: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Check the images that a run starts from, and return them.

    Raises:
        ValueError: they have another shape, are no floats, or are not finite.
    """
    if start is None:
        return None
    if not isinstance(start, Tensor) or tuple(start.shape) != shape or not start.is_floating_point():
        found = f"{tuple(start.shape)} {start.dtype}" if isinstance(start, Tensor) else f"a {type(start).__name__}"
        raise ValueError(f"start is {found}, expected floats {shape}")
    if not start.isfinite().all():
        raise ValueError("start holds pixels that are NaN or infinite")
    return start.detach()


def check_targets(targets: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """Check the targets of a batch: return (B,) int64 classes, or (B, classes) float32 soft labels.

    Raises:
        ValueError: there are none, a target is no class, or soft labels are no distribution. The message names the
            first that is wrong.
    """
    targets = torch.as_tensor(targets).detach()
    if targets.is_floating_point() and targets.ndim == 2:
        return _check_soft_labels(targets, num_classes)
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, expected (B,) with at least one, or soft labels (B, classes)"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}, expected integers, or soft labels (B, classes)")
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero()
    if len(wrong):
        number = int(wrong[0])
        raise ValueError(f"target {int(targets[number])} (number {number}) is no class of the model's {num_classes}")
    return targets.long()


def _check_soft_labels(labels: Tensor, num_classes: int) -> Tensor:
    if len(labels) == 0 or labels.shape[1] != num_classes:
        raise ValueError(f"soft labels have shape {tuple(labels.shape)}, expected (B, {num_classes}) with at least one")
    labels = labels.float()
    for number, row in enumerate(labels):
        total = row.sum().item()
        if not (row >= 0).all() or not abs(total - 1) <= SUM_TOLERANCE:
            raise ValueError(
                f"soft label {number} is no distribution: its least element is {row.min().item():g}, its sum {total:g}"
            )
    return labels


def check_state(state: Mapping[str, Any], kind: str, version: int) -> None:
    """Check that this is a saved state of a kind and a version.

    Raises:
        TypeError, ValueError: it is not. The message says what it is.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what Step.state_dict() returned, got a {type(state).__name__}")
    if state.get("version") != version:
        raise ValueError(f"the state is of version {state.get('version')}, this code reads version {version}")
    if state.get("kind") != kind:
        raise ValueError(f"the state is of a {state.get('kind')}, which Inverter.{kind} cannot go on from")


def check_same_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first setting of ours that is another one in a saved state."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(f"the state is of an inversion whose {name} is {theirs.get(name)}, not {value}")


def check_same_targets(ours: Tensor, theirs: Tensor) -> None:
    """Raise ValueError, naming the first difference, if the targets of a saved state are not ours."""
    if ours.shape != theirs.shape:
        shapes = tuple(theirs.shape), tuple(ours.shape)
        raise ValueError("the state is of an inversion whose targets have shape {}, not {}".format(*shapes))
    wrong = (ours != theirs).view(len(ours), -1).any(1).nonzero()
    if len(wrong):
        number = int(wrong[0])
        values = theirs[number].tolist(), ours[number].tolist()
        raise ValueError("the state is of an inversion whose target {} is {}, not {}".format(number, *values))


def check_weights(models: Sequence[Backbone]) -> None:
    """Check that all weights of the inverted model and of those that its objective runs are finite, and all buffers
    such as the statistics of BatchNorm.

    Raises:
        ValueError: a weight is not. The message names it.
    """
    for number, model in enumerate(models):
        weights = [*model.named_parameters(), *model.named_buffers()]
        names, tensors = zip(*[(name, x) for name, x in weights if x.is_floating_point()], strict=True)
        counts = torch.stack([tensor.detach().isfinite().logical_not().sum() for tensor in tensors]).tolist()
        for name, count in zip(names, counts, strict=True):
            if count:
                whose = f"the objective's {type(model).__name__}'s" if number else "the model's"
                name = name.removeprefix("model.")  # as the wrapped model calls it
                raise ValueError(f"{whose} weight {name} holds {count} values that are NaN or infinite")
