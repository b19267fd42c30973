"""What reports have in common: the cost of each stage, tables as text, and what they mean in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion.meter import StageCost

COLUMNS = {  # of the table of stages -> what they mean
    "iterations": "the iterations of the stage; a stage ends when patches stop",
    "patches": "the patches of an image that are still worked on",
    "tokens": "what the model computes for each image: one token a patch, and its own, such as the class token",
    "it/s": "iterations per second, each of a whole batch of images",
    "GFLOP/it": "billions of floating-point operations in an iteration",
    "paper's": "the same, as the paper on Sparse Model Inversion counts them",
    "peak memory": "the most memory in use; on a CPU that of the whole process",
    "speed-up": "how many times as fast the stage is as the first one",
}

STOP = (
    "On the way the least important patches were stopped: they are not computed or changed any more, which makes the "
    "rest faster."
)
LEAVE = (
    "On the way the most important patches left as a finished image and were stopped, and the others went on to become "
    "the next one, so that the images of one target have no patch in common."
)


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
    return as_text([list(COLUMNS), *stage_rows(stage_records(costs))])


def stage_rows(records: Sequence[dict]) -> list[list[str]]:
    """Return the cost of each stage as cells of a table with these COLUMNS."""
    rows = []
    for r in records:
        memory, speed = f"{r['peak_memory_bytes'] / 2**20:.0f} MiB", f"{r['iterations_per_second']:.1f}"
        sizes = [f"{r['start']}-{r['end'] - 1}", f"{r['patches']:.4g}", f"{r['tokens']:.4g}"]
        flops = [f"{r[count]:.2f}" for count in ("gflop_per_iteration", "gflop_paper")]
        rows.append([*sizes, speed, *flops, memory, f"{r['speedup_over_dense']:.2f}x"])
    return rows


def what_was_done(report: dict[str, Any], dataset: InvertedDataset) -> list[str]:
    """Return paragraphs on how the images of a run were made, for someone who has not read the papers."""
    images, classes = len(dataset), len(set(dataset.targets.tolist()))
    iterations = report["images"]["iterations"]
    up_to = "up to " if min(iterations) < max(iterations) else ""
    text = [
        f"{plural(images, 'image')} of {plural(classes, 'class', 'classes')}, made from the weights of "
        f"{report.get('model', 'a model')} alone: each began as noise, and its pixels were changed for "
        f"{up_to}{plural(max(iterations), 'iteration')} so that the model sees the class in it. No real image was "
        "used."
    ]
    all_patches, (height, width) = dataset.grid.num_patches, dataset.patch_size
    kept = len(dataset.positions) / images
    if all_patches == 1:
        return text
    text.append(f"The model sees an image as {all_patches} patches of {height}x{width} pixels.")
    if kept < all_patches:
        how = LEAVE if "release" in report.get("stopping", "") else STOP
        text[-1] += (
            f" The importance of a patch is how much attention the model pays it. {how} "
            f"{kept:.4g} of {all_patches} patches of an image are left, a sparsity of {1 - kept / all_patches:.0%}. "
            "Stopped patches are dark grey in the pictures and black in the data."
        )
    return text


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a number with the word for what it counts, such as "1 seed" or "3 seeds"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with its columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
