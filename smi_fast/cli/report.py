"""smi-fast report: the pictures and the figures of a run, made from its images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smi_fast.data.files import write_json
from smi_fast.data.manifest import MANIFEST, read_manifest
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import load_state
from smi_fast.inversion.meter import StageCost
from smi_fast.runs.inversion import KIND, SNAPSHOTS, records
from smi_fast.studies.pictures import save_grid, save_process
from smi_fast.studies.plots import save_curve
from smi_fast.studies.report import stage_records, stage_table

FILES = ("grid.png", "process.png", "curve.png", "report.json")
MAX_ROWS, MAX_COLUMNS = 50, 10  # of images in a picture
OF_IMAGES = ("predicted", "confidence", "iterations")  # the figures of each image


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="draw the pictures of a run again, finished or not")
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder that smi-fast invert writes to")


def run(args: argparse.Namespace) -> int:
    if not (args.folder / MANIFEST).is_file() or read_manifest(args.folder)["kind"] != KIND:
        raise ValueError(f"{args.folder} holds no run of smi-fast invert")
    print(write_report(args.folder))
    return 0


def write_report(folder: Path) -> str:
    """Write report.json and the pictures of a run's images so far into its folder, and return a text about them.

    Raises:
        FileNotFoundError: no image is finished yet.
        ValueError: a file of the run is damaged. The message names it.
    """
    dataset = InvertedDataset.load(folder)
    first, costs, figures = measured(dataset)
    report = {
        **{name: value for name, value in first.items() if name in dataset.metadata and name not in OF_IMAGES},
        "count": len(dataset),
        "missing": dataset.missing,
        **figures,
        "loss": first["loss"],  # of the first batch
        "stages": stage_records(costs),
    }
    drawn = draw(folder, dataset, first)
    write_json(folder / "report.json", report)
    lines = [stage_table(costs), summary(report), f"wrote {', '.join(['images', *drawn, 'report.json'])} to {folder}"]
    if "curve.png" not in drawn:
        lines.append("curve.png needs matplotlib: pip install smi-fast[viz]")
    return "\n".join(lines)


def measured(dataset: InvertedDataset) -> tuple[dict[str, Any], list[StageCost], dict[str, Any]]:
    """Return the metadata of the first shard of a run, the cost of each stage, and the figures of all images."""
    first, columns, stages, verified, seconds = None, {name: [] for name in OF_IMAGES}, [], [], 0.0
    for batch in records(dataset.files):
        first = first or batch
        for name, column in columns.items():
            column += batch[name]
        stages += batch["stages"]
        seconds += batch["seconds"]
        verified.append((batch["verified"], len(batch["predicted"])))
    targets = dataset.targets
    right = torch.tensor(columns["predicted"]) == targets
    figures = {
        "classified_as_target": right.float().mean().item(),
        "mean_confidence": sum(columns["confidence"]) / len(targets),
        "images": {"target": targets.tolist(), **columns},
        "verified": [records for records, _ in verified],
        "verified_at_end": verified_at_end(verified),
        "seconds": seconds,
        "images_per_hour": len(targets) / seconds * 3600,
    }
    return first, StageCost.merged(stages), figures


def verified_at_end(verified: Sequence[tuple[list, int]]) -> float | None:
    """Return the verifier's last accuracy over the images of all batches, or None without a verifier."""
    checked = [(records[-1][1], count) for records, count in verified if records]
    return sum(share * count for share, count in checked) / sum(count for _, count in checked) if checked else None


def draw(folder: Path, dataset: InvertedDataset, first: dict[str, Any]) -> list[str]:
    """Draw the pictures, and return the names of those that could be drawn."""
    drawn = ["grid.png"]
    classes = list(dict.fromkeys(dataset.targets.tolist()))[:MAX_ROWS]
    rows = [(dataset.targets == target).nonzero().flatten()[:MAX_COLUMNS].tolist() for target in classes]
    columns, names = min(map(len, rows)), class_names_of(dataset, classes)
    shown = dataset.images([number for row in rows for number in row[:columns]])
    save_grid(shown, folder / "grid.png", columns, names)
    if (folder / SNAPSHOTS).exists():
        snapshots = load_state(folder / SNAPSHOTS)
        if snapshots["images"]:
            save_process(snapshots["images"], folder / "process.png", snapshots["titles"])
            drawn.append("process.png")
    tokens = [count for start, end, count in first["tokens"] for _ in range(start, end)][: len(first["loss"])]
    tokens += tokens[-1:] * (len(first["loss"]) - len(tokens))
    if tokens and save_curve(first["loss"], tokens, folder / "curve.png") is not False:
        drawn.append("curve.png")
    return drawn


def class_names_of(dataset: InvertedDataset, classes: Sequence[int]) -> list[str]:
    """Return the names of classes, which the shards of their images hold."""
    names: dict[str, str] = {}
    for batch in records(dataset.files):
        names |= batch["classes"]
        if all(str(target) in names for target in classes):
            break
    return [names[str(target)] for target in classes]


def summary(report: dict[str, Any]) -> str:
    """Return what the figures say, in sentences."""
    count, right = report["count"], round(report["classified_as_target"] * report["count"])
    least = min(report["images"]["confidence"])
    text = (
        f"From its kept patches alone, the model classifies {right} of {count} images as their target, with a "
        f"confidence of {report['mean_confidence']:.3f} on average and at least {least:.3f}. "
        f"The batches took {report['seconds']:.1f} s in all, which is {report['images_per_hour']:.0f} images per hour."
    )
    if report["verified_at_end"] is not None:
        text += f" The verifier classifies {report['verified_at_end']:.1%} as their target."
    return text
