"""What reports have in common: the versions and the device that made the figures, and tables as text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import timm
import torch

import smi_fast
from smi_fast.inversion.meter import StageCost


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries that results depend on."""
    libraries = {"torch": torch.__version__, "timm": timm.__version__}
    return {"smi_fast": smi_fast.__version__, "python": platform.python_version()} | libraries


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def stage_records(costs: Sequence[StageCost]) -> list[dict]:
    """Return the cost of each stage as report.json holds it. The first stage is the dense one."""
    dense = costs[0].iterations_per_second
    return [
        {
            **asdict(cost.stage),
            "iterations_per_second": cost.iterations_per_second,
            "speedup_over_dense": cost.iterations_per_second / dense,
            "gflop_per_iteration": cost.flops / 1e9,
            "gflop_paper": cost.flops_paper / 1e9,
            "peak_memory_bytes": cost.peak_memory,
        }
        for cost in costs
    ]


def stage_table(costs: Sequence[StageCost]) -> str:
    """Return the cost of each stage as text, with a line for each stage."""
    rows = [["iterations", "patches", "tokens", "it/s", "GFLOP/it", "paper's", "peak memory", "speed-up"]]
    for r in stage_records(costs):
        memory, speed = f"{r['peak_memory_bytes'] / 2**20:.0f} MiB", f"{r['iterations_per_second']:.1f}"
        sizes = [f"{r['start']}-{r['end'] - 1}", f"{r['patches']:.4g}", f"{r['tokens']:.4g}"]
        flops = [f"{r[count]:.2f}" for count in ("gflop_per_iteration", "gflop_paper")]
        rows.append([*sizes, speed, *flops, memory, f"{r['speedup_over_dense']:.2f}x"])
    return as_text(rows)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with its columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
