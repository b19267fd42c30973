"""distill(): what a teacher knows goes to a student, on inverted images of which only the kept patches are fed."""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from smi_fast.backbones.base import frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.data.labelled import accuracy
from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip, Sample, normalize_patches
from smi_fast.inversion.inverter import Inverter
from smi_fast.packed import PackedTokens
from smi_fast.seeds import batch_seed, check_seed, seeded_generator

Evaluate = Callable[[nn.Module], float] | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Round:
    """What is known after a round of inversion and transfer."""

    number: int  # from 1
    samples: int  # images in the pool
    iterations: int  # of inversion so far; 0 where the images come from a dataset
    steps: int  # of the student's optimiser so far
    loss: float  # mean of the round
    accuracy: float | None  # on the test data, where there are any
    inversion_seconds: float  # of this round
    transfer_seconds: float  # of this round: the teacher, the student and its evaluation


@dataclass(frozen=True)
class DistillationResult:
    """What a transfer came to.

    Args:
        history: the rounds that were finished.
        batches: the images of each of them, sparse; together the pool. An `InvertedDataset` each where they were
            inverted, part of the dataset that was given otherwise (the empty part too, once all are in the pool).
        interrupted: whether Ctrl-C ended the run early.
    """

    history: list[Round]
    batches: list[Dataset] = field(repr=False)
    interrupted: bool = False

    def reaching(self, accuracy: float) -> Round | None:
        """The first round of at least this accuracy, which says how many samples and iterations it took."""
        return next((r for r in self.history if r.accuracy is not None and r.accuracy >= accuracy), None)


def transfer_loss(student: Tensor, teacher: Tensor, temperature: float = 20.0) -> Tensor:
    """KL(teacher || student) of the softmax at a temperature T, times T^2, in the mean over the batch (Hu et al., 2024,
    Eq. 6; Hinton et al., 2015).

    Args:
        student, teacher: logits (B, classes).
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


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
    linear_probing: bool = True,
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
    """Data-free knowledge transfer (Hu et al., ICML 2024, Sec. 4.3.2). The student is trained in place.

    Each round puts fresh images into a growing pool, then trains the student on the pool: SGD on the KL divergence of
    its logits from the teacher's. Both are fed the kept patches alone, each with its own normalisation.

    What cannot change is computed once, when an image enters the pool: the teacher's logits, and with linear probing
    what the student's head reads. So that images can be mirrored at random all the same, both are stored of the image
    and of its mirror image. The numbers are those of computing them anew in every step.

    Args:
        teacher, student: models that `accelerate` takes, or `AcceleratedViT`s, with the same classes and patches, on
            one device. The teacher is frozen. Modes and requires_grad are afterwards as they were.
        inverter: makes the fresh images, out of the teacher; its seed is that of all batches. Or
        dataset: stored images. Fresh ones are drawn from it without replacement, until all are in the pool.
        rounds: how often; after each, the test accuracy is measured.
        samples: fresh images a round; None: 128, or all of the dataset in the first round. Inverted ones are of all
            classes in turn.
        steps: of the optimiser, a round.
        batch_size: images a step, drawn in shuffled passes over the pool.
        linear_probing: train the head only, all else in evaluation mode; False: fine-tune the whole student.
        flip: mirror each image with probability 1/2 each time that it is drawn.
        temperature: of the softmax; see `transfer_loss`.
        lr, momentum, weight_decay: of SGD.
        evaluate: test data as `accuracy` takes them, preprocessed for the student, of whose features too linear probing
            keeps a copy; or a function that is given the student and returns its accuracy.
        callback: called after each round with it and its fresh images.
        seed: of the order of images, of flips, and of what is random in the student.
        progress: show a progress bar.

    Returns:
        The result. After Ctrl-C it holds the rounds that were finished, and the student is as the last of them left it.

    Raises:
        ValueError, TypeError: models that do not fit each other, the inverter or the dataset; a dataset made with a
            normalisation that is not the teacher's; an argument out of range. The message names it.
        UnsupportedModelError: as `accelerate`.
    """
    for name, count in (("rounds", rounds), ("samples", samples), ("steps", steps), ("batch_size", batch_size)):
        if not (name == "samples" and count is None):
            _check_count(name, count)
    check_seed(seed)
    if not (0 < temperature < math.inf and 0 < lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
        raise ValueError(
            "temperature and lr must be positive, momentum in [0, 1) and weight_decay at least 0, all of them finite; "
            f"got {temperature}, {lr}, {momentum} and {weight_decay}"
        )
    if (inverter is None) == (dataset is None):
        raise ValueError("give either an inverter or a dataset")
    if inverter is not None:
        image_size, iterations = tuple(inverter.image_size), inverter.iterations
    else:
        image_size, iterations = tuple(dataset.image_size[1:]), 0
    teacher_reader, student_reader = Reader(teacher, image_size), Reader(student, image_size)
    _check_pair(teacher_reader, student_reader)
    if inverter is not None:
        _check_inverter(inverter, teacher_reader)
    else:
        _check_dataset(dataset, teacher_reader)

    device, generator = student_reader.device, seeded_generator(seed)
    mirror = (
        RandomHorizontalFlip((teacher_reader.channels, *image_size), teacher_reader.patch_size, p=1) if flip else None
    )
    pool = Pool(teacher_reader, student_reader, mirror, linear_probing, batch_size)
    history, batches, interrupted = [], [], False
    bar = tqdm(
        total=rounds * (iterations + steps), disable=not progress, unit="it", dynamic_ncols=True, mininterval=0.5
    )
    with frozen(teacher_reader.fast), frozen(student_reader.fast), _own_randomness(seed, device), bar:
        if inverter is not None:
            fresh = _inverted(inverter, samples or 128, teacher_reader.num_classes, bar)
        else:
            fresh = _stored(dataset, samples or len(dataset), generator)
        trained = list((student_reader.heads if linear_probing else student_reader.fast).parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
        finished = [parameter.detach().clone() for parameter in trained]
        try:
            measure = _measure(evaluate, student, student_reader, linear_probing, progress)
            for number in range(1, rounds + 1):
                bar.set_description(f"round {number} of {rounds}")
                started = time.perf_counter()
                batch = next(fresh)
                inverted = time.perf_counter()
                pool.add(batch)
                student_reader.fast.train(not linear_probing)
                total = torch.zeros((), device=device)
                for index, view in pool.draw(steps, generator):
                    loss = transfer_loss(pool.student_logits(index, view), pool.logits[view, index], temperature)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.detach()
                    bar.update()
                student_reader.fast.eval()
                record = Round(
                    number=number,
                    samples=len(pool),
                    iterations=number * iterations,
                    steps=number * steps,
                    loss=total.item() / steps,
                    accuracy=None if measure is None else measure(),
                    inversion_seconds=inverted - started,
                    transfer_seconds=time.perf_counter() - inverted,
                )
                finished = [parameter.detach().clone() for parameter in trained]
                history.append(record)
                batches.append(batch)
                bar.set_postfix(samples=record.samples, loss=f"{record.loss:.3g}", accuracy=record.accuracy)
                if not math.isfinite(record.loss):
                    warnings.warn(f"the loss is {record.loss} in round {number}; lr {lr} is too high", stacklevel=2)
                if callback is not None:
                    callback(record, batch)
        except KeyboardInterrupt:
            interrupted = True
            with torch.no_grad():
                for parameter, value in zip(trained, finished, strict=True):
                    parameter.copy_(value)
        finally:
            optimizer.zero_grad()
    return DistillationResult(history, batches, interrupted)


class Reader:
    """A model that reads kept patches whose pixels lie in [0, 1], normalised as it wants them.

    Args:
        model: that `accelerate` takes, or an `AcceleratedViT`.
        image_size: (height, width) in pixels of the images that the patches are from.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]):
        self.fast = model if isinstance(model, AcceleratedViT) else accelerate(model)
        self.grid_size = self.fast.grid(image_size).size
        timm_model = self.fast.model
        weight = timm_model.patch_embed.proj.weight
        self.device, self.channels, self.patch_size = weight.device, weight.shape[1], tuple(weight.shape[2:])
        self.num_classes = timm_model.num_classes
        config = resolve_data_config(model=timm_model)
        self.mean, self.std = config["mean"], config["std"]
        heads = timm_model.get_classifier()  # two with a distillation token, whose logits are averaged
        self.heads = nn.ModuleList(heads if isinstance(heads, tuple) else [heads])

    def __call__(self, tokens: PackedTokens) -> Tensor:
        """Logits (B, classes) of patches as `InvertedDataset.collate` gives them."""
        values, positions, cu_seqlens = (
            tensor.to(self.device) for tensor in (tokens.values, tokens.positions, tokens.cu_seqlens)
        )
        tokens = PackedTokens(values, positions, cu_seqlens, tokens.max_seqlen)
        return self.fast.forward_patches(normalize_patches(tokens, self.mean, self.std), grid_size=self.grid_size)

    @torch.no_grad()
    def features(self, read: Callable[[], Tensor]) -> Tensor:
        """What the heads are given while `read` has the model compute logits: (B, heads, C) float32."""
        given: list[Tensor] = []
        hooks = [head.register_forward_pre_hook(lambda _, args: given.append(args[0])) for head in self.heads]
        try:
            read()
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(given, 1).float()

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of `features`."""
        return sum(head(x) for head, x in zip(self.heads, features.unbind(1), strict=True)) / len(self.heads)


class Pool:
    """The images so far, with what never changes about them: `logits` (views, N, classes) of the teacher and, with
    linear probing, `features` (views, N, heads, C) of the student.

    Args:
        teacher, student: who reads the images.
        mirror: of a sample makes the other view of it; None: an image has one view.
        linear_probing: whether the student's features stay the same.
        batch_size: images to a batch.
    """

    def __init__(
        self,
        teacher: Reader,
        student: Reader,
        mirror: Callable[[Sample], Sample] | None,
        linear_probing: bool,
        batch_size: int,
    ):
        self.teacher, self.student, self.mirror = teacher, student, mirror
        self.linear_probing, self.batch_size = linear_probing, batch_size
        self.samples: list[list[Sample]] = []  # the views of each image, where the student reads them in every step
        self.logits = torch.empty(2 if mirror else 1, 0, teacher.num_classes, device=teacher.device)
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return self.logits.shape[1]

    @torch.no_grad()
    def add(self, images: Dataset) -> None:
        """Take in images: samples as an `InvertedDataset` yields them."""
        logits, features = [self.logits], [] if self.features is None else [self.features]
        for first in range(0, len(images), self.batch_size):
            samples = [images[number] for number in range(first, min(first + self.batch_size, len(images)))]
            views = [samples, [self.mirror(sample) for sample in samples]] if self.mirror else [samples]
            tokens = [InvertedDataset.collate(view)[0] for view in views]
            logits.append(torch.stack([self.teacher(view) for view in tokens]).float())
            if self.linear_probing:
                read = [self.student.features(lambda view=view: self.student(view)) for view in tokens]
                features.append(torch.stack(read))
            else:
                self.samples += map(list, zip(*views, strict=True))
        self.logits = torch.cat(logits, 1)
        self.features = torch.cat(features, 1) if features else None

    def draw(self, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step the images (B,) and the view of each (B,), in shuffled passes over all images."""
        size = min(self.batch_size, len(self))
        passes = -(-steps * size // len(self))
        index = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(passes)])[: steps * size]
        view = torch.randint(len(self.logits), index.shape, generator=generator)
        return zip(*(drawn.to(self.logits.device).split(size) for drawn in (index, view)), strict=True)

    def student_logits(self, index: Tensor, view: Tensor) -> Tensor:
        if self.linear_probing:
            return self.student.logits(self.features[view, index])
        samples = [self.samples[i][v] for i, v in zip(index.tolist(), view.tolist(), strict=True)]
        return self.student(InvertedDataset.collate(samples)[0])


def _inverted(inverter: Inverter, count: int, num_classes: int, bar: tqdm) -> Iterator[InvertedDataset]:
    """Batches of fresh images, of all classes in turn."""
    for number in itertools.count():
        fresh = copy.copy(inverter)
        fresh.seed, fresh.progress = batch_seed(inverter.seed, number), False
        targets = torch.arange(number * count, (number + 1) * count) % num_classes
        result = fresh.run(targets, lambda step: bar.update())
        if result.interrupted:
            raise KeyboardInterrupt
        metadata = {"mean": fresh.mean, "std": fresh.std, "seed": fresh.seed}
        yield InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)


def _stored(dataset: InvertedDataset, count: int, generator: torch.Generator) -> Iterator[Subset]:
    """Parts of a dataset in random order, of which none is left at some time."""
    for part in torch.randperm(len(dataset), generator=generator).split(count):
        yield Subset(dataset, part.tolist())
    while True:
        yield Subset(dataset, [])


def _measure(
    evaluate: Evaluate | None, student: nn.Module, reader: Reader, linear_probing: bool, progress: bool
) -> Callable[[], float] | None:
    if evaluate is None:
        return None
    if callable(evaluate):
        return lambda: float(evaluate(student))
    if not linear_probing:
        return lambda: accuracy(reader.fast, evaluate, progress=False)
    batches = tqdm(evaluate, "features of the test data", disable=not progress, unit="batch", dynamic_ncols=True)
    features = [
        (reader.features(lambda images=images: reader.fast(images.to(reader.device))), labels)
        for images, labels in batches
    ]
    return lambda: accuracy(reader.logits, features, progress=False)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers start from the seed; afterwards they go on from where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.set_rng_state(seeded_generator(seed).get_state())  # on the CPU the line before uses 32 bits only
        yield


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _check_pair(teacher: Reader, student: Reader) -> None:
    if teacher.fast.model is student.fast.model:
        raise ValueError("teacher and student are the same model")
    for what, ours, theirs in (
        ("classes", teacher.num_classes, student.num_classes),
        ("channels", teacher.channels, student.channels),
        ("patches of", "{}x{}".format(*teacher.patch_size), "{}x{}".format(*student.patch_size)),
    ):
        if ours != theirs:
            raise ValueError(f"the teacher has {what} {ours}, the student {theirs}")
    if teacher.num_classes == 0:
        raise ValueError("teacher and student have no classes")
    if teacher.device != student.device:
        raise ValueError(f"the teacher is on {teacher.device}, the student on {student.device}")


def _check_inverter(inverter: Inverter, teacher: Reader) -> None:
    if inverter.fast.model is not teacher.fast.model:
        raise ValueError("the inverter inverts another model than the teacher")
    teacher.mean, teacher.std = inverter.mean, inverter.std


def _check_dataset(dataset: InvertedDataset, teacher: Reader) -> None:
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    for what, ours, theirs in (
        ("channels", dataset.image_size[0], teacher.channels),
        ("patches of", "{}x{}".format(*dataset.patch_size), "{}x{}".format(*teacher.patch_size)),
    ):
        if ours != theirs:
            raise ValueError(f"the dataset has {what} {ours}, the teacher {theirs}")
    dataset.check_normalization(teacher.mean, teacher.std)
