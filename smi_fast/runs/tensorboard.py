"""TensorBoard: the log of a run as event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from smi_fast.data.files import naming

SUFFIX = ".batch"  # of an event file, before the number of the batch


class TensorBoard(AbstractContextManager):
    """Event files with a tag for each value, and pictures. A step is an iteration of the whole run.

    Each batch has a file. If it goes on from an earlier step, TensorBoard hides what was logged from there on, unless
    there are files of later batches, which it would hide too. Another process had the batch then.

    Args:
        folder: the folder of the files, which is made by the first `write`.
        iterations: the number of iterations of a batch.

    Raises:
        OSError: later, a file cannot be written. The message names the folder.
    """

    takes_pictures = True

    def __init__(self, folder: Path, iterations: int):
        self.folder, self.iterations = folder, iterations
        self.number: int | None = None  # the batch that `writer` writes about
        self.writer: SummaryWriter | None = None

    def _open(self, number: int, step: int) -> None:
        """Open a file for batch `number` from this step on."""
        self.__exit__()
        there = [int(path.suffix[len(SUFFIX) :]) for path in self.folder.glob(f"*{SUFFIX}[0-9]*")]
        purge = step if there and max(there) == number else None
        self.writer = SummaryWriter(str(self.folder), purge_step=purge, filename_suffix=f"{SUFFIX}{number}")
        self.number = number

    @contextmanager
    def _step(self, number: int, iteration: int) -> Iterator[int]:
        """Yield the step, and write the events of the `with` block to the file."""
        step = number * self.iterations + iteration
        with naming(self.folder):
            if number != self.number:
                self._open(number, step)
            yield step
            self.writer.flush()

    def write(self, number: int, iteration: int, values: Mapping[str, float]) -> None:
        """Log values of batch `number`, `iteration` of whose iterations are done."""
        with self._step(number, iteration) as step:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, number: int, iteration: int, images: Tensor) -> None:
        """Log images (N, C, H, W) in [0, 1] as one picture."""
        with self._step(number, iteration) as step:
            self.writer.add_image("images", make_grid(images, nrow=4), step)

    def __exit__(self, *error: Any) -> None:
        if self.writer is not None:
            with naming(self.folder):
                self.writer.close()
