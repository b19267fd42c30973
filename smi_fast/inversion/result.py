"""What an inversion hands out: a `Step` after each iteration, and the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smi_fast.inversion.state import InversionState, Stage


@dataclass(frozen=True)
class Step:
    """The information that a callback gets after an iteration. Creating it does not synchronise."""

    iteration: int  # from 0
    stage: Stage
    loss: Tensor  # scalar, on the device
    _state: InversionState = field(repr=False)
    _started: float = field(repr=False)
    _save: Callable[[], dict[str, Any]] = field(repr=False)

    @property
    def tokens(self) -> float:
        """Tokens per image in this iteration, on average if images differ."""
        return self.stage.tokens

    @property
    def keep(self) -> Tensor | list[Tensor]:
        """The patches of `images`: (N, K) int64, or a list of N index tensors if images differ."""
        return self._state.kept()

    def images(self) -> Tensor:
        """Return the images as they are now: (N, C, H, W) in [0, 1], with stopped patches black, in the order of
        `InversionResult.images`.

        Pixels that are NaN or infinite are returned as they were when the stage began.
        """
        return self._state.results()

    @property
    def targets(self) -> Tensor:
        """The targets of the B images that are inverted, on the device."""
        return self._state.targets

    @property
    def numbers(self) -> list[int]:
        """The numbers of the B images that are inverted: the places of their targets among those of the run. In a
        stream they are those of the images in this batch."""
        return list(self._state.numbers)

    @property
    def is_last(self) -> bool:
        """Whether this is the last of the iterations of a run. A run with `until` may end before."""
        return self.iteration + 1 == len(self._state.losses)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that the run or the stream needs to go on from here, in this process or another,
        to be called while the callback has this step. `Inverter.run` or `Inverter.stream` takes it as `state`.

        It is a dict of tensors, numbers, texts, None, lists and dicts, which `torch.save` can save and
        `torch.load(..., weights_only=True)` can read. The state of a stream holds the finished images too.
        """
        return self._save()

    def seconds(self) -> float:
        """Return the seconds since the run began. The host waits for the device."""
        if self.loss.is_cuda:
            torch.cuda.synchronize(self.loss.device)
        return time.perf_counter() - self._started


@dataclass(frozen=True)
class InversionResult:
    """The result of an inversion.

    Args:
        images: (N, C, H, W) float32 in [0, 1] on the CPU, with stopped patches black. Pixels that have become NaN or
            infinite are returned as they were when the last stage began, and a warning says so. N is the number of
            targets or, with a `RebirthSchedule`, v times that number: first the images of all targets that were
            released first, and so on.
        keep: (N, K) int64, the patches that were never stopped, or a list of N index tensors if images differ.
        targets: (N,) int64, or (N, classes) float32 if the targets are soft labels.
        losses: (iterations,) float32, one for every iteration that ran.
        history: the stages that ran. If the run was interrupted or ended early, the last one is cut short.
        patch_size: (height, width) of a patch in pixels.
        interrupted: whether Ctrl-C ended the run early.
        iterations: (N,) int64, the number of iterations that each image was inverted for.
        verified: the iterations at which the verifier, if there is one, classified the images, and the share of images
            that it classified as their target. The last record is that of these images, also after Ctrl-C.
    """

    images: Tensor
    keep: Tensor | list[Tensor]
    targets: Tensor
    losses: Tensor
    history: list[Stage]
    patch_size: tuple[int, int]
    interrupted: bool = False
    iterations: Tensor | None = None
    verified: Sequence[tuple[int, float]] = ()


class NonFiniteError(RuntimeError):
    """Raised by `Inverter.run` if the attention is NaN or infinite at a stopping, so that no patch can be selected.

    Attributes:
        iteration: the iteration of the stopping.
        result: the `InversionResult` of the iterations before it. Pixels that are no longer finite are returned in it
            as they were when the last stage began.
    """

    def __init__(self, iteration: int, result: InversionResult):
        since = "" if result.losses.isfinite().all() else f"; the loss is {first_non_finite(result.losses)} on"
        super().__init__(
            f"at iteration {iteration} no patch can be selected, because the attention is NaN or infinite{since}"
        )
        self.iteration, self.result = iteration, result


def result_of(state: InversionState, interrupted: bool = False) -> InversionResult:
    """Return the result of the iterations that a state has done."""
    done, keep = state.iteration, state.kept()
    copies = 1 + len(state.released)
    return InversionResult(
        images=state.results().cpu(),
        keep=keep.cpu() if isinstance(keep, Tensor) else [row.cpu() for row in keep],
        targets=state.targets.cpu().repeat(copies, *[1] * (state.targets.ndim - 1)),
        losses=state.losses[:done].cpu(),
        history=[replace(stage, end=min(stage.end, done)) for stage in state.history if stage.start < done],
        patch_size=state.grid.patch_size,
        interrupted=interrupted,
        iterations=torch.full((copies * state.batch_size,), done),
        verified=list(state.verified),
    )


def finished(state: InversionState, interrupted: bool = False) -> InversionResult:
    """Return the result of a state, and warn if some of it is not finite."""
    result, lost = result_of(state, interrupted), int(state.images().isfinite().logical_not().sum())
    if not result.losses.isfinite().all():
        warnings.warn(f"the loss is {first_non_finite(result.losses)} on", stacklevel=3)
    elif lost:
        warnings.warn(
            f"{lost} pixels are NaN or infinite and are given as they were when the last stage began", stacklevel=3
        )
    return result


def first_non_finite(losses: Tensor) -> str:
    """Describe the first of the losses (iterations,) that is not finite, for example "nan from iteration 12"."""
    first = int((~losses.isfinite()).nonzero()[0])
    return f"{losses[first].item()} from iteration {first}"
