"""A distillation that is stopped, wherever that is, goes on with the same bits."""

import copy
import itertools
import json
import signal

import pytest
import torch
from distillation_cases import make_dataset, tiny, tiny_cnn

import smi_fast
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation import settings_of
from smi_fast.distillation.rounds import TRAINING, distill
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped

CASES = ["linear probing", "fine-tuning", "adaptive CNN", "dataset"]


def case(name: str) -> tuple:
    """Return teacher, student and the arguments of a distillation of 2 rounds with 3 steps each."""
    options = {"rounds": 2, "steps": 3, "samples": 5, "batch_size": 3, "seed": 3, "lr": 0.05, "progress": False}
    if name == "adaptive CNN":
        teacher, student = tiny_cnn(), tiny_cnn(width=4)
        options |= {"adaptive": 10.0, "inversion_batch_size": 3}
        inverter = smi_fast.Inverter(teacher, objective=smi_fast.deep_inversion(), iterations=3, progress=False)
        return teacher, student, options | {"inverter": inverter}
    teacher, student = tiny(), tiny(mean=0.4, proj_drop_rate=0.2)
    options["linear_probing"] = name == "linear probing"
    if name == "dataset":
        return teacher, student, options | {"dataset": make_dataset(n=8)}
    inverter = smi_fast.Inverter(teacher, iterations=4, stopping={2: 0.5}, progress=False)
    return teacher, student, options | {"inverter": inverter}


def figures(result) -> list:
    """What is exact of the rounds' figures."""
    return [(r.number, r.samples, r.iterations, r.steps, r.loss, r.accuracy) for r in result.history]


def pixels(result) -> list[torch.Tensor]:
    return [sample[0] for batch in result.batches for sample in batch]


def opened(folder, **options) -> Run:
    return Run(folder, "distillation", {}, **options)


class StoppedAfter:
    """Asks a run for an end at its pause number `count`, as a signal does, and counts its pauses."""

    def __init__(self, run: Run, count: int | None = None):
        self.run, self.count, self.pauses, self.check = run, count, 0, run.signals.check
        run.signals.check = lambda: None  # while a process waits
        self.asked = property(self)

    @property
    def number(self) -> int | None:
        self.pauses += 1
        return signal.SIGTERM if self.pauses == self.count else None


def equal(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
