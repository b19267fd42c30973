"""One iteration of the inversion, ours against the authors' published code, each in its own loop."""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from duel import OURS, check
from torch import Tensor, nn

from smi_fast import Inverter, StoppingSchedule, accelerate

# 196 -> 137 -> 95 -> 66 -> 46 patches, within the iterations not timed. The published loop measures attention in one
# iteration and prunes in the next; where two stoppings are neighbours it skips the first of them without a word.
STOPS = {1: 0.3, 3: 0.3, 5: 0.3, 7: 0.3}
ROUNDS = 5
TIMED = 4  # iterations a round
SIDE = 224


@dataclass(frozen=True)
class Stage:
    """Iterations of a model of random weights on a batch of images that all keep the same number of patches."""

    model: str
    batch: int
    kept: int  # of 196 patches: all, or what STOPS leaves
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}, batch {self.batch}, {self.kept} of 196 patches, {dtype}"

    @property
    def stops(self) -> dict[int, float]:
        return {} if self.kept == 196 else STOPS

    @property
    def iterations(self) -> int:
        """The stoppings, one iteration that is not timed, and those that are."""
        return max(self.stops, default=0) + 2 + TIMED


BFLOAT16 = f"{OURS}, bfloat16"
PUBLISHED = "published SMI"
FROZEN = "published SMI, frozen weights"
TINY, BASE = "deit_tiny_patch16_224", "deit_base_patch16_224"


@pytest.mark.contest(
    contestants=[OURS, BFLOAT16, PUBLISHED, FROZEN],
    cpu=[Stage(TINY, 8, 196), Stage(TINY, 8, 46)],
    cuda=[Stage(model, 128, kept) for model in (TINY, BASE) for kept in (196, 46)],
)
def test_iteration(case, device, enter, request):
    """Forward pass, loss with total variation, backward pass, Adam step and clamp, of the loop as it runs.

    A round is a short run; its first iterations, with the stoppings, are left out and the others are timed one by one.
    The published code trains nothing but its weights ask for gradients, and it gets them; the same code with its
    weights frozen shows what that alone costs.
    """
    checkout: Path | None = request.config.option.smi_checkout

    def contestants():
        model = timm.create_model(case.model).eval().to(device)
        targets = torch.arange(case.batch, device=device)
        rounds: dict[str, Callable | str] = {OURS: lambda: our_seconds(model, targets, case)}
        if device.type == "cuda":  # what is the default there
            rounds[BFLOAT16] = lambda: our_seconds(model, targets, replace(case, dtype=torch.bfloat16))
        if checkout is None:
            return rounds | dict.fromkeys((PUBLISHED, FROZEN), "needs --smi-checkout")
        published = Published(checkout, case, model, device)
        compare_logits(model, published.teacher, case, device)
        rounds[PUBLISHED] = lambda: published.seconds(targets, weight_gradients=True)
        rounds[FROZEN] = lambda: published.seconds(targets, weight_gradients=False)
        return rounds

    # The peak of a run is that of its first, dense iterations.
    enter("inversion, one iteration", contestants, measure=lambda run: run().tolist(), rounds=ROUNDS,
          memory=case.kept == 196)  # fmt: skip


def our_seconds(model: nn.Module, targets: Tensor, case: Stage) -> Tensor:
    """Seconds of each timed iteration of an Inverter."""
    clock: list[float] = []
    kept: list[int] = []

    def note(step) -> None:
        clock.append(step.seconds())
        kept.append(step.stage.patches)

    inverter = Inverter(
        model, stopping=StoppingSchedule(case.stops), iterations=case.iterations, dtype=case.dtype, progress=False
    )
    inverter.run(targets, callback=note)
    assert kept[-TIMED:] == [case.kept] * TIMED
    return torch.tensor(clock, dtype=torch.float64).diff()[-TIMED:]


class Published:
    """The published code's own `synthesize`, with a teacher that notes when it is called.

    Its model and its loop call the teacher once an iteration, so the time from one call to the next is an iteration.
    """

    def __init__(self, checkout: Path, case: Stage, model: nn.Module, device: torch.device):
        build_model, self.smi = imported(checkout, "utils.build_model", "synthesis.smi")
        with staying_on(device):
            self.teacher = build_model.build_model(case.model, Pretrained=False).to(device)
        self.teacher.load_state_dict(model.state_dict())
        self.case, self.device, self.config = case, device, model.pretrained_cfg

    def seconds(self, targets: Tensor, *, weight_gradients: bool) -> Tensor:
        """Seconds of each timed iteration of a run."""
        teacher = Noted(self.teacher.requires_grad_(weight_gradients))
        random.seed(0)
        torch.manual_seed(0)
        schedule = {"prune_it": list(self.case.stops), "prune_ratio": list(self.case.stops.values())}
        with tempfile.TemporaryDirectory() as directory, staying_on(self.device):
            Path(directory, "0.png").touch()  # its data loader refuses an empty folder
            synthesis = self.smi.SMI(
                teacher, self.case.model, nn.Identity(), 1000, (3, SIDE, SIDE), 16,
                iterations=self.case.iterations + 1, synthesis_batch_size=len(targets), sample_batch_size=len(targets),
                tv2=1e-4, save_dir=directory, device=self.device,
                normalizer=self.normalizer(),
            )  # fmt: skip
            synthesis.synthesize(targets, **(schedule if self.case.stops else {}))
        self.teacher.zero_grad(set_to_none=True)
        # The last call is not an iteration's: it measures the finished images.
        assert teacher.patches[-TIMED - 2 : -1] == [self.case.kept] * (TIMED + 1)
        return torch.tensor(teacher.calls[:-1], dtype=torch.float64).diff()[-TIMED:]

    def normalizer(self) -> Callable:
        """What the published code wants of one: `mean`, `std`, and the way back to [0, 1]."""
        mean, std = (torch.tensor(self.config[name], device=self.device).view(-1, 1, 1) for name in ("mean", "std"))

        class Normalizer(SimpleNamespace):
            def __call__(self, images: Tensor, reverse: bool = False) -> Tensor:
                return images * std + mean if reverse else (images - mean) / std

        return Normalizer(mean=self.config["mean"], std=self.config["std"])


class Noted(nn.Module):
    """A model of the published code that notes the time and the kept patches of every call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.calls: list[float] = []
        self.patches: list[int] = []

    def forward(self, images: Tensor, tokens: Tensor, relative: Tensor):
        if images.is_cuda:
            torch.cuda.synchronize()
        self.calls.append(time.perf_counter())
        self.patches.append(relative.shape[1] - 1)
        return self.model(images, tokens, relative)


def compare_logits(model: nn.Module, teacher: nn.Module, case: Stage, device: torch.device) -> None:
    """Raise AssertionError unless both compute the same logits from the same images and kept patches."""
    images = torch.randn(case.batch, 3, SIDE, SIDE, device=device)
    keep = torch.rand(case.batch, 196, device=device).argsort(1)[:, : case.kept]
    tokens = torch.cat((keep.new_zeros(case.batch, 1), keep + 1), dim=1)
    with torch.no_grad():
        theirs, _, _ = teacher(images, tokens, tokens)
        check(PUBLISHED, (theirs,), (accelerate(model, dtype=case.dtype)(images, keep=keep),), 1e-4)


def imported(checkout: Path, *names: str) -> list[ModuleType]:
    """Modules of the checkout, which then leave sys.path and sys.modules, where their names are too common to stay."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in {package.split(".")[0] for package in names}:
                del sys.modules[name]


@contextmanager
def staying_on(device: torch.device) -> Iterator[None]:
    """On a CPU, `.cuda()` leaves a model where it is."""
    cuda = nn.Module.cuda
    if device.type == "cpu":
        nn.Module.cuda = lambda self, device=None: self
    try:
        yield
    finally:
        nn.Module.cuda = cuda
