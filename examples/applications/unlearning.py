"""Unlearning a class: a student learns from the teacher what it knows of the other nine, without any real image.

    python examples/applications/unlearning.py --data DIR --out RUN_DIR [--forget cat] [--seeds 0 1 2]

The teacher, `cifar10_vit`, was trained on all ten classes of CIFAR-10. The student begins as `cifar10_student`, and its
head learns the teacher's answers to images of the retained classes. The teacher's logit of the forgotten class is set
below the others, so that it does not teach that class too; in the rows "all logits" it is left as it is. The baselines:

    teacher             as it is
    teacher, masked     the same without the logit of the forgotten class, which costs nothing
    retraining          the student's head, trained on real images of the retained classes and their labels
    real transfer       the student's head, which learns the teacher's answers to those real images
    noise               the same with Gaussian noise

The figures are the shares of test images of the retained and of the forgotten class that are classified correctly,
among all ten classes. They say nothing about privacy: a model that does not answer with a class may still hold what it
has learnt of it, and "teacher, masked" does.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn
from workbench import DENSE, SPARSE, Data, Table, arguments, clocks, in_bfloat16, invert, load, right

from smi_fast import InvertedDataset, distill
from smi_fast.models import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, cifar10_student, cifar10_vit

# The logit of the forgotten class, below the teacher's others. With minus infinity the student's weights would grow
# without end, and its answers to images unlike the inverted ones would be arbitrary.
LOW = -4.0


def masked(model: nn.Module, forgotten: int) -> nn.Module:
    """Return a copy of a model whose logit of a class is always below the others."""
    model = copy.deepcopy(model)
    model.head.weight.data[forgotten] = 0
    model.head.bias.data[forgotten] = LOW
    return model


def as_dataset(data: Data) -> InvertedDataset:
    """Return normalised images as `distill` takes them, clamped to the range of pixels."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CIFAR10_MEAN, CIFAR10_STD))
    return InvertedDataset.from_images((data.images * std + mean).clamp(0, 1), None, data.labels, (4, 4))


def taught(teacher: nn.Module, images: InvertedDataset, args: argparse.Namespace, seed: int) -> nn.Module:
    """Return a student whose head has learnt the teacher's answers to the images."""
    student = cifar10_student()
    distill(
        in_bfloat16(teacher),
        in_bfloat16(student),
        dataset=images,
        rounds=1,
        steps=args.steps,
        batch_size=64,
        seed=seed,
        progress=False,
    )
    return student


def retrained(data: Data, seed: int) -> nn.Module:
    """Return a student whose head has learnt the labels of the images, by logistic regression."""
    student = cifar10_student()
    fast = in_bfloat16(student)
    with torch.no_grad():
        tokens = (fast.forward_features(images) for images in data.images.split(500))
        features = torch.cat([fast.forward_head(x, pre_logits=True) for x in tokens]).float()
    optimizer = torch.optim.LBFGS(student.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(student.head(features), data.labels) + 1e-3 * student.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return student


def main() -> None:
    args = arguments(__doc__, forget="cat", steps=300)
    if args.forget not in CIFAR10_CLASSES:
        raise SystemExit(f"--forget: {args.forget!r} is not one of {', '.join(CIFAR10_CLASSES)}")
    forgotten = CIFAR10_CLASSES.index(args.forget)
    retained = [number for number in range(10) if number != forgotten]
    started, (train, test) = clocks(), load(args)
    table = Table("unlearning", ("retained classes, %", "forgotten class, %", "inversion, CPU s"))

    def measure(way: str, model: nn.Module, seconds: float = 0) -> None:
        table.add(way, right(model, test.of(retained)), right(model, test.of([forgotten])), seconds)

    teacher = cifar10_vit()
    without = masked(teacher, forgotten)
    for seed in args.seeds:
        measure("teacher", teacher)
        measure("teacher, masked", without)
        data, generator = train.of(retained), torch.Generator().manual_seed(seed)
        few = data[torch.randperm(len(data.labels), generator=generator)[: args.inverted]]
        measure("retraining", retrained(data, seed))
        measure(f"retraining on {args.inverted} images", retrained(few, seed))
        measure(f"real transfer of {args.inverted} images", taught(without, as_dataset(few), args, seed))
        drawn = Data(torch.randn(few.images.shape, generator=generator), few.labels)
        measure("noise", taught(without, as_dataset(drawn), args, seed))
        for how in (DENSE, SPARSE):
            before = clocks()
            images = invert(teacher, retained, how, args, seed)
            seconds = clocks()[1] - before[1]
            measure(how, taught(without, images, args, seed), seconds)
            measure(f"{how}, all logits", taught(teacher, images, args, seed), seconds)
    table.save(args, started)


if __name__ == "__main__":
    main()
