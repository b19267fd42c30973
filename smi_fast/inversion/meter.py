"""The cost and the quality of an inversion: speed, operations and memory by stage, and the model's confidence."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smi_fast.backbones.base import Backbone, frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.grid import PatchGrid
from smi_fast.inversion.inverter import Inverter, Step
from smi_fast.inversion.state import Stage
from smi_fast.inversion.until import certainty
from smi_fast.packed import PackedTokens, pack_keep

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose multiply-adds the paper's count has
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # and those whose values it has
CLEAR_PEAK = Path("/proc/self/clear_refs")
FIRST_CALLS = 5  # a stage's first iterations load libraries, compile kernels, lay out weights and capture CUDA graphs


@dataclass
class StageCost:
    """The cost of one stage. Peak memory is the device's on CUDA, and the process's on a CPU."""

    stage: Stage
    iterations: int
    seconds: float
    iterations_per_second: float  # by the median of the iterations that represent the stage
    peak_memory: int = 0  # bytes
    flops: int = 0  # operations of one iteration of a whole batch
    flops_paper: int = 0  # the same by the paper's count

    def record(self) -> dict[str, Any]:
        """Return the cost in JSON's types."""
        return asdict(self)

    @classmethod
    def merged(cls, records: Iterable[Mapping[str, Any]]) -> list[StageCost]:
        """Return the cost of each stage over several batches, from their records. Its speed is the median of
        theirs, and its operations are those of the largest batch."""
        by_start: dict[int, list[StageCost]] = {}
        for record in records:
            cost = cls(**{**record, "stage": Stage(**record["stage"])})
            by_start.setdefault(cost.stage.start, []).append(cost)
        return [
            cls(
                parts[0].stage,
                iterations=sum(part.iterations for part in parts),
                seconds=sum(part.seconds for part in parts),
                iterations_per_second=statistics.median(part.iterations_per_second for part in parts),
                peak_memory=max(part.peak_memory for part in parts),
                flops=max(part.flops for part in parts),
                flops_paper=max(part.flops_paper for part in parts),
            )
            for _, parts in sorted(by_start.items())
        ]


@dataclass
class _Times:
    """What a meter knows of one stage."""

    stage: Stage
    durations: list[float] = field(default_factory=list)  # seconds of each iteration
    settled: list[float] = field(default_factory=list)  # seconds of the iterations that represent the stage
    peak_memory: int = 0

    def cost(self) -> StageCost:
        typical = statistics.median(self.settled or self.durations)
        speed = 1 / max(typical, 1e-9)  # a clock may stand still
        return StageCost(self.stage, len(self.durations), sum(self.durations), speed, self.peak_memory)


class StageMeter:
    """A callback of `Inverter.run` that times each iteration and reads the peak memory of each stage.

    A run takes place inside `with meter.batch():`. On a GPU the meter waits for the device between stages only.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._times: dict[int, _Times] = {}  # by the stage's first iteration

    @property
    def costs(self) -> dict[int, StageCost]:
        """The cost of each stage over all batches, by the stage's first iteration."""
        return {start: times.cost() for start, times in self._times.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far. Inside the `with` block this ends a measurement and begins another."""
        self._end_stage()
        return {"times": [asdict(times) for times in self._times.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for times in state["times"]:
            self._times[times["stage"]["start"]] = _Times(**{**times, "stage": Stage(**times["stage"])})

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
        times = self._times.setdefault(self._stage.start, _Times(self._stage))
        durations = [self._seconds(*pair) for pair in pairwise(self._moments)]
        times.durations += durations
        times.settled += durations[FIRST_CALLS:-1]  # the last one measures attention, without a CUDA graph
        times.peak_memory = max(times.peak_memory, self._peak())
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


def iteration_flops(inverter: Inverter, stage: Stage, batch_size: int, flops: str = "torch") -> int:
    """Count the floating-point operations of one iteration of a batch, forward and backward.

    Args:
        inverter: the inversion whose model is counted.
        stage: the stage whose number of patches is counted, rounded if it is a mean over images.
        batch_size: the count for one image is multiplied by this.
        flops: "torch" counts what an iteration of this package computes: a product and a sum of each term of all matrix
            products, as torch's FlopCounterMode counts them in plain torch, where attention is written as matrix
            products. "paper" is the figure of Sparse Model Inversion (Hu et al., ICML 2024, Tables 1 and 3), where the
            sparse figures are those of the last stage with the 47 tokens of its 46 patches. The rule is not written
            there. It reproduces every printed figure, and it is three times (one forward pass, and a backward pass for
            twice the price, which includes the gradients of the weights) what the profiler thop 0.1.1 counts in a
            forward pass: one operation for each multiply-add of Linear and convolution layers without their biases, and
            four for each input value of LayerNorm and BatchNorm layers, two if these have no weight. All patches of the
            image are embedded, and every block computes all tokens that are left. Whatever is not such a layer counts
            nothing, above all the products of queries, keys and values. Pooling also counts nothing here, where thop
            adds 0.001 % to a ResNet18.

    Raises:
        ValueError: another `flops`.
    """
    counts = {"torch": _matrix_products, "paper": _published_operations}
    if flops not in counts:
        raise ValueError(f"flops must be one of {', '.join(counts)}, got {flops!r}")
    grid = inverter.grid
    if stage.pooling > 1:  # the image is one patch
        size = [side // stage.pooling for side in grid.image_size]
        grid = PatchGrid.of(size, size)
    return counts[flops](inverter.backbone, grid, round(stage.patches)) * batch_size


def _noise(backbone: Backbone, grid: PatchGrid, count: int) -> PackedTokens:
    """Return random pixels of the first `count` patches of one image."""
    patches = torch.randn(1, count, math.prod(grid.patch_size) * backbone.num_channels, device=backbone.device)
    return PackedTokens.from_batch(patches.requires_grad_(), torch.arange(count, device=backbone.device))


def _matrix_products(backbone: Backbone, grid: PatchGrid, count: int) -> int:
    """Count the operations of the matrix products of one image with `count` patches, forward and backward."""
    if isinstance(backbone, AcceleratedViT):
        backbone = accelerate(backbone.model, backend="torch")
    tokens = _noise(backbone, grid, count)
    with frozen(backbone), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.outputs(tokens, grid_size=grid.size).logits.sum().backward()
    return counter.get_total_flops()


@torch.no_grad()
def _published_operations(backbone: Backbone, grid: PatchGrid, count: int) -> int:
    """Count the operations of one image with `count` patches by the paper's rule, forward and backward."""
    counted = []
    model = backbone.model if isinstance(backbone, AcceleratedViT) else backbone

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, NORMS):
            counted.append(args[0].numel() * (2 if module.weight is None else 4))
        else:  # the weights of an output value
            counted.append(output.numel() * module.weight[0].numel())

    with frozen(model), ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (*PRODUCTS, *NORMS)):
                hooks.callback(module.register_forward_hook(add).remove)
        if model is backbone:
            backbone.outputs(_noise(backbone, grid, count), grid_size=grid.size)
        else:
            tokens = count + backbone.num_prefix_tokens
            drop = model.norm_pre.register_forward_pre_hook(lambda _, args: (args[0][:, :tokens],))
            hooks.callback(drop.remove)
            parameter = next(model.parameters())
            model(parameter.new_zeros(1, backbone.num_channels, *grid.image_size))
    return 3 * sum(counted)


@torch.no_grad()
def confidences(
    backbone: Backbone,
    images: Tensor,
    keep: Tensor | list[Tensor],
    targets: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Compute how sure the model is of each image's target, and the predicted class, from the kept patches only.

    Args:
        images: (B, C, H, W) in [0, 1].
        keep: (B, K) patch indices, or a list of B index tensors.
        targets: (B,) int64, or (B, classes) soft labels.
        mean, std: the model's normalisation, one number per channel.

    Returns:
        The targets' probabilities (B,) float32, for soft labels as `Until` defines it, and predicted classes (B,)
        int64, both on the CPU.
    """
    device = backbone.device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    keep = keep.to(device) if isinstance(keep, Tensor) else [row.to(device) for row in keep]
    images, grid = (images.to(device) - mean) / std, backbone.grid(images.shape[-2:])
    kept = pack_keep(keep, len(images), grid.num_patches, device)
    with frozen(backbone):
        logits = backbone.outputs(replace(kept, values=grid.gather(images, kept)), grid_size=grid.size).logits
    probabilities = logits.float().softmax(1).cpu()
    return certainty(probabilities, targets.cpu()), probabilities.argmax(1)
