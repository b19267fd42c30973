"""Experiment: the models and the data of a comparison, and the folder that keeps its images and results."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from smi_fast.backbones.vit import accelerate
from smi_fast.data.files import read_sealed, sealed, write_json
from smi_fast.data.labelled import load_data
from smi_fast.data.manifest import IMAGES
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import model_checksum
from smi_fast.distillation import settings_of
from smi_fast.distillation.rounds import TRAINING
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.meter import StageMeter, confidences, iteration_flops
from smi_fast.inversion.presets import PSAQ, InversionSettings
from smi_fast.inversion.result import Step
from smi_fast.inversion.schedule import RebirthSchedule, StoppingSchedule
from smi_fast.quantization import check_supported, quantize
from smi_fast.runs.evaluation import contents, evaluate
from smi_fast.runs.machine import made_with
from smi_fast.runs.processes import Processes
from smi_fast.runs.run import Run
from smi_fast.seeds import batch_seed
from smi_fast.studies.page import Section
from smi_fast.studies.student import Student

BATCH = 128  # images that are evaluated at once
MAX_HELD = 2**30  # bytes of test images that are held in memory
BITS = ((8, 8), (4, 8), (4, 4))  # of weights and of activations
SECTIONS, INVERTED, ADAPTIVE = "sections", "inverted", "adaptive"  # the folders of finished sections and of images
NOTHING = {"inversion": None, "meter": {"times": []}}  # the checkpoint of an inversion that has not begun

Value = TypeVar("Value")


@dataclass(frozen=True)
class Settings:
    """The size of the comparisons."""

    inversion: InversionSettings
    dtype: str | None  # of the matrix products of inversions; None means the default of `Inverter`
    images: int  # in a calibration set, inverted as one batch
    seeds: int  # for quantisation and transfer
    test_images: int | None  # on which models are evaluated; None means the whole test split
    rounds: int  # of a transfer
    more_rounds: int  # of another one from sparse images, which take as long as dense ones of `rounds` rounds
    samples: int  # fresh images in a round, inverted as one batch
    steps: int  # of the student's optimiser in a round
    batch_size: int  # of the student
    student_lr: float
    real_images: int  # in the transfer that shows the ceiling; other transfers from real images use at most as many
    rebirth: int  # disjoint sparse images of each target
    competition: float  # weight of the competition with the student, in the adaptive transfer
    adaptive_seeds: int  # of this transfer
    quantised_images: int | None  # test images on which quantised models are evaluated
    ablation_seeds: int
    ablation_steps: int  # of the student's optimiser on one calibration set
    fractions: tuple[float, ...]  # stopped at each stopping of Fig. 8, besides none and the published 0.3
    region_images: int  # of which only a region is inverted, for Table 2
    removal_images: int  # of the test split, from which patches are removed
    cost_models: tuple[tuple[str, int], ...]  # names of timm models and image sizes, for Table 1
    cost_batch: int  # the number of images there
    speed_models: tuple[str, ...]  # names of timm models with random weights, measured besides the model in Table 8
    speed_batches: tuple[int, ...]  # batch sizes
    speed_iterations: int  # timed in each stage
    feature_images: int  # of the test split, in Fig. 9
    cue_images: int  # of the training split, on which a planted cue is learnt
    cue_blocks: int  # the last blocks of the model, which learn it

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
    settings: InversionSettings | None = None  # of another method than the comparison's
    model: nn.Module | None = None  # another one than the comparison's


class Experiment:
    """A folder of results, with the models and the data that they are computed from.

    It is the folder of a `Run`, which `begin` returns. `sections/` holds the finished sections, and `inverted/` holds
    the images of each variant: one file for each batch, with the cost of its inversion in the metadata. Each figure
    that takes long has a checkpoint, from which a section goes on. The arguments are those of `reproduce`.
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
            self.student = Student(student, self.fast, lambda: self.watched(self.test(settings.test_images, student)))
        self.dense = Variant("dense", StoppingSchedule.dense())
        self.sparse = Variant("sparse", settings.inversion.schedule)
        method = PSAQ.replaced({"iterations": settings.inversion.iterations})
        self.psaq_dense = Variant("PSAQ-ViT, dense", self.dense.stopping, settings=method)
        self.psaq_sparse = Variant("PSAQ-ViT, sparse", self.sparse.stopping, settings=method)
        self.about = {
            "model": name_of(model),
            "student": None if student is None else name_of(student),
            "weights": [model_checksum(m) for m in (model, student) if m is not None],
            **contents(self.load("train"), "train_split"),
            **contents(self.load("test"), "test_split"),
            **settings.record(),
        }

    def begin(self, command: Sequence[str] | None = None, **options) -> Run:
        """Return the run of the experiment, which is to be entered.

        Args:
            command: see `made_with`.
            options: see `Run`.

        Raises:
            ValueError: the models or the data do not fit each other, or see `Run`.
        """
        check_supported(self.model)
        if self.student is not None:
            self.load("test", self.student.model)
            if self.student.reader.grid != self.grid:
                ours, theirs = ("{}x{}".format(*grid.patch_size) for grid in (self.grid, self.student.reader.grid))
                raise ValueError(f"the model has patches of {ours}, the student of {theirs}")
        self.job = Run(
            self.out, "reproduction", self.about, made_with(self.device, command),
            folders=(SECTIONS, INVERTED, ADAPTIVE), processes=Processes(), **options,
        )  # fmt: skip
        return self.job

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """Return a figure, in JSON's types: from the checkpoint of this name, or made now and saved there."""
        state = self.job.checkpoint(_file_name(name))
        if state is None:
            state = {"value": make()}
            self.job.save(_file_name(name), state)
            self.job.signals.check()
        return state["value"]

    def watched(self, batches: Iterable[Value]) -> Iterator[Value]:
        """Yield batches, until a signal asks for an end."""
        for batch in batches:
            self.job.signals.check()
            yield batch

    def section(self, name: str, make: Callable[[Experiment], Section]) -> Section:
        """Read a section from its file, or make it now and save it."""
        section = self.finished(name)
        if section is None:
            before = self.job.checkpoint(name) or {"seconds": 0.0}
            started = time.perf_counter() - before["seconds"]
            try:
                section = make(self)
            finally:
                seconds = time.perf_counter() - started
                self.job.save(name, {"seconds": seconds})
            section.seconds = seconds
            self._file(name).parent.mkdir(exist_ok=True)
            write_json(self._file(name), sealed(asdict(section)))
            self.job.discard(name)
        return section

    def finished(self, name: str) -> Section | None:
        """Return the section of this name, or None if it is not finished. A damaged one is a warning, and counts as not
        finished."""
        file = self._file(name)
        try:
            return Section(**read_sealed(file)) if file.is_file() else None
        except ValueError as error:
            warnings.warn(f"{error}; the section is made again", stacklevel=2)
            return None

    def _file(self, name: str) -> Path:
        return self.out / SECTIONS / f"{name}.json"

    def inverted(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        """Return batch `number` of `count` inverted images, read from its file or inverted now.

        `targets` says of which classes. The metadata holds what the inversion cost.
        """
        file = self.folder(variant, count) / f"{number:05}.safetensors"
        if file.is_file():
            try:
                dataset = InvertedDataset.load(file)
                dataset.verify()
                return dataset
            except ValueError as error:
                warnings.warn(f"{error}; its images are inverted again", stacklevel=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._invert(variant, number, count).save(file, overwrite=True)
        self.job.discard(_batch_name(variant, number, count))
        return InvertedDataset.load(file)

    def folder(self, variant: Variant, count: int) -> Path:
        """Return the folder of a variant's batches of `count` images."""
        return self.out / INVERTED / f"{_file_name(variant.name)}-{count}"

    def inverter(self, variant: Variant) -> Inverter:
        """Return what inverts the model as a variant says."""
        settings = replace(variant.settings or self.settings.inversion, stopping=variant.stopping)
        return settings.inverter(
            variant.model or self.model, select=variant.select, dtype=self.dtype, progress=self.progress
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the matrix products of inversions."""
        return None if self.settings.dtype is None else getattr(torch, self.settings.dtype)

    def targets(self, number: int, count: int) -> Tensor:
        """Return the targets (count,) of batch `number`: all classes in turn, in random order."""
        classes = torch.randperm(self.model.num_classes, generator=torch.Generator().manual_seed(number))
        return classes[torch.arange(count) % len(classes)]

    def _invert(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        inverter = self.inverter(variant)
        each = variant.stopping.images_per_target
        if count % each:
            raise ValueError(f"{count} images cannot be {each} of each target")
        targets = self.targets(number, count // each)
        meter, seed = StageMeter(self.device), batch_seed(0, count)  # batches of different sizes share no image
        name = _batch_name(variant, number, count)
        before = self.job.checkpoint(name) or NOTHING
        meter.load_state_dict(before["meter"])

        def callback(step: Step) -> None:
            meter(step)
            self.job.pause(name, lambda: {"inversion": step.state_dict(), "meter": meter.state_dict()})

        with meter.batch():
            result = inverter.run(
                targets, seed=batch_seed(seed, number), callback=callback, state=before["inversion"]
            )  # fmt: skip
        if result.interrupted:
            raise KeyboardInterrupt
        costs = list(meter.costs.values())
        flops = sum(iteration_flops(inverter, cost.stage, len(targets)) * cost.iterations for cost in costs)
        seconds = sum(cost.seconds for cost in costs)
        confidence, _ = confidences(
            accelerate(variant.model or self.model), result.images, result.keep, result.targets, **self.normalisation
        )  # fmt: skip
        metadata = self.normalisation | {
            "stopping": str(variant.stopping),
            "select": variant.select,
            "iterations_per_second": inverter.iterations / seconds,
            "images_per_hour": 3600 * count / seconds,
            "gflop": flops / inverter.iterations / 1e9,
            "memory": max(cost.peak_memory for cost in costs) / 2**20,
            "last_memory": costs[-1].peak_memory / 2**20,
            "confidence": confidence.mean().item(),
        }
        return InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)

    def load(self, split: str, model: nn.Module | None = None) -> Dataset:
        """Load the labelled images of a split, preprocessed for this model, or for the model that is inverted."""
        return load_data(self.data, self.root, split=split, model=self.model if model is None else model)

    def test(self, count: int | None, model: nn.Module | None = None) -> DataLoader:
        """Return batches of `count` random test images, or of all test images, preprocessed as `load` does it."""
        dataset = self.load("test", model)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
        held = len(chosen) * dataset[0][0].nbytes <= MAX_HELD
        images = [dataset[number] for number in chosen] if held else Subset(dataset, chosen)
        return DataLoader(images, BATCH, num_workers=0 if held else 8)

    def accuracy(self, name: str, make: Callable[[], nn.Module], count: int | None) -> float:
        """Measure the accuracy of the model that `make` returns on `count` test images, in %. The name stands for the
        model."""
        name = _file_name(f"accuracy-{name}-{count or 'all'}")
        return 100 * evaluate(self.job, name, make, self.test(count), progress=False)["accuracy"]

    def quantised(self, name: str, calibrations: Sequence[InvertedDataset | Tensor]) -> list[list[float]]:
        """Measure the accuracy in % for each of BITS, after calibration on each of the sets. The name stands for the
        sets."""
        return [
            [
                self.accuracy(
                    f"{name}-W{weights}A{activations}-{seed}",
                    partial(quantize, self.model, images, weights, activations),
                    self.settings.quantised_images,
                )
                for seed, images in enumerate(calibrations)
            ]
            for weights, activations in BITS
        ]

    def transfer(self, name: str, images: Callable[[], InvertedDataset], seed: int, **how) -> list[float]:
        """Return the test accuracy of the student after each round of a transfer, in %. The name stands for the
        images, and `how` are settings of `distill`."""
        name = _file_name(f"transfer-{name}-{seed}")
        part = self.job.part(name)
        curve = self.once(name, lambda: self.student.learn(seed, dataset=images(), run=part, **how))
        part.discard(TRAINING)
        return curve

    def adaptive_transfer(self, seed: int, **how) -> list[float]:
        """Return the test accuracy of the student after each round, in %, where the sparse images of a round compete
        with the student as it is then. Its images and its training have a folder of their own."""
        student = self.student.copy()
        how |= {"inverter": self.inverter(self.sparse), "adaptive": self.settings.competition, "js": "exact"}
        settings = settings_of(self.student.teacher, student, seed=seed, **how)
        job = Run(
            self.out / ADAPTIVE / str(seed), "adaptive transfer", settings, made_with(self.device),
            folders=(IMAGES,), processes=Processes(), checkpoint_every=self.job.every / 60,
        )  # fmt: skip

        def learn() -> list[float]:
            job.folder.parent.mkdir(exist_ok=True)
            with job:
                return self.student.learn(seed, student, run=job, **how)

        return self.once(f"transfer-adaptive-{seed}", learn)

    @property
    def rebirth(self) -> Variant:
        return Variant("rebirth", RebirthSchedule(self.settings.rebirth).stopping(self.settings.inversion.iterations))

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


def _batch_name(variant: Variant, number: int, count: int) -> str:
    return f"{variant.name}-{count}-{number:05}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
