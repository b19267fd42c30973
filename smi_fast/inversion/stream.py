"""Slots: many images through a few places of a batch. A finished image leaves, and the next one takes its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smi_fast.backbones.pruning import Mass
from smi_fast.inversion.checks import check_same_settings, check_same_targets, check_state
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.priors import ImagePrior
from smi_fast.inversion.result import InversionResult, Step, finished
from smi_fast.inversion.state import VERSION, InversionState

PIECES = ("images", "keep", "iterations")  # of a finished image


class Slots:
    """The images of a run that have passed the last stopping, in the slots of one batch.

    Images begin in batches and go through the stoppings together. After the last one they all keep equally many
    patches, so that an image can take the place of another without a change of shapes.

    Args:
        loop: the loop of an inverter that has an `Until`.
        targets: (N,) or (N, classes), of all images.
        batch_size: the number of slots.
        seed: the seed of the run.
        watch: whether what sees the steps may change the model.

    Attributes:
        begun: the number of images that have left the queue.
        state: the images in the slots.
        reserve: images that take the place of finished ones as soon as they have passed the last stopping, or None.
        waiting: the rows of `reserve` that no slot has taken yet.
        results: the finished images by their numbers, on the CPU. `_result` describes them.
    """

    def __init__(self, loop: Loop, targets: Tensor, batch_size: int, seed: int, watch: bool):
        self.loop, self.targets, self.batch_size, self.seed, self.watch = loop, targets, batch_size, seed, watch
        self.begun = 0
        self.state = self._with_all_losses(self._next())
        self.reserve: InversionState | None = None
        self.waiting: list[int] = []
        self.results: dict[int, dict[str, Any]] = {}

    def _next(self) -> InversionState:
        """Take the next images from the queue."""
        numbers = range(self.begun, min(self.begun + self.batch_size, len(self.targets)))
        self.begun += len(numbers)
        return self._begin(numbers)

    def _begin(self, numbers: Sequence[int]) -> InversionState:
        return self.loop.begin_each(self.targets[list(numbers)], self.seed, numbers)

    def _with_all_losses(self, state: InversionState) -> InversionState:
        """Give a state that takes images in room for the losses of all iterations."""
        # While images wait, all slots are taken, and each image waits for at most one check.
        settings = self.loop.settings
        longest = (settings.iterations + settings.until.every) * (len(self.targets) // self.batch_size + 2)
        state.losses = torch.cat((state.losses, state.losses.new_zeros(longest)))
        return state

    def iterations(self) -> Iterator[Step]:
        """Invert all images until the model is sure of them, or their iterations are over, and yield a `Step` after
        each iteration. It begins where `load_state_dict` has left off."""
        settings, batch = self.loop.settings, None
        yield from self._settle(self.state)
        if self.reserve is not None:
            yield from self._settle(self.reserve)
        while True:
            if self.loop.is_due(self.state):
                yield from self._refill()
            if not self.state.batch_size:
                return
            if self.state is not batch:
                batch = self.state
                replayed = self.loop.replayed(partial(self.loop.step, batch), self.watch)
            replayed(batch.current)
            batch.advance()
            self._keep(slot for slot, age in enumerate(batch.ages) if age == settings.iterations)
            if self.loop.is_due(batch):
                batch.confident = self.loop.check(batch)
                self._keep(slot for slot, checks in enumerate(batch.confident) if checks >= settings.until.checks)
            done = batch.iteration - 1
            yield Step(done, batch.history[-1], batch.losses[done], batch, self.loop.started, self.state_dict)

    def _settle(self, state: InversionState) -> Iterator[Step]:
        """Bring images to the last stage."""
        *earlier, last = self.loop.settings.stages
        for step in self.loop.iterations(state, earlier, watch=self.watch):
            yield replace(step, _save=self.state_dict)
        self.loop.enter(state, last)

    def _keep(self, slots: Iterable[int]) -> None:
        """Keep the results of the images in some slots, which are finished. They wait there for the next check, so that
        all images are checked after the same numbers of iterations."""
        for slot in slots:
            number = self.state.numbers[slot]
            if number not in self.results:
                self.results[number] = self._result(slot)

    def _refill(self) -> Iterator[Step]:
        """Give the slots of finished images to the next images. Without one, the batch gets smaller."""
        empty = []
        for slot, number in enumerate(self.state.numbers):
            if number not in self.results:
                continue
            if not self.waiting and self.begun < len(self.targets):
                self.reserve = self._next()
                self.waiting = list(range(self.reserve.batch_size))
                yield from self._settle(self.reserve)
            if self.waiting:
                self.state.put(slot, self.reserve, self.waiting.pop(0))
            else:
                empty.append(slot)
        if not self.waiting:
            self.reserve = None
        if empty:
            self.state = self.state.take([slot for slot in range(self.state.batch_size) if slot not in empty])

    def _result(self, slot: int) -> dict[str, Any]:
        """Return the image in a slot as a part of the result: the images that it has become, (releases + 1, C, H, W) in
        [0, 1], the patches that each of them keeps, a list of tensors, and the number of its iterations."""
        found = finished(self.state.take([slot]))
        return {
            "images": found.images,
            "keep": [row.clone() for row in found.keep],  # which do not share memory
            "iterations": self.state.ages[slot],
        }

    def result(self, interrupted: bool) -> InversionResult:
        """Return the results of all images in the order of the targets. Images that still have a slot are returned as
        they are."""
        found = self.results | {
            number: self._result(slot) for slot, number in enumerate(self.state.numbers) if number not in self.results
        }
        numbers, copies = sorted(found), range(1 + len(self.state.released))
        images, keep = ([found[number][name][copy] for copy in copies for number in numbers] for name in PIECES[:2])
        iterations = torch.tensor([found[number]["iterations"] for number in numbers])
        last = int(iterations.max())
        return InversionResult(
            images=torch.stack(images),
            keep=torch.stack(keep) if len({len(row) for row in keep}) == 1 else keep,
            targets=self.targets[numbers].cpu().repeat(len(copies), *[1] * (self.targets.ndim - 1)),
            losses=self.state.losses[: self.state.iteration].cpu(),
            history=[replace(stage, end=min(stage.end, last)) for stage in self.state.history if stage.start < last],
            patch_size=self.state.grid.patch_size,
            interrupted=interrupted,
            iterations=iterations.repeat(len(copies)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a stream needs to go on, as `InversionState.state_dict` does. The finished images are
        shared with the stream, which never changes them, and everything else is a copy."""
        return {
            "version": VERSION,
            "kind": "stream",
            "batch_size": self.batch_size,
            "targets": self.targets.clone(),
            "begun": self.begun,
            "waiting": list(self.waiting),
            "slots": self.state.state_dict(),
            "reserve": None if self.reserve is None else self.reserve.state_dict(),
            "results": [{"number": number, **found} for number, found in self.results.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            TypeError, ValueError: see `InversionState.load_state_dict`, or the batch size differs.
        """
        check_state(state, "stream", VERSION)
        check_same_settings({"batch_size": self.batch_size}, state)
        check_same_targets(self.targets, state["targets"].to(self.targets.device))
        slots, reserve = state["slots"], state["reserve"]
        self.state = self._with_all_losses(self._begin(slots["numbers"]))
        self.state.load_state_dict(slots)
        if reserve is not None:
            self.reserve = self._begin(reserve["numbers"])
            self.reserve.load_state_dict(reserve)
        self.begun, self.waiting = state["begun"], list(state["waiting"])
        self.results = {found["number"]: {name: found[name] for name in PIECES} for found in state["results"]}


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
