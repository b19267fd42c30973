"""What reports have in common: the cost of each stage, and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from smi_fast.inversion.meter import StageCost


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
