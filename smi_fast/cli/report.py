"""smi-fast report: the pictures and the figures of a run, made from its images."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from smi_fast.data.files import write_json
from smi_fast.data.manifest import MANIFEST, read_manifest
from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion.meter import StageCost
from smi_fast.runs.inversion import KIND, records
from smi_fast.studies.report import COLUMNS, stage_records, stage_table, what_was_done
from smi_fast.studies.run_page import save_page
from smi_fast.studies.run_pictures import draw

DESCRIPTION = (
    "Draw the pictures of a run of smi-fast invert again, with its page index.html and its figures report.json, from "
    "the images that are in its folder. A run that is not finished, or is still running, is shown as far as it is."
)
WIDTH = 100  # characters of a line
FILES = {  # what is written -> what it shows
    "index.html": "the run as a page, to be opened in a browser: images, process, curves, table, settings",
    "grid.png": "the images, with the names of their classes",
    "process.png": "how the first of them came about, from the left to the right",
    "process.webp": "the same as an animation",
    "curve.png": "the loss, which is minimised, and the tokens of an image",
    "report.json": "all figures",
}
OF_IMAGES = ("predicted", "confidence", "iterations")  # the figures of each image


def add_parser(commands: argparse._SubParsersAction) -> None:
    what = "draw the pictures and the page of a run again, finished or not"
    parser = commands.add_parser("report", help=what, description=DESCRIPTION)
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
    names = class_names_of(dataset)
    drawn = draw(folder, dataset, first, names)
    save_page(folder / "index.html", report, dataset, names, first["tokens"], drawn)
    write_json(folder / "report.json", report)
    return "\n".join((*sentences(report, dataset, costs), *files(folder, ["index.html", *drawn, "report.json"])))


def sentences(report: dict[str, Any], dataset: InvertedDataset, costs: list[StageCost]) -> Iterator[str]:
    """Yield the lines of the text about a run, up to its files."""
    for paragraph in what_was_done(report, dataset):
        yield from (*textwrap.wrap(paragraph, WIDTH), "")
    yield from (stage_table(costs), "")
    yield from (f"  {column:<13}{what}" for column, what in COLUMNS.items())
    yield from ("", *textwrap.wrap(summary(report), WIDTH), "")


def files(folder: Path, written: Sequence[str]) -> Iterator[str]:
    """Yield a line for each file that was written into the folder."""
    yield f"wrote to {folder}:"
    yield "  images       the sparse images, which smi_fast.InvertedDataset.load reads"
    yield from (f"  {name:<13}{FILES[name]}" for name in written)
    if "curve.png" not in written:
        yield 'curve.png needs matplotlib: pip install ".[viz]" in a checkout of smi-fast'


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


def class_names_of(dataset: InvertedDataset) -> dict[int, str]:
    """Return the names of the classes of the images, which the shards of the images hold."""
    names: dict[int, str] = {}
    for batch in records(dataset.files):
        names |= {int(target): name for target, name in batch["classes"].items()}
    return names


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
