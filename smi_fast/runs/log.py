"""The log of a run: loss, confidence, patches and speed as it goes, as a CSV file or for TensorBoard."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from smi_fast.inversion.inverter import Inverter, Step
from smi_fast.inversion.meter import confidences
from smi_fast.runs.run import LOG
from smi_fast.runs.table import Table

KINDS = ("csv", "tensorboard")
PICTURED = 16  # images in a picture


def check_log(kind: str | None) -> None:
    """Check that there is this kind of log, and that the package that it needs is there.

    Raises:
        ValueError: there is not. The message says which.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"the log must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "tensorboard":
        try:
            import smi_fast.runs.tensorboard  # noqa: F401
        except ImportError:
            raise ValueError(
                'a log for TensorBoard needs its package: pip install ".[tensorboard]" in a checkout of smi-fast'
            ) from None


def open_log(kind: str | None, folder: str | os.PathLike, *, iterations: int, rank: int = 0) -> AbstractContextManager:
    """Open the log of a run, or go on with the one that is there.

    Args:
        kind: "csv" for a `Table` in log/log.csv, "tensorboard" for a `TensorBoard` in log/, or None for no log.
        folder: the folder of the run.
        iterations: the number of iterations of a batch. TensorBoard's steps count those of all batches.
        rank: the number of this process. Process 1 writes log/log-1.csv or log/1, and so on: each has its own file.

    Returns:
        A context manager, which gives the log, or None if there is none.

    Raises:
        ValueError: see `check_log`, or the file that is there is no log. The message names it.
        OSError: now or later, a file cannot be read or written. The message names it.
    """
    check_log(kind)
    if kind is None:
        return nullcontext()
    if kind == "csv":
        Path(folder, LOG).mkdir(exist_ok=True)
        return Table(Path(folder, LOG, f"log-{rank}.csv" if rank else "log.csv"))
    from smi_fast.runs.tensorboard import TensorBoard

    return TensorBoard(Path(folder, LOG, str(rank) if rank else ""), iterations)


class Logger:
    """A callback of `Inverter.run` or `Inverter.stream` that logs a batch: the loss, the confidence (the mean
    probability of the targets, from a forward pass on the kept patches), the patches per image, and the images per
    second, where an image has the iterations of a run. Other iterations than those that it logs are not held up.

    Iterations are counted from the first one that it sees. In a stream, the iterations of images that are brought to
    the last stage while others wait count too.

    Args:
        log: what the context manager that `open_log` returns gives. With None, nothing is logged.
        inverter: the inverter that calls it.
        every: the number of iterations from one line to the next. The last iteration of a run has a line, too.
        pictures: the number of lines from one picture of up to 16 images to the next.

    Raises:
        ValueError: `every` or `pictures` is less than 1.
    """

    def __init__(self, log: AbstractContextManager | None, inverter: Inverter, *, every: int = 50, pictures: int = 20):
        for name, count in (("every", every), ("pictures", pictures)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.log, self.inverter, self.every, self.pictures = log, inverter, every, pictures
        self.begin(0)

    def begin(self, number: int, done: int | None = None) -> None:
        """Begin batch `number`, or go on with it after `done` of its iterations, which are needed only for a stream
        that goes on from a state."""
        self.number, self.done = number, done
        self.count, self.moment = 0, time.perf_counter()  # iterations since the last line, and when it was

    def __call__(self, step: Step) -> None:
        if self.log is None:
            return
        self.done, self.count = (step.iteration if self.done is None else self.done) + 1, self.count + 1
        last = self.done == self.inverter.iterations
        if self.done % self.every and not last:
            return
        targets, inverter = step.targets, self.inverter
        images, keep = step.images()[-len(targets) :], step.keep[-len(targets) :]  # without those released before
        confidence, _ = confidences(inverter.backbone, images, keep, targets, inverter.mean, inverter.std)
        values = {"loss": step.loss.item(), "confidence": confidence.mean().item(), "patches": step.stage.patches}
        now = time.perf_counter()
        speed = len(targets) * self.count / inverter.iterations / max(now - self.moment, 1e-9)
        self.log.write(self.number, self.done, values | {"images_per_second": speed})
        if self.log.takes_pictures and (self.done % (self.every * self.pictures) == 0 or last):
            self.log.picture(self.number, self.done, images[:PICTURED])
        self.count, self.moment = 0, now
