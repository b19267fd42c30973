"""The cost and the quality of an inversion: speed, operations and memory by stage, and the model's confidence."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smi_fast.backbones.base import Backbone, frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.inversion.inverter import Inverter, Step
from smi_fast.inversion.state import Stage
from smi_fast.packed import PackedTokens, pack_keep

CLEAR_PEAK = Path("/proc/self/clear_refs")
FIRST_CALLS = 5  # a stage's first iterations load libraries, compile kernels, lay out weights and capture CUDA graphs


@dataclass
class StageCost:
    """The cost of one stage over all batches. Peak memory is the device's on CUDA, and the process's on a CPU."""

    stage: Stage
    durations: list[float] = field(default_factory=list)  # seconds of each iteration
    settled: list[float] = field(default_factory=list)  # seconds of the iterations that represent the stage
    peak_memory: int = 0  # bytes
    flops: int = 0  # operations of one iteration of a whole batch

    @property
    def iterations(self) -> int:
        return len(self.durations)

    @property
    def seconds(self) -> float:
        return sum(self.durations)

    @property
    def iterations_per_second(self) -> float:
        """The speed by the median of the settled iterations, or of all iterations if none has settled."""
        return 1 / max(statistics.median(self.settled or self.durations), 1e-9)  # a clock may stand still


class StageMeter:
    """A callback of `Inverter.run` that times each iteration and reads the peak memory of each stage.

    A run takes place inside `with meter.batch():`. On a GPU the meter waits for the device between stages only.

    Attributes:
        costs: the cost of each stage, by the stage's first iteration.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.costs: dict[int, StageCost] = {}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Measure one run. Iterations of a stage that an interruption or an error has ended count too."""
        self._stage: Stage | None = None
        self._moments = [self._now()]  # when the stage began, and the end of each of its iterations
        self._clear_peak()
        try:
            yield
        finally:
            self._end_stage()

    def __call__(self, step: Step) -> None:
        if self._stage is not None and self._stage.start != step.stage.start:  # images of a stream begin anew
            self._end_stage()
        self._moments.append(self._now())
        self._stage = step.stage
        if step.iteration + 1 == step.stage.end:
            self._end_stage()

    def _end_stage(self) -> None:
        if self._stage is None:
            return
        cost = self.costs.setdefault(self._stage.start, StageCost(self._stage))
        durations = [self._seconds(*pair) for pair in pairwise(self._moments)]
        cost.durations += durations
        cost.settled += durations[FIRST_CALLS:-1]  # the last one measures attention, without a CUDA graph
        cost.peak_memory = max(cost.peak_memory, self._peak())
        self._stage, self._moments = None, self._moments[-1:]
        self._clear_peak()

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
        if self.device.type != "cuda":
            return after - before
        after.synchronize()
        return before.elapsed_time(after) / 1000

    def _clear_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):  # Linux resets the peak; elsewhere it is the peak since the process began
            CLEAR_PEAK.write_text("5")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def iteration_flops(inverter: Inverter, stage: Stage, batch_size: int) -> int:
    """Count the floating-point operations of the matrix products of one iteration, forward and backward.

    torch's FlopCounterMode counts them on one image in plain torch, where attention is written as matrix products. The
    count is multiplied by the batch size.
    """
    backbone, grid, count = inverter.backbone, inverter.grid, round(stage.patches)
    if isinstance(backbone, AcceleratedViT):
        backbone = accelerate(backbone.model, backend="torch")
    values = grid.patch_size[0] * grid.patch_size[1] * backbone.num_channels
    patches = torch.randn(1, count, values, device=backbone.device, requires_grad=True)
    tokens = PackedTokens.from_batch(patches, torch.arange(count, device=backbone.device))
    with frozen(backbone), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.outputs(tokens, grid_size=grid.size).logits.sum().backward()
    return counter.get_total_flops() * batch_size


@torch.no_grad()
def confidences(
    backbone: Backbone,
    images: Tensor,
    keep: Tensor | list[Tensor],
    targets: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Compute the probability of each image's target and the predicted class, from the kept patches only.

    Args:
        images: (B, C, H, W) in [0, 1].
        keep: (B, K) patch indices, or a list of B index tensors.
        targets: (B,) int64.
        mean, std: the model's normalisation, one number per channel.

    Returns:
        Probabilities (B,) float32 and predicted classes (B,) int64, both on the CPU.
    """
    device = backbone.device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    keep = keep.to(device) if isinstance(keep, Tensor) else [row.to(device) for row in keep]
    images, grid = (images.to(device) - mean) / std, backbone.grid(images.shape[-2:])
    kept = pack_keep(keep, len(images), grid.num_patches, device)
    with frozen(backbone):
        logits = backbone.outputs(replace(kept, values=grid.gather(images, kept)), grid_size=grid.size).logits
    probabilities = logits.float().softmax(1).cpu()
    return probabilities.gather(1, targets[:, None])[:, 0], probabilities.argmax(1)
