"""Continual learning: five classes, then the other five, with inverted images in the place of the old ones.

    python examples/applications/continual.py --data DIR --out RUN_DIR [--seeds 0 1 2]

A ViT first learns the first five classes of CIFAR-10 and then, from images of the last five alone, those. It is tested
on all ten at once. What it keeps of the old classes depends on what it does about them meanwhile:

    none                nothing
    LwF                 its old logits must stay what the old model answers to the new images (Li & Hoiem, ECCV 2016)
    real replay         LwF, and as many images of the old classes as are inverted below
    dense replay        LwF, and images into which the old model was inverted
    sparse replay       the same with sparse images

In each step a replayed batch is as large as the new one. It has its labels to learn, and the old model's answers. The
ceiling learns all ten classes at once.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workbench import (
    DENSE,
    PATCHES,
    SPARSE,
    Data,
    Loss,
    Table,
    arguments,
    clocks,
    cross_entropy,
    fine_tune,
    invert,
    load,
    right,
)  # fmt: skip

from smi_fast import InvertedDataset, accelerate, transfer_loss
from smi_fast.models import cifar10_student

OLD, NEW = range(5), range(5, 10)
Replayed = tuple[Tensor, Tensor, Tensor]  # normalised images, their kept patches and labels


def remembering(old: nn.Module, args, seed: int, replayed: Replayed | None = None) -> Loss:
    """Return a loss that also asks for the old model's answers and, of replayed images, for their labels."""
    teacher, generator = accelerate(old, dtype=torch.bfloat16), torch.Generator().manual_seed(seed)

    def answers(logits: Tensor, images: Tensor, keep: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher(images, keep=keep)
        return transfer_loss(logits[:, OLD], expected[:, OLD].float(), args.temperature)

    def loss(model: nn.Module, images: Tensor, keep: Tensor, labels: Tensor) -> Tensor:
        logits = model(images, keep=keep).float()
        value = F.cross_entropy(logits, labels) + args.memory * answers(logits, images, keep)
        if replayed is None:
            return value
        index = torch.randint(len(replayed[0]), (len(labels),), generator=generator)
        images, keep, labels = (part[index] for part in replayed)
        logits = model(images, keep=keep).float()
        return value + F.cross_entropy(logits, labels) + args.memory * answers(logits, images, keep)

    return loss


def replay_of(images: InvertedDataset, model: nn.Module) -> Replayed:
    """Return inverted images as `remembering` takes them."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.mean, model.std))
    return (images.images() - mean) / std, images.positions.long().view(len(images), -1), images.targets


def real(data: Data, count: int, seed: int) -> Replayed:
    """Return random images of the old classes with all their patches."""
    generator, old = torch.Generator().manual_seed(seed), data.of(OLD)
    chosen = old[torch.randperm(len(old.labels), generator=generator)[:count]]
    return chosen.images, torch.arange(PATCHES).expand(len(chosen.labels), -1), chosen.labels


def main() -> None:
    args = arguments(__doc__, temperature=2.0, memory=1.0)
    started, (train, test) = clocks(), load(args)
    table = Table("continual", ("old classes, %", "new classes, %", "all, %", "inversion, CPU s"))

    def measure(way: str, model: nn.Module, seconds: float = 0) -> None:
        table.add(way, *(right(model, test.of(classes)) for classes in (OLD, NEW)), right(model, test), seconds)

    for seed in args.seeds:
        old = fine_tune(cifar10_student(), train.of(OLD), args, seed)
        measure("before the new classes", old)
        losses = {"none": (cross_entropy, 0), "LwF": (remembering(old, args, seed), 0)}
        losses["real replay"] = remembering(old, args, seed, real(train, args.inverted, seed)), 0
        for name, how in (("dense replay", DENSE), ("sparse replay", SPARSE)):
            before = clocks()
            images = replay_of(invert(old, OLD, how, args, seed), accelerate(old))
            losses[name] = remembering(old, args, seed, images), clocks()[1] - before[1]
        for way, (loss, seconds) in losses.items():
            measure(way, fine_tune(copy.deepcopy(old), train.of(NEW), args, seed, loss), seconds)
        measure("all classes at once", fine_tune(cifar10_student(), train, args, seed))
    table.save(args, started)


if __name__ == "__main__":
    main()
