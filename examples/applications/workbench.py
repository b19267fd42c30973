"""What the three applications share: CIFAR-10 in memory, a short training, inverted images, and a table.

All models are ViTs of 2.7 M parameters that begin as `cifar10_student`, which has seen the images without their labels.
So a training of a few epochs on a few thousand images is enough. It lets the model see a random half of the patches.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from smi_fast import Ensemble, InvertedDataset, accelerate, accuracy, load_data
from smi_fast.data.files import write_json
from smi_fast.inversion.presets import DEMO
from smi_fast.models import cifar10_student
from smi_fast.runs.machine import device_name, versions
from smi_fast.seeds import batch_seed

SPARSE, DENSE = "sparse inversion", "dense inversion"
STOPPING = {SPARSE: "paper", DENSE: "dense"}  # the published schedule leaves 14 of 64 patches
PATCHES = 64


class Data(NamedTuple):
    """Normalised images (N, 3, 32, 32) and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def of(self, classes: Sequence[int]) -> Data:
        return self[torch.isin(self.labels, torch.tensor(classes))]

    def __getitem__(self, index: Tensor | slice) -> Data:
        return Data(self.images[index], self.labels[index])


def arguments(text: str, **numbers: float) -> argparse.Namespace:
    """Parse the options that all applications have, and `numbers`, further ones with their defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    common = dict(train_images=4000, test_images=2000, epochs=4, lr=1e-3, inverted=128, iterations=80)
    for name, value in (common | numbers).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load(args: argparse.Namespace) -> tuple[Data, Data]:
    """Read evenly spaced images of both splits. The test split is only measured on."""
    found = []
    for split, count in (("train", args.train_images), ("test", args.test_images)):
        data = load_data(args.data, split=split, model=cifar10_student())
        count = min(count, len(data))
        chosen = Subset(data, [number * len(data) // count for number in range(count)])
        found.append(Data(*map(torch.cat, zip(*DataLoader(chosen, 500), strict=True))))
    return found[0], found[1]


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # of an accelerated model, images, kept patches and labels


def cross_entropy(model: nn.Module, images: Tensor, keep: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images, keep=keep).float(), labels)


def fine_tune(
    model: nn.Module, data: Data, args: argparse.Namespace, seed: int, loss: Loss = cross_entropy, batch_size: int = 64
) -> nn.Module:
    """Train all weights of a ViT on mirrored images and a random half of their patches, and return the ViT."""
    fast, generator = in_bfloat16(model), torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(data.labels))
    steps = args.epochs * (len(data.labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1)
    for _ in range(args.epochs):
        order = torch.randperm(len(data.labels), generator=generator)[: steps // args.epochs * batch_size]
        for index in order.split(batch_size):
            images, labels = data[index]
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
            keep = torch.rand(len(index), PATCHES, generator=generator).argsort(1)[:, : PATCHES // 2]
            optimizer.zero_grad()
            loss(fast, images, keep, labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Return a ViT that computes in bfloat16, and an `Ensemble` as it is."""
    return model if isinstance(model, Ensemble) else accelerate(model, dtype=torch.bfloat16)


def right(model: nn.Module, data: Data) -> float:
    """Return the accuracy on whole images, in %."""
    return 100 * accuracy(
        in_bfloat16(model), zip(data.images.split(500), data.labels.split(500), strict=True), progress=False
    )


def invert(model: nn.Module, classes: Sequence[int], how: str, args: argparse.Namespace, seed: int) -> InvertedDataset:
    """Invert a model into `args.inverted` images of the classes in turn, sparse or dense."""
    targets = torch.tensor(classes).repeat(math.ceil(args.inverted / len(classes)))[: args.inverted]
    options = {"stopping": STOPPING[how], "iterations": args.iterations}
    inverter = DEMO.replaced(options).inverter(in_bfloat16(model), progress=False)
    parts = [inverter.run(batch, batch_seed(seed, number)) for number, batch in enumerate(targets.split(64))]
    images, keep = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "keep"))
    metadata = {"mean": inverter.mean, "std": inverter.std}
    return InvertedDataset.from_images(images, keep, targets, parts[0].patch_size, metadata)


class Table:
    """The figures of one application: a row for each way, and in it the figures of each seed."""

    def __init__(self, name: str, columns: Sequence[str]):
        self.name, self.columns = name, columns
        self.rows: dict[str, list[tuple[float, ...]]] = {}

    def add(self, row: str, *figures: float) -> None:
        self.rows.setdefault(row, []).append(figures)
        print(f"{row:40}", *(f"{figure:8.2f}" for figure in figures), flush=True)

    def save(self, args: argparse.Namespace, started: tuple[float, float]) -> None:
        """Write NAME.json and NAME.md, and print the table."""
        lines = ["| " + " | ".join(("", *self.columns)) + " |", "|:---|" + "---:|" * len(self.columns)]
        for row, seeds in self.rows.items():
            lines.append("| " + " | ".join((row, *map(spread, zip(*seeds, strict=True)))) + " |")
        about = {
            "rows": self.rows, "columns": list(self.columns), "device": device_name(torch.device("cpu")),
            "versions": versions(), "seconds": time.perf_counter() - started[0],
            "cpu_seconds": time.process_time() - started[1],
            "options": {name: value for name, value in vars(args).items() if name not in ("data", "out")},
        }  # fmt: skip
        write_json(args.out / f"{self.name}.json", about)
        (args.out / f"{self.name}.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def spread(values: Sequence[float]) -> str:
    """Return the mean and, of several values, the standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
