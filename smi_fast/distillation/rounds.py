"""distill(): rounds of inversion and training, in which a student learns from a teacher on sparse images."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from smi_fast.backbones.base import frozen
from smi_fast.bars import ProgressBar
from smi_fast.data.labelled import accuracy
from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip
from smi_fast.distillation.losses import transfer_loss
from smi_fast.distillation.pool import Pool, Reader
from smi_fast.inversion.competition import competition
from smi_fast.inversion.inverter import Inverter
from smi_fast.seeds import batch_seed, check_seed, seeded_generator

Evaluate = Callable[[nn.Module], float] | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Round:
    """The figures of a round of inversion and training."""

    number: int  # from 1
    samples: int  # images in the pool
    iterations: int  # of inversion so far; 0 if the images come from a dataset
    steps: int  # of the student's optimiser so far
    loss: float  # mean of the round
    accuracy: float | None  # on the test data, if there are any
    inversion_seconds: float  # of this round
    transfer_seconds: float  # of this round: teacher, student and evaluation


@dataclass(frozen=True)
class DistillationResult:
    """The result of `distill`.

    Args:
        history: the rounds that were finished.
        batches: the fresh images of each of these rounds. Each is an `InvertedDataset` if the images were inverted, and
            otherwise a part of the given dataset, which is empty once all images are in the pool.
        interrupted: whether Ctrl-C ended the run early.
    """

    history: list[Round]
    batches: list[Dataset] = field(repr=False)
    interrupted: bool = False

    def reaching(self, accuracy: float) -> Round | None:
        """Return the first round with at least this accuracy, which says how many samples and iterations it took."""
        return next((r for r in self.history if r.accuracy is not None and r.accuracy >= accuracy), None)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    *,
    inverter: Inverter | None = None,
    dataset: InvertedDataset | None = None,
    rounds: int = 20,
    samples: int | None = None,
    steps: int = 200,
    batch_size: int = 128,
    linear_probing: bool | None = None,
    adaptive: float | None = None,
    js: str = "published",
    flip: bool = True,
    temperature: float = 20.0,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    evaluate: Evaluate | None = None,
    callback: Callable[[Round, Dataset], None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DistillationResult:
    """Transfer a teacher's knowledge to a student without data (Hu et al., ICML 2024, Sec. 4.3.2), in place.

    Each round adds fresh images to a growing pool and then trains the student on the pool, by SGD on the KL divergence
    of its class probabilities from the teacher's. Both models are given the kept patches only, each with its own
    normalisation. With `adaptive` the fresh images are such that the two disagree, as in adaptive DeepInversion (Yin et
    al., CVPR 2020, Sec. 3.3).

    The teacher's logits do not change, and neither do the features that the student's head is given in linear probing.
    They are computed once, when an image enters the pool, for the image and for its mirror image. The numbers are the
    same as if they were computed in every step.

    Args:
        teacher, student: models that `Inverter` takes, on one device, with the same classes. If patches are stopped,
            both have the same patch size. The teacher is frozen. Afterwards modes and requires_grad are as they were
            before.
        inverter: inverts the teacher to make fresh images. Give either an inverter or a dataset.
        dataset: stored images. Fresh ones are drawn without replacement, until all are in the pool.
        rounds: the number of rounds.
        samples: the number of fresh images in a round. None: 128 inverted images, or the whole dataset in the first
            round. The targets of inverted images are all classes in turn. With a `RebirthSchedule` it is the number of
            targets, of each of which several images are made.
        steps: the number of optimiser steps in a round.
        batch_size: the number of images in a step. They are drawn in shuffled passes over the pool.
        linear_probing: train only the head, with the rest of the student in evaluation mode. False: train the whole
            student. None: True for a ViT, False for a CNN.
        adaptive: the weight of a competition with the student, which is then part of the inverter's objective, see
            `competition`. The student is frozen during an inversion. The paper takes 10 for CIFAR-10 and 0.2 for
            ImageNet. None: no competition.
        js: the divergence of the competition, "published" or "exact".
        flip: mirror each image with probability 1/2 each time it is drawn.
        temperature: the temperature of the softmax, see `transfer_loss`.
        lr, momentum, weight_decay: the settings of SGD.
        evaluate: test data as `accuracy` takes them, preprocessed for the student, or a function that takes the student
            and returns its accuracy. In linear probing the features of the test data are kept in memory.
        callback: called after each round with the `Round` and its fresh images.
        seed: decides the inverted images, the order in which images are drawn, flips and the student's dropout.
        progress: show a progress bar.

    Returns:
        The result. After Ctrl-C it holds the finished rounds, and the student is as the last of them left it.

    Raises:
        ValueError, TypeError: the models, the inverter or the dataset do not fit each other, the dataset was made with
            another normalisation than the teacher's, or an argument is out of range. The message names it.
        UnsupportedModelError: see `accelerate`.
    """
    counts = {"rounds": rounds, "steps": steps, "batch_size": batch_size}
    counts |= {} if samples is None else {"samples": samples}
    _check_settings(counts, seed, temperature, lr, momentum, weight_decay)
    if (inverter is None) == (dataset is None):
        raise ValueError("give either an inverter or a dataset")
    grid = dataset.grid if inverter is None else inverter.grid
    teacher_reader, student_reader = (Reader(model, grid.image_size, grid.patch_size) for model in (teacher, student))
    linear_probing = len(student_reader.heads) > 0 if linear_probing is None else linear_probing
    _check_fit(teacher_reader, student_reader, inverter, dataset, linear_probing)
    if inverter is not None:
        teacher_reader.mean, teacher_reader.std = inverter.mean, inverter.std
    if adaptive is not None:
        if inverter is None:
            raise ValueError(
                "adaptive images are inverted against the student, but those of a dataset are there already"
            )
        inverter = inverter.with_objective(competition(inverter.objective, student_reader.fast, adaptive, js))
    image_size = (teacher_reader.fast.num_channels, *grid.image_size)
    mirror = RandomHorizontalFlip(image_size, grid.patch_size, p=1) if flip else None
    total = rounds * (steps + (0 if inverter is None else inverter.iterations))
    bar = ProgressBar(total=total, shown=progress)

    with frozen(teacher_reader.fast), frozen(student_reader.fast), _own_randomness(seed, student_reader.device), bar:
        # Everything that a round hands on to the next, besides torch's own random state, which decides dropout:
        pool = Pool(teacher_reader, student_reader, mirror, linear_probing, batch_size)
        trainable = (student_reader.heads if linear_probing else student_reader.fast).requires_grad_(True)
        optimizer = torch.optim.SGD(trainable.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        generator = seeded_generator(seed)
        if inverter is None:
            order = torch.randperm(len(dataset), generator=generator)
            fresh = partial(_stored, dataset, order, samples or len(dataset))
        else:
            fresh = partial(_inverted, inverter, samples or 128, seed, bar)
        history, batches, iterations, interrupted = [], [], 0, False
        finished = copy.deepcopy(trainable.state_dict())  # as the last finished round left it
        try:
            measure = _measure(evaluate, student, student_reader, linear_probing, progress)
            for number in range(1, rounds + 1):
                bar.set_description(f"round {number} of {rounds}")
                started = time.perf_counter()
                images, ran = fresh(number - 1)  # inverted, or taken from the dataset
                iterations += ran
                inverted = time.perf_counter()
                pool.add(images)
                loss = _train(pool, optimizer, steps, temperature, generator, bar)
                record = Round(
                    number, samples=len(pool), iterations=iterations, steps=number * steps, loss=loss,
                    accuracy=measure(), inversion_seconds=inverted - started,
                    transfer_seconds=time.perf_counter() - inverted,
                )  # fmt: skip
                finished = copy.deepcopy(trainable.state_dict())
                history.append(record)
                batches.append(images)
                bar.set_postfix(samples=record.samples, loss=f"{loss:.3g}", accuracy=record.accuracy)
                if not math.isfinite(loss):
                    warnings.warn(f"the loss is {loss} in round {number}; lr {lr} is too high", stacklevel=2)
                if callback is not None:
                    callback(record, images)
        except KeyboardInterrupt:
            interrupted = True
            trainable.load_state_dict(finished)
        finally:
            optimizer.zero_grad()
    return DistillationResult(history, batches, interrupted)


def _inverted(inverter: Inverter, count: int, seed: int, bar: ProgressBar, number: int) -> tuple[InvertedDataset, int]:
    """Invert the images of round `number`, counted from 0: `count` images of all classes in turn. Return them and the
    number of iterations that ran."""
    targets = torch.arange(number * count, (number + 1) * count) % inverter.backbone.num_classes
    shown, inverter.progress = inverter.progress, False  # `bar` counts its iterations
    try:
        result = inverter.run(targets, seed=batch_seed(seed, number), callback=lambda step: bar.update())
    finally:
        inverter.progress = shown
    if result.interrupted:
        raise KeyboardInterrupt
    metadata = {"mean": inverter.mean, "std": inverter.std, "seed": batch_seed(seed, number)}
    images = InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)
    return images, len(result.losses)


def _stored(dataset: InvertedDataset, order: Tensor, count: int, number: int) -> tuple[Subset, int]:
    """Return the images of round `number`, counted from 0, the next `count` in `order` or none once all are used; and
    0, the number of iterations."""
    return Subset(dataset, order[number * count : (number + 1) * count].tolist()), 0


def _train(
    pool: Pool, optimizer: torch.optim.SGD, steps: int, temperature: float, generator: torch.Generator, bar: ProgressBar
) -> float:
    """Train the student on the pool for a round, and return the mean loss."""
    student, total = pool.student.fast, torch.zeros((), device=pool.student.device)
    student.train(not pool.linear_probing)
    for index, view in pool.draw(steps, generator):
        loss = transfer_loss(pool.student_logits(index, view), pool.logits[view, index], temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        bar.update()
    student.eval()
    return total.item() / steps


def _measure(
    evaluate: Evaluate | None, student: nn.Module, reader: Reader, linear_probing: bool, progress: bool
) -> Callable[[], float | None]:
    """Return the function that measures the student's accuracy."""
    if evaluate is None:
        return lambda: None
    if callable(evaluate):
        return lambda: float(evaluate(student))
    if not linear_probing:
        return lambda: accuracy(reader.fast, evaluate, progress=False)
    batches = ProgressBar(evaluate, "features of the test data", shown=progress, unit="batch")
    features = [
        (reader.features(lambda images=images: reader.fast(images.to(reader.device))), labels)
        for images, labels in batches
    ]
    return lambda: accuracy(reader.logits, features, progress=False)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's random numbers start from the seed inside the `with` block. Afterwards they go on as if nothing had
    been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.set_rng_state(seeded_generator(seed).get_state())  # on the CPU, manual_seed uses only 32 bits
        yield


def _check_settings(
    counts: dict[str, int], seed: int, temperature: float, lr: float, momentum: float, weight_decay: float
) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    check_seed(seed)
    if not (0 < temperature < math.inf and 0 < lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
        raise ValueError(
            "temperature and lr must be positive, momentum in [0, 1) and weight_decay at least 0, all of them finite; "
            f"got {temperature}, {lr}, {momentum} and {weight_decay}"
        )


def _check_fit(
    teacher: Reader,
    student: Reader,
    inverter: Inverter | None,
    dataset: InvertedDataset | None,
    linear_probing: bool,
) -> None:
    """Check that the models fit each other and the images."""
    if _same(teacher.fast, student.fast):
        raise ValueError("teacher and student are the same model")
    for what in ("classes", "channels"):
        ours, theirs = (getattr(reader.fast, f"num_{what}") for reader in (teacher, student))
        if ours != theirs:
            raise ValueError(f"the teacher has {what} {ours}, the student {theirs}")
    if teacher.fast.num_classes == 0:
        raise ValueError("teacher and student have no classes")
    if teacher.device != student.device:
        raise ValueError(f"the teacher is on {teacher.device}, the student on {student.device}")
    if linear_probing and not len(student.heads):
        raise ValueError("the head of the student is not known, so linear_probing must be False")
    if inverter is not None and not _same(inverter.backbone, teacher.fast):
        raise ValueError("the inverter inverts another model than the teacher")
    if dataset is not None:
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        if dataset.image_size[0] != teacher.fast.num_channels:
            raise ValueError(
                f"the dataset has channels {dataset.image_size[0]}, the teacher {teacher.fast.num_channels}"
            )
        dataset.check_normalization(teacher.mean, teacher.std)
        sparse = len(dataset.positions) < len(dataset) * dataset.grid.num_patches
    else:
        sparse = bool(inverter.stopping.stops)
    for name, reader in (("teacher", teacher), ("student", student)):
        if sparse and reader.grid != reader.given:
            ours, theirs = ("{}x{}".format(*grid.patch_size) for grid in (reader.given, reader.grid))
            raise ValueError(f"the images are sparse in patches of {ours}, the {name} takes patches of {theirs}")


def _same(model: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same parameters."""
    return list(map(id, model.parameters())) == list(map(id, other.parameters()))
