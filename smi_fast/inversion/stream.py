"""Slots: many images through a few places of a batch. A finished image leaves, and the next one takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smi_fast.backbones.pruning import Mass
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.priors import ImagePrior
from smi_fast.inversion.progress import Bar
from smi_fast.inversion.result import InversionResult, Step, finished
from smi_fast.inversion.state import InversionState


class Slots:
    """The images of a run that have passed the last stopping, in the slots of one batch.

    Images begin in batches and go through the stoppings together. After the last one they all keep equally many
    patches, so that an image can take the place of another without a change of shapes.

    Args:
        loop: the loop of an inverter that has an `Until`.
        targets: (N,) or (N, classes), of all images.
        batch_size: the number of slots.
        seed: the seed of the run.
        callback: called with a `Step` after every iteration, or None.
    """

    def __init__(
        self, loop: Loop, targets: Tensor, batch_size: int, seed: int, callback: Callable[[Step], None] | None
    ):
        self.loop, self.targets, self.batch_size, self.seed = loop, targets, batch_size, seed
        self.tell, self.watch = callback or (lambda step: None), callback is not None
        self.begun = 0  # images that have left the queue
        self.waiting: list[int] = []  # rows of `reserve` that no slot has taken yet
        self.reserve: InversionState | None = None
        self.state = self._next()
        self.results: dict[int, InversionResult] = {}  # by the number of the image
        # While images wait, all slots are taken, and each image waits for at most one check.
        longest = (loop.settings.iterations + loop.settings.until.every) * (len(targets) // batch_size + 2)
        self.state.losses = torch.cat((self.state.losses, self.state.losses.new_zeros(longest)))

    def _next(self) -> InversionState:
        """Take the next images from the queue."""
        numbers = range(self.begun, min(self.begun + self.batch_size, len(self.targets)))
        self.begun += len(numbers)
        return self.loop.begin_each(self.targets[numbers.start : numbers.stop], self.seed, numbers)

    def _settle(self, state: InversionState) -> None:
        """Bring images to the last stage."""
        *earlier, last = self.loop.settings.stages
        for step in self.loop.iterations(state, earlier, watch=self.watch):
            self.tell(step)
        self.loop.enter(state, last)

    def run(self, bar: Bar) -> None:
        """Invert all images until the model is sure of them, or their iterations are over."""
        until = self.loop.settings.until
        self._settle(self.state)
        replayed = self.loop.replayed(partial(self.loop.step, self.state), self.watch)
        while self.state.batch_size:
            state = self.state
            for _ in range(until.every):
                replayed(state.current)
                state.advance()
                loss = state.losses[state.iteration - 1]
                self.tell(Step(state.iteration - 1, state.history[-1], loss, state, self.loop.started))
                self._keep(slot for slot, age in enumerate(state.ages) if age == self.loop.settings.iterations)
            state.confident = self.loop.check(state)
            self._keep(slot for slot, checks in enumerate(state.confident) if checks >= until.checks)
            bar.update(len(self.results) - bar.n)
            self._refill([slot for slot, number in enumerate(state.numbers) if number in self.results])
            if self.state is not state:
                replayed = self.loop.replayed(partial(self.loop.step, self.state), self.watch)

    def _keep(self, slots: Iterable[int]) -> None:
        """Keep the results of the images in some slots, which are finished. They wait there for the next check, so that
        all images are checked after the same numbers of iterations."""
        for slot in slots:
            self.results.setdefault(self.state.numbers[slot], self._result(slot))

    def _refill(self, slots: Sequence[int]) -> None:
        """Give some slots to the next images. Without one, the batch gets smaller."""
        empty = []
        for slot in slots:
            if not self.waiting and self.begun < len(self.targets):
                self.reserve = self._next()
                self._settle(self.reserve)
                self.waiting = list(range(self.reserve.batch_size))
            if self.waiting:
                self.state.put(slot, self.reserve, self.waiting.pop(0))
            else:
                empty.append(slot)
        if empty:
            self.state = self.state.take([slot for slot in range(self.state.batch_size) if slot not in empty])

    def _result(self, slot: int) -> InversionResult:
        state = self.state.take([slot])
        return replace(finished(state, False, ()), iterations=torch.tensor(state.ages).repeat(1 + len(state.released)))

    def result(self, interrupted: bool) -> InversionResult:
        """Return the results of all images in the order of the targets. Images that still have a slot are returned as
        they are."""
        found = self.results | {
            number: self._result(slot) for slot, number in enumerate(self.state.numbers) if number not in self.results
        }
        parts = [found[number] for number in sorted(found)]
        copies = range(len(parts[0].images))
        keep = [part.keep[copy] for copy in copies for part in parts]
        return InversionResult(
            images=torch.stack([part.images[copy] for copy in copies for part in parts]),
            keep=torch.stack(keep) if len({len(row) for row in keep}) == 1 else keep,
            targets=torch.stack([part.targets[copy] for copy in copies for part in parts]),
            losses=self.state.losses[: self.state.iteration].cpu(),
            history=parts[0].history,
            patch_size=parts[0].patch_size,
            interrupted=interrupted,
            iterations=torch.stack([part.iterations[copy] for copy in copies for part in parts]),
        )


def has_independent_images(inverter: Any) -> bool:
    """Return whether no image of a batch depends on the others, as far as objective and prior say."""
    fused = inverter.prior is None or (isinstance(inverter.prior, ImagePrior) and inverter.prior.norm == "image")
    return fused and getattr(inverter.objective, "norm", None) == "image"


def check_streams(inverter: Any, batch_size: int) -> None:
    """Check that the images of an inverter can leave one by one.

    Raises:
        TypeError, ValueError: they cannot. The message says why.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if inverter.until is None:
        raise ValueError("images can leave one by one only if until= says when they are finished")
    if not has_independent_images(inverter):
        raise ValueError(
            'images can leave one by one only if none depends on the others, as with deep_inversion(norm="image")'
        )
    if inverter.published:
        raise ValueError("images cannot leave one by one with published=True: the published code has no early end")
    if any(isinstance(stop, Mass) for stop in inverter.stopping.stops.values()):
        raise ValueError(
            "images can leave one by one only if they keep equally many patches, which a Mass does not give"
        )
    if inverter.views is not None or inverter.verifier is not None:
        raise ValueError(
            "images that leave one by one have views of their own and no verifier: leave views= and verifier= out"
        )
