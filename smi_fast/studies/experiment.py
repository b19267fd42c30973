"""Experiment: the models and the data of a comparison, and the folder that keeps its images and results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from smi_fast.backbones.vit import accelerate
from smi_fast.data.files import read_json, read_sealed, sealed, write_json
from smi_fast.data.labelled import accuracy, load_data
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import weights_checksum
from smi_fast.inversion.meter import StageMeter, confidences, iteration_flops
from smi_fast.inversion.presets import InversionSettings
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.quantization import check_supported, quantize
from smi_fast.runs.machine import device_name, versions
from smi_fast.seeds import batch_seed
from smi_fast.studies.page import Section
from smi_fast.studies.student import Student

BATCH = 128  # images that are evaluated at once
MAX_HELD = 2**30  # bytes of test images that are held in memory
WEIGHT_BITS = (8, 4)  # activations have 8 bits


@dataclass(frozen=True)
class Settings:
    """The size of the comparisons."""

    inversion: InversionSettings
    images: int  # in a calibration set, inverted as one batch
    seeds: int  # for quantisation and transfer
    test_images: int | None  # on which models are evaluated; None means the whole test split
    rounds: int  # of a transfer
    samples: int  # fresh images in a round, inverted as one batch
    steps: int  # of the student's optimiser in a round
    batch_size: int  # of the student
    real_images: int  # in the transfer that shows the ceiling; other transfers from real images use at most as many
    ablation_seeds: int
    ablation_test_images: int | None  # on which quantised models are evaluated
    ablation_steps: int  # of the student's optimiser on one calibration set
    fractions: tuple[float, ...]  # stopped at each stopping of Fig. 8, besides none and the published 0.3
    removal_images: int  # of the test split, for Table 2
    speed_models: tuple[str, ...]  # names of timm models with random weights, measured besides the model
    speed_batches: tuple[int, ...]  # batch sizes
    speed_iterations: int  # timed in each stage

    def record(self) -> dict:
        """All settings in one dict of values that JSON knows."""
        settings = asdict(self)
        del settings["inversion"]
        return json.loads(json.dumps(self.inversion.record() | settings))


@dataclass(frozen=True)
class Variant:
    """A way to invert images. Its name is also the name of its folder."""

    name: str
    stopping: StoppingSchedule
    select: str = "attention"  # which patches go on, as `Inverter` takes it


class Experiment:
    """A folder of results, with the models and the data that they are computed from.

    `about.json` records what the results belong to, `sections/` holds the finished sections, and `inverted/` holds the
    images of each variant: one file for each batch, with the cost of its inversion in the metadata. The arguments are
    those of `reproduce`.
    """

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module | None,
        data: str | Path,
        root: str | Path | None,
        out: Path,
        settings: Settings,
        progress: bool,
    ):
        self.model, self.data, self.root, self.out = model, data, root, out
        self.settings, self.progress = settings, progress
        self.fast = accelerate(model)
        self.device, self.grid = self.fast.device, self.fast.grid(self.fast.image_size)
        self.normalisation = {"mean": self.fast.mean, "std": self.fast.std}
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in self.normalisation.values())
        self.test = cache(self.test)  # test images are read once
        self.student = None
        if student is not None:
            self.student = Student(student, self.fast, lambda: self.test(settings.test_images, student))
        self.dense = Variant("dense", StoppingSchedule.dense())
        self.sparse = Variant("sparse", settings.inversion.schedule)
        self.measured: dict[Variant, list] = {}  # what the ablations have measured
        self.about = {
            "model": name_of(model),
            "student": None if student is None else name_of(student),
            "weights": [weights_checksum(m) for m in (model, student) if m is not None],
            "data": Path(data).name,
            "device": device_name(self.device),
            "versions": versions(),
            "settings": settings.record(),
        }

    def begin(self) -> None:
        """Make the folder, or check that it holds results of the same arguments.

        Raises:
            ValueError: the folder holds something else, or the models or the data do not fit each other.
        """
        self.load("train"), self.load("test")
        check_supported(self.model)
        if self.student is not None:
            self.load("test", self.student.model)
            if self.student.reader.grid != self.grid:
                ours, theirs = ("{}x{}".format(*grid.patch_size) for grid in (self.grid, self.student.reader.grid))
                raise ValueError(f"the model has patches of {ours}, the student of {theirs}")
        file = self.out / "about.json"
        if file.is_file():
            before, now = (about | about.get("settings", {}) for about in (read_json(file), self.about))
            for key in now.keys() - {"settings"}:
                if before.get(key) != now[key]:
                    raise ValueError(f"{self.out} holds results of {key} {before.get(key)}, not {now[key]}")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is there already and holds no results to go on from")
        else:
            (self.out / "sections").mkdir(parents=True)
            write_json(file, self.about)

    def section(self, name: str, make: Callable[[Experiment], Section]) -> Section:
        """Read a section from its file, or make it now and save it."""
        section = self.finished(name)
        if section is None:
            started = time.perf_counter()
            section = make(self)
            section.seconds = time.perf_counter() - started
            write_json(self._file(name), sealed(asdict(section)))
        return section

    def finished(self, name: str) -> Section | None:
        """Return the section of this name, or None if it is not finished."""
        file = self._file(name)
        return Section(**read_sealed(file)) if file.is_file() else None

    def _file(self, name: str) -> Path:
        return self.out / "sections" / f"{name}.json"

    def inverted(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        """Return batch `number` of `count` inverted images, read from its file or inverted now.

        Targets are all classes in turn, in random order. The metadata holds what the inversion cost.
        """
        file = self.out / "inverted" / f"{variant.name}-{count}" / f"{number:05}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._invert(variant, number, count).save(file)
        return InvertedDataset.load(file)

    def _invert(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        settings = replace(self.settings.inversion, stopping=variant.stopping)
        inverter = settings.inverter(self.fast, select=variant.select, progress=self.progress)
        classes = torch.randperm(self.model.num_classes, generator=torch.Generator().manual_seed(number))
        targets = classes[torch.arange(count) % len(classes)]
        meter, seed = StageMeter(self.device), batch_seed(0, count)  # batches of different sizes share no image
        with meter.batch():
            result = inverter.run(targets, seed=batch_seed(seed, number), callback=meter)
        if result.interrupted:
            raise KeyboardInterrupt
        costs = list(meter.costs.values())
        flops = sum(iteration_flops(inverter, cost.stage, count) * cost.iterations for cost in costs)
        confidence, _ = confidences(
            self.fast, result.images, result.keep, result.targets, **self.normalisation
        )  # fmt: skip
        metadata = self.normalisation | {
            "stopping": str(variant.stopping),
            "select": variant.select,
            "iterations_per_second": inverter.iterations / sum(cost.seconds for cost in costs),
            "gflop": flops / inverter.iterations / 1e9,
            "memory": max(cost.peak_memory for cost in costs) / 2**20,
            "last_memory": costs[-1].peak_memory / 2**20,
            "confidence": confidence.mean().item(),
        }
        return InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)

    def load(self, split: str, model: nn.Module | None = None) -> Dataset:
        """Load the labelled images of a split, preprocessed for this model, or for the model that is inverted."""
        return load_data(self.data, self.root, split=split, model=self.model if model is None else model)

    def test(self, count: int | None, model: nn.Module | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of `count` random test images, or of all test images, preprocessed as `load` does it."""
        dataset = self.load("test", model)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
        held = len(chosen) * dataset[0][0].nbytes <= MAX_HELD
        loader = DataLoader(Subset(dataset, chosen), BATCH, num_workers=0 if held else 8)
        return list(loader) if held else loader

    def accuracy(self, model: nn.Module, count: int | None) -> float:
        """Measure the accuracy of a model on `count` test images, in %."""
        return 100 * accuracy(model, self.test(count), progress=False)

    def quantised(self, calibrations: Sequence[InvertedDataset | Tensor], count: int | None) -> list[list[float]]:
        """Measure the accuracy at W8/A8 and at W4/A8, in %, after calibration on each of the sets."""
        return [
            [self.accuracy(quantize(self.model, images, bits, 8), count) for images in calibrations]
            for bits in WEIGHT_BITS
        ]

    @property
    def final_count(self) -> int:
        """The number of patches per image that the sparse variant keeps."""
        return list(self.sparse.stopping.patches(self.grid.num_patches).values())[-1]

    def sparsity(self, dataset: InvertedDataset) -> float:
        """Return the share of patches that the images lack, in %."""
        return 100 * (1 - kept(dataset) / self.grid.num_patches)


def kept(dataset: InvertedDataset) -> float:
    """Return the mean number of patches per image."""
    return dataset.positions.numel() / len(dataset)


def name_of(model: nn.Module) -> str:
    """Return timm's name of the model, or the name of its class."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture", type(model).__name__)


def split(count: int | None) -> str:
    """Return the words for `count` images of the test split on a page."""
    return "the whole test split" if count is None else f"{count:,} random images of the test split"
