"""distill(): rounds of inversion and training, in which a student learns from a teacher on sparse images."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from smi_fast.backbones.base import frozen
from smi_fast.bars import ProgressBar
from smi_fast.data.labelled import accuracy
from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip
from smi_fast.distillation.checks import SAMPLES, prepared, record
from smi_fast.distillation.group import Group
from smi_fast.distillation.images import InvertedImages, StoredImages
from smi_fast.distillation.pool import Pool, Reader
from smi_fast.distillation.training import Round, Training
from smi_fast.inversion.inverter import Inverter
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped
from smi_fast.seeds import seeded_generator

# The arguments of `distill` that do not decide what the student learns.
NO_SETTINGS = ("evaluate", "callback", "progress", "run")
TRAINING = "training"  # the name of the checkpoint that holds the student and the rounds so far
Evaluate = Callable[[nn.Module], float] | Iterable[tuple[Tensor, Tensor]]


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
    inversion_batch_size: int | None = None,
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
    run: Run | None = None,
) -> DistillationResult:
    """Transfer a teacher's knowledge to a student without data (Hu et al., ICML 2024, Sec. 4.3.2), in place.

    Each round adds fresh images to a growing pool and then trains the student on the pool, by SGD on the KL divergence
    of its class probabilities from the teacher's. Both models are given the kept patches only, each with its own
    normalisation. With `adaptive` the fresh images are such that the two disagree, as in adaptive DeepInversion (Yin et
    al., CVPR 2020, Sec. 3.3).

    The teacher's logits do not change, and neither do the features that the student's head is given in linear probing.
    They are computed once, when an image enters the pool, for the image and for its mirror image. The numbers are the
    same as if they were computed in every step.

    With a `run` nothing that was finished is lost: the same call goes on where it stopped, with the same bits. The
    folder of the run holds the images, a file for each batch of them, and checkpoints of the inversion and of the
    training in progress. If torchrun has started several processes, they share the batches of a round's images, and
    then train the student together with DistributedDataParallel, each on its share of a step's images. The images do
    not depend on the number of processes, and the student depends on it in two ways: by rounding, and as is usual with
    DistributedDataParallel, by dropout and by BatchNorm, whose statistics are those of each process's share and in the
    end those of the first process.

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
        inversion_batch_size: the number of `samples` that are inverted at once. Each such batch has a seed of its own,
            which does not depend on the number of processes. None: all of them.
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
        callback: called after each round with the `Round` and its fresh images, in the first process. A run that goes
            on calls it only for further rounds, but after an abrupt end perhaps a second time for the last one.
        seed: decides the inverted images, the order in which images are drawn, flips and the student's dropout.
        progress: show a progress bar.
        run: the folder to work in, a `Run` that the caller has entered. `settings_of` gives settings for it.
            Several distillations with datasets can share a run, each with a `Run.part`.

    Returns:
        The result. After Ctrl-C without a run it holds the finished rounds, and the student is as the last of them left
        it.

    Raises:
        Stopped: in a run, Ctrl-C or SIGTERM has asked for an end. What it needs to go on is saved, and the student is
            as it was before the call.
        ConnectionError: another process of the run is gone.
        ValueError, TypeError: the models, the inverter or the dataset do not fit each other, the dataset was made with
            another normalisation than the teacher's, or an argument is out of range. The message names it.
        UnsupportedModelError: see `accelerate`.
    """
    if run is not None and run.is_part and dataset is None:
        raise ValueError("distillations that share a run take their images from datasets, not from an inverter")
    numbers = {
        "rounds": rounds, "samples": samples, "inversion_batch_size": inversion_batch_size, "steps": steps,
        "batch_size": batch_size, "temperature": temperature, "lr": lr, "momentum": momentum,
        "weight_decay": weight_decay, "seed": seed,
    }  # fmt: skip
    given = {"dataset": dataset, "linear_probing": linear_probing, "adaptive": adaptive, "js": js, **numbers}
    teacher_reader, student_reader, competing, linear_probing = prepared(teacher, student, inverter=inverter, **given)
    settings = {} if run is None else record(teacher, student, inverter, flip=flip, **given)
    grid = dataset.grid if inverter is None else inverter.grid
    image_size = (teacher_reader.fast.num_channels, *grid.image_size)
    mirror = RandomHorizontalFlip(image_size, grid.patch_size, p=1) if flip else None
    group = Group(run, student_reader.device)
    shown = progress and group.is_first

    with frozen(teacher_reader.fast), frozen(student_reader.fast), _own_randomness(seed, student_reader.device), group:
        pool = Pool(teacher_reader, student_reader, mirror, linear_probing, batch_size)
        trainable = (student_reader.heads if linear_probing else student_reader.fast).requires_grad_(True)
        optimizer = torch.optim.SGD(trainable.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        generator = seeded_generator(seed)
        if inverter is None:
            order = torch.randperm(len(dataset), generator=generator)
            source = StoredImages(dataset, order, samples or len(dataset))
        else:
            count = samples or SAMPLES
            source = InvertedImages(competing, rounds, count, inversion_batch_size or count, seed, run, trainable)
        training = Training(
            pool, trainable, optimizer, generator, group, steps=steps, temperature=temperature, seed=seed,
            settings=settings,
        )  # fmt: skip
        bar = ProgressBar(total=rounds * (steps + source.iterations), shown=shown)
        batches, interrupted = [], False
        try:
            measure = _measure(evaluate if group.is_first else None, student, student_reader, linear_probing, shown)
            with group.together():
                _rounds(rounds, source, training, measure, callback, run, bar, batches)
        except (KeyboardInterrupt, Stopped) as error:
            training.restore()
            if run is not None or isinstance(error, Stopped):
                raise
            interrupted = True
        finally:
            bar.close()
            optimizer.zero_grad()
    return DistillationResult(training.history, batches, interrupted)


def _rounds(
    rounds: int,
    source: StoredImages | InvertedImages,
    training: Training,
    measure: Callable[[], float | None],
    callback: Callable[[Round, Dataset], None] | None,
    run: Run | None,
    bar: ProgressBar,
    batches: list[Dataset],
) -> None:
    """Invert and train in turns, from the checkpoint of the run if there is one. The images of finished rounds go into
    `batches`."""
    pool, group, history, iterations = training.pool, training.group, training.history, 0
    pause = partial(group.pause, TRAINING, training.state_dict)
    if run is not None:
        _go_on(run, source, training)
    for number in range(1, rounds + 1):
        bar.set_description(f"round {number} of {rounds}")
        fresh = source.of_round(number - 1, bar)  # made, or read if they are there
        iterations += fresh.iterations
        training.begin()
        if len(history) < rounds:  # otherwise nothing is left to learn
            # What the pool computes is not saved: it takes a forward pass of each image, which gives the same bits
            # again because the batches are the same.
            pool.add(fresh.images)
        if number <= len(history):  # finished before the run was interrupted
            batches.append(fresh.images)
            bar.update(training.steps)
            continue
        loss = training.round(bar, pause)
        finished = training.finish(loss, iterations, measure(), fresh.seconds)
        batches.append(fresh.images)
        bar.set_postfix(samples=finished.samples, loss=f"{loss:.3g}", accuracy=finished.accuracy)
        if not math.isfinite(loss):
            warnings.warn(f"the loss is {loss} in round {number}; lr {training.lr} is too high", stacklevel=3)
        if group.is_first and callback is not None:
            callback(finished, fresh.images)
        if group.is_first and run is not None:
            run.save(TRAINING, training.state_dict())


def settings_of(teacher: nn.Module, student: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Return what decides the result of `distill(teacher, student, **arguments)`, as a `Run` takes it: checksums of the
    weights and of the dataset, the settings of the inverter, and numbers. "images" is the number of inverted images.

    Raises:
        ValueError, TypeError, UnsupportedModelError: `distill` would raise it, or a file of the dataset is damaged.
    """
    call = inspect.signature(distill).bind(teacher, student, **arguments)
    call.apply_defaults()
    given = {name: value for name, value in call.arguments.items() if name not in NO_SETTINGS}
    flip = given.pop("flip")
    prepared(**given)
    return record(**given, flip=flip)


def _go_on(run: Run, source: StoredImages | InvertedImages, training: Training) -> None:
    """Go on from the checkpoint of the training, if there is one."""
    if training.group.is_first:
        before, whole = run.checkpoint(TRAINING), source.whole_rounds()
        learnt_from = 0 if before is None else len(before["history"]) + (before["step"] > 0)
        if source.compete and whole < learnt_from:
            # Images that compete with a student cannot be made again once it has learnt from them.
            warnings.warn(f"images of round {whole + 1} are missing, and the training begins anew", stacklevel=3)
            before = None
        if before is None:
            run.save(TRAINING, training.state_dict())
    training.group.agree(0)  # until the first process has looked
    training.load_state_dict(run.checkpoint(TRAINING))


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
