"""Where the fresh images of each round come from: a stored dataset, or an inversion of the teacher."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from smi_fast.bars import ProgressBar
from smi_fast.data.manifest import IMAGES
from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion.inverter import Inverter, Step
from smi_fast.runs.inversion import name_of, shard, silent
from smi_fast.runs.run import Run
from smi_fast.seeds import batch_seed


@dataclass(frozen=True)
class Fresh:
    """The fresh images of a round, and what they cost."""

    images: Dataset
    iterations: int = 0
    seconds: float = 0.0


class StoredImages:
    """Images of a dataset, which are drawn without replacement.

    Args:
        dataset: the images.
        order: (N,) int64, their indices in the order in which they are drawn.
        count: the number of images in a round.
    """

    iterations = 0  # of a round
    compete = False

    def __init__(self, dataset: InvertedDataset, order: Tensor, count: int):
        self.dataset, self.order, self.count = dataset, order, count

    def whole_rounds(self) -> float:
        return float("inf")

    def of_round(self, number: int, bar: ProgressBar) -> Fresh:
        """Return the images of round `number`, counted from 0: the next ones, or none once all are used."""
        rows = self.order[number * self.count : (number + 1) * self.count]
        return Fresh(Subset(self.dataset, rows.tolist()))


class InvertedImages:
    """Images that are inverted, in batches. What a batch holds follows from its number alone, and with a competition
    from the student as it is in that round.

    In a run each batch becomes a file of the run's folder, and its processes share the batches.

    Args:
        inverter: makes the images.
        rounds: the number of rounds.
        count: the number of targets in a round: all classes in turn.
        batch_size: the number of targets that are inverted at once.
        seed: batch n, counted over all rounds, has the seed `batch_seed(seed, n)`.
        run: the run, which is entered, or None.
        learner: what the student learns with. The images compete with it if it is part of the inverter's objective.
    """

    def __init__(
        self, inverter: Inverter, rounds: int, count: int, batch_size: int, seed: int, run: Run | None,
        learner: nn.Module,
    ):  # fmt: skip
        self.inverter, self.rounds, self.count, self.batch_size = inverter, rounds, count, batch_size
        self.seed, self.run = seed, run
        learning = set(map(id, learner.parameters()))
        models = getattr(inverter.objective, "models", ())
        self.compete = any(id(parameter) in learning for model in models for parameter in model.parameters())
        self.batches = -(-count // batch_size)  # of a round
        self.iterations = inverter.iterations * self.batches  # of a round, or the most that there can be

    def whole_rounds(self) -> int:
        """Return the number of rounds from the first one on whose images are all in the folder of the run. A damaged
        file is removed with a warning, because its images can be inverted again.

        Raises:
            ValueError: there is a file of another origin.
        """
        names = [self._file(number).name for number in range(self.rounds * self.batches)]
        folder, whole = self.run.folder / IMAGES, set()
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.name not in names:
                raise ValueError(f"{file} is no file of this run")
            try:
                InvertedDataset.load(file).verify()
                whole.add(file.name)
            except ValueError as error:
                warnings.warn(f"{error}; its images are inverted again", stacklevel=2)
                file.unlink()
        return next((n for n, name in enumerate(names) if name not in whole), len(names)) // self.batches

    def of_round(self, number: int, bar: ProgressBar) -> Fresh:
        """Return the images of round `number`, counted from 0. In a run they are read from its folder if they are
        there, and otherwise written to it."""
        numbers, begun = range(number * self.batches, (number + 1) * self.batches), bar.n
        if self.run is None:
            parts = [self._inverted(batch, bar) for batch in numbers]
        else:
            self._write(numbers, bar)
            parts = [InvertedDataset.load(self._file(batch)) for batch in numbers]
        bar.update(begun + self.iterations - bar.n)  # also those that were not needed
        iterations, seconds = (sum(part.metadata[name] for part in parts) for name in ("iterations", "seconds"))
        return Fresh(parts[0].join(parts), iterations, seconds)

    def _write(self, numbers: range, bar: ProgressBar) -> None:
        """Invert those batches that no process has inverted yet, and wait for those that other processes invert."""
        begun = bar.n

        def is_finished(batch: int) -> bool:
            return batch < numbers.start or self._file(batch).exists()

        def wait() -> None:
            bar.update(begun + sum(map(is_finished, numbers)) * self.inverter.iterations - bar.n)
            self.run.signals.check()

        for batch in self.run.processes.parts(numbers.stop, is_finished, wait):
            images = self._inverted(batch, bar, self.run.checkpoint(name_of(batch)))
            self._file(batch).parent.mkdir(exist_ok=True)
            images.save(self._file(batch), overwrite=True)
            self.run.discard(name_of(batch))
        if self.run.processes.is_first:
            for batch in numbers:  # a process may have been killed between its file and this
                self.run.discard(name_of(batch))

    def _inverted(self, batch: int, bar: ProgressBar, before: dict[str, Any] | None = None) -> InvertedDataset:
        """Invert a batch, from its last checkpoint if there is one."""
        number, first = divmod(batch, self.batches)
        first, end = first * self.batch_size, min((first + 1) * self.batch_size, self.count)
        targets = torch.arange(number * self.count + first, number * self.count + end)
        inverter, seed = self.inverter, batch_seed(self.seed, batch)
        options, started = {}, time.perf_counter()
        if before is not None:
            options, started = {"state": before["inversion"]}, started - before["seconds"]
            bar.update(before["inversion"]["iteration"])
        with silent(inverter):  # `bar` counts its iterations
            result = inverter.run(
                targets % inverter.backbone.num_classes,
                seed=seed,
                callback=self._pause(name_of(batch), bar, started),
                **options,
            )
        if result.interrupted:
            raise KeyboardInterrupt
        metadata = {
            "mean": inverter.mean, "std": inverter.std, "seed": seed, "iterations": len(result.losses),
            "seconds": time.perf_counter() - started,
        }  # fmt: skip
        return InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)

    def _pause(self, name: str, bar: ProgressBar, started: float) -> Callable[[Step], None]:
        def pause(step: Step) -> None:
            bar.update()
            if self.run is not None:
                seconds = time.perf_counter() - started
                self.run.pause(name, lambda: {"inversion": step.state_dict(), "seconds": seconds})

        return pause

    def _file(self, batch: int) -> Path:
        return shard(self.run.folder, batch)
