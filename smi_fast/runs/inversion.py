"""invert(): many images over hours or days, on one device or many, written batch by batch."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fast.data.files import PARTIAL
from smi_fast.data.manifest import IMAGES
from smi_fast.data.shards import open_shard
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import model_checksum, save_state
from smi_fast.data.tensors import SUFFIX
from smi_fast.grid import PatchGrid
from smi_fast.inversion.checks import check_targets, check_weights
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.loop import settings_record
from smi_fast.inversion.meter import StageMeter, confidences, iteration_flops
from smi_fast.inversion.result import InversionResult, Step
from smi_fast.inversion.schedule import Release
from smi_fast.inversion.state import Stage
from smi_fast.inversion.stream import check_streams, has_independent_images
from smi_fast.packed import PackedTokens
from smi_fast.runs.log import Logger, check_log, open_log
from smi_fast.runs.machine import made_with
from smi_fast.runs.progress import Progress
from smi_fast.runs.run import EVERY, Run
from smi_fast.seeds import batch_seed, check_seed

KIND = "inversion"
SNAPSHOTS = "process.state"  # the file of the first images of the first batch at several moments
STREAMED = 8  # batches' worth of images that go through the places of one batch, and into one shard
MAX_SNAPSHOTS = 10  # images in a snapshot
BETWEEN, AT_LAST = 4, 12  # parts of a stage, and of the last one, whose ends the animation shows
EMPTY = {"inversion": None, "meter": {"times": []}, "seconds": 0.0, "iterations": 0, "snapshots": None}


class InversionRun:
    """The batches of a run, each of which becomes a shard.

    What a batch holds follows from the run's settings alone, and so the images do not depend on which process makes
    it, or on how often it was interrupted.

    Args:
        inverter: makes the images.
        targets: (N,) int64.
        batch_size: the number of images that are inverted at once.
        seed: the seed of the run.
        about: further entries of the metadata of each shard.
        names: the names of the classes. None: their numbers.
    """

    def __init__(
        self,
        inverter: Inverter,
        targets: Tensor,
        batch_size: int,
        seed: int,
        about: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.inverter, self.batch_size, self.seed = inverter, batch_size, seed
        self.streams = inverter.until is not None and has_independent_images(inverter)
        self.batches = targets.split(batch_size * (STREAMED if self.streams else 1))
        own = {"mean": inverter.mean, "std": inverter.std, "seed": seed}
        self.about = {"settings": settings_record(inverter), **(about or {}), **own}
        self.names = names or [str(target) for target in range(inverter.backbone.num_classes)]
        self.copies = 1 + sum(isinstance(stop, Release) for stop in inverter.stopping.stops.values())
        self._flops: dict[int, tuple[int, int]] = {}  # of the stages, by their first iteration

    def settings(self) -> dict[str, Any]:
        """Return what decides the images, for the run's manifest."""
        targets = torch.cat(self.batches)
        return {
            **settings_record(self.inverter),
            "model": model_checksum(self.inverter.backbone),
            "verifier": None if self.inverter.verifier is None else model_checksum(self.inverter.verifier),
            "backend": self.inverter.backbone.backend,
            "targets": targets.tolist(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "images": len(targets) * self.copies,
        }

    @property
    def iterations(self) -> int:
        """The number of iterations of a batch, or the most that images of a stream need."""
        return self.inverter.iterations * -(-len(self.batches[0]) // self.batch_size)

    def check(self) -> None:
        """Check that the batches can be made, before anything is written.

        Raises:
            ValueError, TypeError: see `Inverter.run` and `Inverter.stream`.
        """
        check_weights(self.inverter.models)
        if self.streams:
            check_streams(self.inverter, self.batch_size)

    def finished(self, folder: Path) -> list[int]:
        """Return the numbers of the batches whose shards are in the folder of the run. A shard with a damaged index is
        removed, so that it is made again.

        Raises:
            ValueError: there are other files between the shards.
        """
        there = set(os.listdir(folder / IMAGES)) if (folder / IMAGES).is_dir() else set()
        shards = {shard(folder, number).name: number for number in range(len(self.batches))}
        foreign = {name for name in there - shards.keys() if not PARTIAL.fullmatch(name)}
        if foreign:
            raise ValueError(f"{folder / IMAGES / min(foreign)} is no file of this run")
        return [number for name, number in shards.items() if name in there and _is_whole(folder / IMAGES / name)]

    def make(
        self,
        number: int,
        run: Run,
        progress: Progress,
        logger: Logger,
        tell: Callable[[int, Step], None] | None = None,
    ) -> None:
        """Invert batch `number`, from its last checkpoint if there is one, and write its shard.

        Raises:
            Stopped: a signal has asked for an end. The batch has a checkpoint.
            NonFiniteError: see `Inverter.run`.
        """
        name, inverter, targets = name_of(number), self.inverter, self.batches[number]
        meter, before = StageMeter(inverter.backbone.device), run.checkpoint(name) or EMPTY
        meter.load_state_dict(before["meter"])
        snapshots = Snapshots(targets, inverter.stages, inverter.grid, before["snapshots"]) if number == 0 else None
        started = time.perf_counter() - before["seconds"]
        progress.begin(before["iterations"])
        logger.begin(number, before["iterations"])

        def save(step: Step) -> dict[str, Any]:
            return {
                "inversion": step.state_dict(),
                "meter": meter.state_dict(),
                "seconds": time.perf_counter() - started,
                "iterations": progress.of_batch,
                "snapshots": None if snapshots is None else snapshots.state_dict(),
            }

        def callback(step: Step) -> None:
            for of_step in (meter, progress, logger, snapshots):
                if of_step is not None:
                    of_step(step)
            if tell is not None:
                tell(number, step)
            run.pause(name, lambda: save(step))

        options = {"seed": batch_seed(self.seed, number), "callback": callback, "state": before["inversion"]}
        with meter.batch(), silent(inverter):
            if self.streams:
                result = inverter.stream(targets, self.batch_size, **options)
            else:
                result = inverter.run(targets, **options)
        if result.interrupted:
            raise KeyboardInterrupt
        if snapshots is not None:
            save_state(run.folder / SNAPSHOTS, snapshots.state_dict())
        self._write(number, result, meter, run.folder, time.perf_counter() - started)
        run.discard(name)
        progress.end()

    def _write(self, number: int, result: InversionResult, meter: StageMeter, folder: Path, seconds: float) -> None:
        backbone = self.inverter.backbone
        confidence, predicted = confidences(
            backbone, result.images, result.keep, result.targets, self.inverter.mean, self.inverter.std
        )
        costs = list(meter.costs.values())
        for cost in costs:
            cost.flops, cost.flops_paper = self._operations(cost.stage)
        metadata = self.about | {
            "batch": number,
            "batch_seed": batch_seed(self.seed, number),
            "classes": {str(target): self.names[target] for target in sorted(set(result.targets.tolist()))},
            "confidence": confidence.tolist(),
            "predicted": predicted.tolist(),
            "iterations": result.iterations.tolist(),
            "verified": [list(record) for record in result.verified],
            "loss": result.losses.tolist(),
            "tokens": [[stage.start, stage.end, stage.tokens] for stage in result.history],
            "seconds": seconds,
            "stages": [cost.record() for cost in costs],
        }
        file = shard(folder, number)
        file.parent.mkdir(exist_ok=True)
        images = InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)
        images.save(file, overwrite=True)

    def _operations(self, stage: Stage) -> tuple[int, int]:
        """Return the operations of an iteration of a whole batch, by torch's count and by the paper's."""
        if stage.start not in self._flops:
            size = min(self.batch_size, len(self.batches[0]))
            counts = (iteration_flops(self.inverter, stage, size, flops=flops) for flops in ("torch", "paper"))
            self._flops[stage.start] = tuple(counts)
        return self._flops[stage.start]


class Snapshots:
    """A callback that keeps the first image of each class, for up to ten classes, at moments of the run: at the end of
    each stage, which the picture of the process shows, and between the ends for the animation. If no patch stops, the
    picture shows four moments.

    A snapshot holds only the kept patches, with 8 bits a pixel, so that checkpoints stay small.

    Args:
        targets: (B,) of the batch.
        stages: the stages of the run.
        grid: the grid of the images.
        state: what `state_dict` returned, to go on from there.
    """

    def __init__(self, targets: Tensor, stages: Sequence[Stage], grid: PatchGrid, state: dict[str, Any] | None = None):
        end = stages[-1].end
        self.ends = {stage.end for stage in stages} | ({end // 20, end // 4, end // 2} if len(stages) < 3 else set())
        self.moments = {1, *self.ends} | {
            stage.start + (stage.end - stage.start) * part // parts
            for stage, parts in zip(stages, [*[BETWEEN] * (len(stages) - 1), AT_LAST], strict=True)
            for part in range(1, parts)
        }
        self.grid = grid
        self.numbers = list(first_of_each_class(targets).values())[:MAX_SNAPSHOTS]
        self.frames: list[dict[str, Any]] = []
        self._taken: list[tuple[dict[str, Any], Tensor, list[Tensor]]] = []  # and still on the device
        if state is not None:
            self.moments, self.frames = set(state["moments"]), state.get("frames", [])  # older checkpoints have none

    def __call__(self, step: Step) -> None:
        done, numbers = step.iteration + 1, step.numbers
        if done not in self.moments or not set(self.numbers) <= set(numbers):  # images of a stream leave one by one
            return
        self.moments.remove(done)
        first = len(step.keep) - len(numbers)  # after the images that were released before
        rows = [first + numbers.index(number) for number in self.numbers]
        images = step.images()
        pixels = torch.stack([images[row] for row in rows]).mul(255).round().to(torch.uint8)
        about = {"iteration": done, "patches": step.stage.patches, "is_end": done in self.ends}
        self._taken.append((about, pixels, [step.keep[row] for row in rows]))
        if about["is_end"]:
            self._fetch()

    def _fetch(self) -> None:
        """Copy the kept patches of the last snapshots to the CPU, which waits for the device, and so happens between
        stages and for checkpoints only."""
        for about, pixels, rows in self._taken:
            keep = PackedTokens.from_sequences(None, [row.cpu() for row in rows])
            values = self.grid.gather(pixels.cpu(), keep)
            kept = {"values": values, "positions": keep.positions, "cu_seqlens": keep.cu_seqlens}
            self.frames.append(about | kept)
        self._taken.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots, the numbers of their images, and the moments that are yet to come."""
        self._fetch()
        return {"moments": sorted(self.moments), "numbers": self.numbers, "frames": self.frames}


def first_of_each_class(targets: Tensor) -> dict[int, int]:
    """Return the number of the first image of each class, in the order of the images."""
    numbers: dict[int, int] = {}
    for number, target in enumerate(targets.tolist()):
        numbers.setdefault(target, number)
    return numbers


def name_of(number: int) -> str:
    """Return the name of a batch, which its shard and its checkpoint have."""
    return f"{number:05}"


def shard(folder: Path, number: int) -> Path:
    """Return the file of a batch."""
    return folder / IMAGES / f"{name_of(number)}{SUFFIX}"


def _is_whole(file: Path) -> bool:
    """Return whether the index of a shard is whole, or else remove the shard. Patches are checked when read."""
    try:
        with open_shard(file):
            return True
    except ValueError as error:
        warnings.warn(f"{error}; the batch is made again", stacklevel=2)
        file.unlink()
        return False


def records(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the metadata of each of the shards.

    Raises:
        ValueError: a shard is damaged. The message names it.
    """
    for file in files:
        with open_shard(file) as (_, arguments):
            yield arguments["metadata"]


def invert(
    inverter: Inverter,
    targets: Tensor | Sequence[int],
    folder: str | os.PathLike,
    *,
    batch_size: int = 128,
    seed: int = 0,
    checkpoint_every: float = EVERY,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    files: Sequence[str] = (),
    log: str | None = None,
    log_every: int = 50,
    callback: Callable[[int, Step], None] | None = None,
    finish: Callable[[Run], None] | None = None,
) -> InvertedDataset:
    """Invert one image for each target, and write them batch by batch into a folder.

    Each batch is a file `images/NUMBER.safetensors`, which appears when the batch is finished. What was finished is
    never lost: called again with the same arguments, the function goes on from the last checkpoint, with the same bits.
    Processes that torchrun has started share the batches, and the images do not depend on how many they are. On a CPU
    the last bits depend on the number of threads. The folder remembers the number that the run began with, and sets it.

    Args:
        inverter: makes the images. With `until` and images that do not depend on each other, they go through the
            places of one batch (`Inverter.stream`), eight batches' worth to a file.
        targets: (N,) class indices.
        folder: the folder of the run. It is made if it does not exist. `InvertedDataset.load` reads it at any moment.
        batch_size: the number of images that are inverted at once.
        seed: decides the images. Batch n has the seed `batch_seed(seed, n)`.
        checkpoint_every: the minutes between two checkpoints of a batch.
        overwrite: begin anew in a folder that holds a run or other files.
        about: further entries of the metadata of each file, in JSON's types.
        names: the names of the classes, for reports. None: their numbers.
        command: the arguments of the command that begins the run, for its `--resume`.
        files: the names of files that `finish` writes, which `overwrite` removes first.
        log: "csv" or "tensorboard", to log loss, confidence, patches and speed into the folder `log`, see `open_log`.
        log_every: the number of iterations from one line of the log to the next.
        callback: called with the number of the batch and a `Step` after every iteration.
        finish: called with the `Run` in the first process once all batches are finished.

    Returns:
        The dataset of all images.

    Raises:
        ValueError, TypeError: see `Inverter.run` and `Run`. The message says what is wrong.
        Stopped: Ctrl-C or SIGTERM has asked for an end. The batch in progress has a checkpoint.
        ConnectionError: the store of the processes cannot be reached.
        NonFiniteError: see `Inverter.run`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    targets, seed = check_targets(targets, inverter.backbone.num_classes), check_seed(seed)
    if targets.ndim != 1:
        raise ValueError("targets of a dataset are classes, not soft labels")
    work = InversionRun(inverter, targets, batch_size, seed, about, names)
    work.check(), check_log(log), Logger(None, inverter, every=log_every)
    run = Run(
        folder, KIND, work.settings(), made_with(inverter.backbone.device, command), files=(SNAPSHOTS, *files),
        overwrite=overwrite, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    with run:
        processes, count = run.processes, len(work.batches)
        if processes.size > count and processes.is_first:
            warnings.warn(f"{processes.size} processes share {count} batches: some have nothing to do", stacklevel=2)
        finished = work.finished(run.folder) if processes.is_first else []
        with (
            Progress(run, count, len(finished), work.iterations, inverter.progress) as progress,
            open_log(log, run.folder, iterations=work.iterations, rank=processes.rank) as lines,
        ):
            logger = Logger(lines, inverter, every=log_every)
            for number in processes.parts(count, lambda n: shard(run.folder, n).exists(), progress.wait):
                work.make(number, run, progress, logger, callback)
        if processes.is_first:
            for number in range(count):  # a process may have been killed between its shard and this
                run.discard(name_of(number))
        if finish is not None and processes.is_first:
            finish(run)
    return InvertedDataset.load(folder)


@contextmanager
def silent(inverter: Inverter) -> Iterator[None]:
    """Let the inverter show no progress, because the run does."""
    shown, inverter.progress = inverter.progress, False
    try:
        yield
    finally:
        inverter.progress = shown
