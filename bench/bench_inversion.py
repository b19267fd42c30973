"""One iteration of the inversion, ours against the authors' published code, each in its own loop."""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from duel import OURS, check
from plain_loop import PlainLoop, backward_flops, elementwise_bytes, forward_flops
from smi_fast.kernels.rows import uniform_lengths
from torch import Tensor, nn

from smi_fast import Inverter, SMIAdaptor, StoppingSchedule, accelerate
from smi_fast.packed import PackedTokens

# 196 -> 137 -> 95 -> 66 -> 46 patches, within the iterations not timed. The published loop measures attention in one
# iteration and prunes in the next; where two stoppings are neighbours it skips the first of them without a word.
STOPS = {1: 0.3, 3: 0.3, 5: 0.3, 7: 0.3}
ROUNDS = 5
TIMED = 4  # figures a round
# Iterations for one figure, and those that are not timed behind the stoppings: the first run without a graph or a tape.
EVERY, LEAD = {"cpu": 1, "cuda": 25}, {"cpu": 5, "cuda": 8}
SIDE = 224
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


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

    def iterations(self, every: int = 1, lead: int = 2) -> int:
        """The stoppings, those that are not timed, and those that are."""
        return max(self.stops, default=0) + lead + TIMED * every

    def facts(self, model: nn.Module) -> dict[str, float]:
        """Of one iteration, its operations, and bytes: weights and kept pixels, as if all else stayed in the chip."""
        tokens, width, element = self.kept + 1, model.embed_dim, torch.empty((), dtype=self.dtype).element_size()
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        return {
            "floor_flops": self.batch * (forward_flops(tokens, width) + backward_flops(tokens, width)),
            "floor_bytes": 2 * element * matrices + self.batch * self.kept * 3 * 16 * 16 * (28 + 3 * element),
            "elementwise_bytes": self.batch * elementwise_bytes(tokens, width, element),
        }


COMPILED = f"{OURS}, torch.compile"
PLAIN = "plain PyTorch, compiled"
PUBLISHED = "published SMI"
FROZEN = "published SMI, frozen weights"
SWAPPED = "published SMI, our model in it"
TINY, BASE = "deit_tiny_patch16_224", "deit_base_patch16_224"


@pytest.mark.contest(
    contestants=[OURS, COMPILED, PLAIN, PUBLISHED, FROZEN, SWAPPED],
    cpu=[Stage(m, 8, kept, dtype) for m in (TINY, BASE) for dtype in TOLERANCE for kept in (196, 46)],
    cuda=[Stage(model, 128, kept, torch.bfloat16) for model in (TINY, BASE) for kept in (46, 196)],
)
def test_iteration(case, device, enter, request):
    """Forward pass, loss with total variation, backward pass, Adam step and clamp, of the loop as it runs.

    A round is a short run; its first iterations, with the stoppings, are left out and the others are timed one by one.
    The published code trains nothing but its weights ask for gradients, and it gets them; the same code with its
    weights frozen shows what that alone costs. It computes in float32, as published, beside either dtype of ours. The
    same loop with nothing but its model replaced, by `SMIAdaptor(model, freeze=True)`, shows what the model gains.
    """
    checkout: Path | None = request.config.option.smi_checkout

    def contestants():
        model = timm.create_model(case.model).eval().to(device)
        targets = torch.arange(case.batch, device=device)
        rounds: dict[str, Callable | str] = {OURS: lambda: our_seconds(model, targets, case)}
        if device.type == "cuda":  # a CPU takes a minute to compile these, and is slower then

            @cache
            def plain() -> PlainLoop:  # made in its own first round: if this fails, the others are measured still
                loop = PlainLoop(model, case.dtype)
                compare_plain(model, loop, case, device)
                return loop

            rounds[COMPILED] = lambda: our_seconds(model, targets, case, compile=True)
            rounds[PLAIN] = lambda: plain_seconds(plain(), targets, case)
        if checkout is None:
            return rounds | dict.fromkeys((PUBLISHED, FROZEN, SWAPPED), "needs --smi-checkout")
        published = Published(checkout, case, model, device)
        compare_logits(model, published.teacher, case, device)
        teacher, ours = published.teacher, SMIAdaptor(model, dtype=case.dtype, freeze=True)
        rounds[PUBLISHED] = lambda: published.seconds(teacher.requires_grad_(True), targets)
        rounds[FROZEN] = lambda: published.seconds(teacher.requires_grad_(False), targets)
        rounds[SWAPPED] = lambda: published.seconds(ours, targets)
        return rounds

    with torch.device("meta"):
        facts = case.facts(timm.create_model(case.model))
    # The peak of a run is that of its first, dense iterations.
    enter("inversion, one iteration", contestants, facts, measure=lambda run: run().tolist(), rounds=ROUNDS,
          memory=case.kept == 196)  # fmt: skip


def our_seconds(model: nn.Module, targets: Tensor, case: Stage, *, compile: bool = False) -> Tensor:
    """Seconds of each timed iteration of an Inverter."""
    clock: list[float] = []
    every, lead = EVERY[targets.device.type], LEAD[targets.device.type]
    iterations = case.iterations(every, lead)

    def note(step) -> None:
        left = iterations - 1 - step.iteration
        if left <= TIMED * every and left % every == 0:
            clock.append(step.seconds())
            assert step.stage.patches == case.kept

    inverter = Inverter(
        model, stopping=StoppingSchedule(case.stops), iterations=iterations, dtype=case.dtype, compile=compile,
        progress=False,
    )  # fmt: skip
    inverter.run(targets, callback=note)
    return torch.tensor(clock, dtype=torch.float64).diff() / every


def plain_seconds(plain: PlainLoop, targets: Tensor, case: Stage) -> Tensor:
    """Seconds of each timed iteration of the plain loop, whose pixels and kept patches are random."""
    device = targets.device
    images = torch.randn(case.batch, 3, SIDE, SIDE, device=device)
    keep = torch.rand(case.batch, 196, device=device).argsort(1)[:, : case.kept]
    bounds = torch.full((3,), -2.0, device=device), torch.full((3,), 2.0, device=device)
    every, lead = EVERY[device.type], LEAD[device.type]
    return plain.seconds(targets, images, keep, bounds, lead=lead, timed=TIMED, every=every)


def compare_plain(model: nn.Module, plain: PlainLoop, case: Stage, device: torch.device) -> None:
    """Raise AssertionError unless both compute the same logits, and the same gradient to the patches."""
    keep = torch.rand(case.batch, 196, device=device).argsort(1)[:, : case.kept]
    patches = torch.randn(case.batch * case.kept, 768, device=device, requires_grad=True)
    positions, cu_seqlens = keep.flatten().int(), uniform_lengths(*keep.shape, device)
    fast = accelerate(model.requires_grad_(False), dtype=case.dtype)
    results = (
        fast.forward_patches(PackedTokens(patches, positions, cu_seqlens, case.kept)).float(),
        plain.logits(patches.view(*keep.shape, -1).to(case.dtype), keep).float(),
    )
    weights = torch.randn_like(results[0])
    ours, theirs = ((y, torch.autograd.grad((y * weights).sum(), patches)[0]) for y in results)
    check(PLAIN, theirs, ours, TOLERANCE[case.dtype])


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

    def seconds(self, teacher: nn.Module, targets: Tensor) -> Tensor:
        """Seconds of each timed iteration of a run that inverts a teacher."""
        teacher = Noted(teacher)
        random.seed(0)
        torch.manual_seed(0)
        schedule = {"prune_it": list(self.case.stops), "prune_ratio": list(self.case.stops.values())}
        with tempfile.TemporaryDirectory() as directory, staying_on(self.device):
            Path(directory, "0.png").touch()  # its data loader refuses an empty folder
            synthesis = self.smi.SMI(
                teacher, self.case.model, nn.Identity(), 1000, (3, SIDE, SIDE), 16,
                iterations=self.case.iterations() + 1, synthesis_batch_size=len(targets),
                sample_batch_size=len(targets), tv2=1e-4, save_dir=directory, device=self.device,
                normalizer=self.normalizer(),
            )  # fmt: skip
            synthesis.synthesize(targets, **(schedule if self.case.stops else {}))
        teacher.zero_grad(set_to_none=True)
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
        check(PUBLISHED, (theirs,), (accelerate(model, dtype=torch.float32)(images, keep=keep),), 1e-4)


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
