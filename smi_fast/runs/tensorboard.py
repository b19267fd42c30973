"""TensorBoard: the log of a run as event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from smi_fast.data.files import naming


class TensorBoard(AbstractContextManager):
    """Event files with a tag for each value, and pictures. A step is an iteration of the whole run.

    If the run goes on from an earlier step, TensorBoard hides what was logged from there on, unless batches that come
    later are among it, as when another process had this batch.

    Args:
        folder: the folder of the files, which is made by the first `write`.
        iterations: the number of iterations of a batch.

    Raises:
        OSError: later, a file cannot be written. The message names the folder.
    """

    takes_pictures = True

    def __init__(self, folder: Path, iterations: int):
        self.folder, self.iterations = folder, iterations
        self.writer: SummaryWriter | None = None

    @contextmanager
    def _step(self, number: int, iteration: int) -> Iterator[int]:
        """Yield the step, and write the events of the `with` block to the file."""
        step = number * self.iterations + iteration
        with naming(self.folder):
            if self.writer is None:
                purge = step if self._newest() <= (number + 1) * self.iterations else None
                self.writer = SummaryWriter(str(self.folder), purge_step=purge)
            yield step
            self.writer.flush()

    def _newest(self) -> int:
        """Return the newest step that the files hold."""
        files = [EventFileLoader(str(path)) for path in self.folder.glob("events.*")]
        return max((event.step for file in files for event in file.Load()), default=0)

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
