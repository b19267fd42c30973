"""The progress bar of an inversion."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from smi_fast.bars import ProgressBar
from smi_fast.inversion.state import Stage


class Bar(ProgressBar):
    """A progress bar that shows the loss a few times a second. It never waits for a loss to arrive on the host."""

    _asked = 0.0  # when the loss was last asked for
    _loss: Tensor | None = None  # on the host
    _arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, total: int, initial: int, shown: bool, unit: str = "it") -> Bar:
        """Return a bar for so many iterations or images, of which some are done."""
        return cls(desc="inverting", shown=shown, total=total, initial=initial, unit=unit)

    def advance(self, stage: Stage, loss: Tensor) -> None:
        self.report(stage, loss)
        self.update()

    def report(self, stage: Stage, loss: Tensor) -> None:
        """Show the loss and the tokens of an iteration as soon as the loss has arrived."""
        if self.disable:
            return
        if self._loss is None and (time.monotonic() - self._asked > 0.5 or self.n + 1 == self.total):
            self._asked = time.monotonic()
            self._loss = torch.empty((), pin_memory=loss.is_cuda).copy_(loss, non_blocking=True)
            if loss.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record()
        if self._loss is not None and (self._arrived is None or self._arrived.query()):
            self.set_postfix(tokens=stage.tokens, loss=f"{self._loss.item():.3f}", refresh=False)
            self._loss = None
