"""What `distill` checks before it begins, and the record of its settings by which a run that goes on is recognised."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from smi_fast.data.files import checksum
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import weights_checksum
from smi_fast.distillation.pool import Reader
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.loop import settings_record
from smi_fast.seeds import check_seed


def settings_of(
    teacher: nn.Module,
    student: nn.Module,
    *,
    inverter: Inverter | None = None,
    dataset: InvertedDataset | None = None,
    **options: float | str | bool | None,
) -> dict[str, Any]:
    """Return what decides the result of a distillation, in JSON's types: checksums of the weights and of the dataset,
    the settings of the inverter, and the further options of `distill`.

    Raises:
        ValueError: a file of the dataset is damaged.
    """
    inversion = {} if inverter is None else settings_record(inverter) | {"backend": inverter.backbone.backend}
    return {
        "teacher": weights_checksum(teacher),
        "student": weights_checksum(student),
        "dataset": None if dataset is None else _dataset_checksum(dataset),
        **{f"inversion_{name}": value for name, value in inversion.items()},
        **options,
    }


def _dataset_checksum(dataset: InvertedDataset) -> int:
    """Return the CRC-32 of all samples."""
    plain, value = copy.copy(dataset), 0
    plain.transform = None
    for patches, positions, _ in plain:
        value = checksum(positions, checksum(patches, value))
    return value


def check_settings(
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


def check_fit(
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
