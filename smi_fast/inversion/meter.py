"""What a run cost and what it reached: per stage speed, operations and memory, and the model's confidence."""

from __future__ import annotations

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import smi_fast
from smi_fast.backbones.base import frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.inversion.inverter import Inverter, Step
from smi_fast.inversion.state import Stage

CLEAR_PEAK = Path("/proc/self/clear_refs")
FIRST_CALLS = 5  # a stage's first iterations load libraries, compile kernels, lay out weights and capture CUDA graphs


@dataclass
class StageCost:
    """One stage over all batches. Peak memory is the device's on CUDA, the process's on a CPU."""

    stage: Stage
    durations: list[float] = field(default_factory=list)  # seconds, one entry an iteration
    settled: list[float] = field(default_factory=list)  # those of iterations that are like most of the stage's
    peak_memory: int = 0  # bytes
    flops: int = 0  # of one iteration of a whole batch

    @property
    def iterations(self) -> int:
        return len(self.durations)

    @property
    def seconds(self) -> float:
        return sum(self.durations)

    @property
    def iterations_per_second(self) -> float:
        """By the median of the settled iterations, or of all where a stage has none."""
        typical = statistics.median(self.settled or self.durations)
        return 1 / typical if typical else 0.0


class StageMeter:
    """A callback of `Inverter.run` that times each iteration and reads the peak memory of each stage. On a GPU it waits
    for the device between stages only."""

    def __init__(self, device: torch.device):
        self.device = device
        self.costs: dict[int, StageCost] = {}  # by first iteration

    def begin_batch(self) -> None:
        """Call before each run."""
        self._stage: Stage | None = None
        self._moments = [self._now()]  # when the stage began, and the end of each of its iterations
        self._clear_peak()

    def __call__(self, step: Step) -> None:
        self._moments.append(self._now())
        self._stage = step.stage
        if step.iteration + 1 == step.stage.end:
            self.end_batch()

    def end_batch(self) -> None:
        """Call after each run, so that the iterations of an interrupted stage count too."""
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
        with contextlib.suppress(OSError):  # Linux: start the high-water mark anew; elsewhere it is that of the process
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
    """Floating-point operations of the matrix products of one iteration, forward and backward (FlopCounterMode).

    Counted on one image in plain torch, attention as the matrix products that it is, times the batch size.
    """
    model = inverter.fast.model
    plain = accelerate(model, backend="torch")
    parameter = model.patch_embed.proj.weight
    images = torch.randn(1, len(inverter.mean), *inverter.image_size, device=parameter.device, dtype=parameter.dtype)
    keep = torch.arange(round(stage.patches), device=parameter.device)[None]
    with frozen(plain), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain(images.requires_grad_(), keep=keep).sum().backward()
    return counter.get_total_flops() * batch_size


@torch.no_grad()
def confidences(
    fast: AcceleratedViT, images: Tensor, keep: Tensor | list[Tensor], targets: Tensor, mean, std
) -> tuple[Tensor, Tensor]:
    """The probability of each target and the predicted class, from the kept patches alone in the plain view.

    Args:
        images: (B, C, H, W) in [0, 1].
        keep: (B, K), or a list of B index tensors.
        targets: (B,).
        mean, std: the model's normalisation, per channel.

    Returns:
        (B,) float32 and (B,) int64, on the CPU.
    """
    device = fast.device
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    keep = keep.to(device) if isinstance(keep, Tensor) else [row.to(device) for row in keep]
    with frozen(fast):
        logits = fast((images.to(device) - mean) / std, keep)
    probabilities = logits.float().softmax(1).cpu()
    return probabilities.gather(1, targets[:, None])[:, 0], probabilities.argmax(1)


def versions() -> dict[str, str]:
    return {
        "smi_fast": smi_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def stage_records(costs: list[StageCost]) -> list[dict]:
    """The table as data: what report.json holds of each stage."""
    dense = costs[0].iterations_per_second
    return [
        {
            **asdict(cost.stage),
            "iterations_per_second": cost.iterations_per_second,
            "speedup_over_dense": cost.iterations_per_second / dense if dense else None,
            "gflop_per_iteration": cost.flops / 1e9,
            "peak_memory_bytes": cost.peak_memory,
        }
        for cost in costs
    ]


def stage_table(costs: list[StageCost]) -> str:
    """One line a stage, as text."""
    rows = [["iterations", "patches", "tokens", "it/s", "GFLOP/it", "peak memory", "speed-up"]]
    for record in stage_records(costs):
        rows.append(
            [
                f"{record['start']}-{record['end'] - 1}",
                f"{record['patches']:.4g}",
                f"{record['tokens']:.4g}",
                f"{record['iterations_per_second']:.1f}",
                f"{record['gflop_per_iteration']:.2f}",
                f"{record['peak_memory_bytes'] / 2**20:.0f} MiB",
                f"{record['speedup_over_dense']:.2f}x",
            ]
        )
    return as_text(rows)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
