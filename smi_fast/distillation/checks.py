"""What `distill` checks before it begins, and the record of its settings by which a run that goes on is recognised."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

from torch import nn

from smi_fast.data.files import checksum
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import model_checksum
from smi_fast.distillation.pool import Reader
from smi_fast.inversion.competition import competition
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.loop import settings_record
from smi_fast.inversion.schedule import Release
from smi_fast.seeds import check_seed

SAMPLES = 128  # fresh images in a round, if nothing is said


class Prepared(NamedTuple):
    """The models and the inverter of a distillation, which fit each other."""

    teacher: Reader
    student: Reader
    inverter: Inverter | None  # with the competition
    linear_probing: bool


def prepared(
    teacher: nn.Module,
    student: nn.Module,
    *,
    inverter: Inverter | None,
    dataset: InvertedDataset | None,
    linear_probing: bool | None,
    adaptive: float | None,
    js: str,
    **numbers: float | None,
) -> Prepared:
    """Check the arguments of `distill`, and make ready what they stand for.

    Raises:
        ValueError, TypeError, UnsupportedModelError: see `distill`.
    """
    _check_numbers(**numbers)
    if (inverter is None) == (dataset is None):
        raise ValueError("give either an inverter or a dataset")
    of_inversion = {"adaptive": adaptive, "inversion_batch_size": numbers["inversion_batch_size"]}
    given = [name for name, value in of_inversion.items() if value is not None]
    if inverter is None and given:
        raise ValueError(f"{given[0]} is a setting of an inversion, but the images of a dataset are there already")
    grid = dataset.grid if inverter is None else inverter.grid
    readers = [Reader(model, grid.image_size, grid.patch_size) for model in (teacher, student)]
    linear_probing = len(readers[1].heads) > 0 if linear_probing is None else linear_probing
    _check_fit(*readers, inverter, dataset, linear_probing)
    if inverter is not None:
        readers[0].mean, readers[0].std = inverter.mean, inverter.std
    if adaptive is not None:
        inverter = inverter.with_objective(competition(inverter.objective, readers[1].fast, adaptive, js))
    return Prepared(*readers, inverter, linear_probing)


def record(
    teacher: nn.Module,
    student: nn.Module,
    inverter: Inverter | None,
    dataset: InvertedDataset | None,
    rounds: int,
    samples: int | None,
    **options: float | str | bool | None,
) -> dict[str, Any]:
    """Return what decides the result of a distillation, in JSON's types."""
    inversion = {}
    if inverter is not None:
        copies = 1 + sum(isinstance(stop, Release) for stop in inverter.stopping.stops.values())
        inversion = {f"inversion_{name}": value for name, value in settings_record(inverter).items()}
        inversion |= {"backend": inverter.backbone.backend, "images": rounds * (samples or SAMPLES) * copies}
    return {
        "teacher": model_checksum(teacher),
        "student": model_checksum(student),
        "dataset": None if dataset is None else _dataset_checksum(dataset),
        "rounds": rounds,
        "samples": samples,
        **inversion,
        **options,
    }


def _dataset_checksum(dataset: InvertedDataset) -> int:
    """Return the CRC-32 of all samples."""
    plain, value = copy.copy(dataset), 0
    plain.transform = None
    for patches, positions, _ in plain:
        value = checksum(positions, checksum(patches, value))
    return value


def _check_numbers(
    seed: int, temperature: float, lr: float, momentum: float, weight_decay: float, **counts: int | None
) -> None:
    for name, count in counts.items():
        if count is None and name in ("samples", "inversion_batch_size"):
            continue
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
