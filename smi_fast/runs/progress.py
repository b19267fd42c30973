"""Progress: one bar for the work of all processes of a run."""

from __future__ import annotations

import time

from smi_fast.inversion.progress import Bar
from smi_fast.inversion.result import Step
from smi_fast.runs.run import Run

TELL = 0.5  # seconds between two messages to the other processes


class Progress:
    """A callback that counts iterations for all processes, and shows them in the first one.

    Args:
        run: the run.
        batches: the number of batches, of which some are finished.
        finished: the number of batches that are finished already.
        iterations: the number of iterations of a batch, or the most that there can be.
        shown: whether to show a bar.

    Attributes:
        of_batch: the number of iterations that the batch in progress has done.
    """

    def __init__(self, run: Run, batches: int, finished: int, iterations: int, shown: bool):
        self.run, self.iterations = run, iterations
        self.before = finished * iterations
        self.bar = Bar.of(batches * iterations, self.before, shown and run.processes.is_first)
        self.of_batch = self._untold = 0
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._show()
        self.bar.close()

    def begin(self, iteration: int) -> None:
        """Count the iterations that a batch has done in an earlier process."""
        self.of_batch = self._untold = iteration

    def __call__(self, step: Step) -> None:
        self.of_batch, self._untold = self.of_batch + 1, self._untold + 1
        if time.monotonic() - self._told >= TELL:
            self._show()
            self.bar.report(step.stage, step.loss)

    def end(self) -> None:
        """Count the iterations that a batch did not need."""
        self._untold += self.iterations - self.of_batch
        self._show()

    def wait(self) -> None:
        """Show what the other processes do, and end if a signal asks for it."""
        self.run.signals.check()
        if time.monotonic() - self._told >= TELL:
            self._show()

    def _show(self) -> None:
        done, self._untold, self._told = self._untold, 0, time.monotonic()
        self.bar.to(self.before + self.run.processes.count("iterations", done))
