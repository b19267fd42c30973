"""The command line: smi-fast info and invert; the commands that use the images are in downstream.py."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import smi_fast
from smi_fast import kernels
from smi_fast.backbones.base import class_names
from smi_fast.cli.arguments import (
    INTERRUPTED,
    Parser,
    add_device,
    add_inversion,
    add_model,
    add_output,
    check_memory,
    check_out,
    count,
    inversion_of,
    model_of,
    seed,
)
from smi_fast.cli.downstream import add_downstream
from smi_fast.data.files import write_json
from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion import meter as report
from smi_fast.inversion.inverter import InversionResult, Inverter, NonFiniteError, Step
from smi_fast.models import MODEL_DIR
from smi_fast.models.loading import MODEL_INSIDE
from smi_fast.seeds import batch_seed
from smi_fast.studies import pictures as visualization

DTYPES = ("float32", "bfloat16", "float16")
FILES = ("inverted.safetensors", "grid.png", "process.png", "curve.png", "report.json")
MAX_ROWS, MAX_COLUMNS = 50, 10  # of the pictures
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # what torch says, by a RuntimeError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = argparse.Namespace(written=[])  # the names of the files in the folder of results that are complete
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _parser().parse_args(arguments, args)
            return args.run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, NonFiniteError) or any(text in str(error) for text in OUT_OF_MEMORY)
        if isinstance(error, RuntimeError) and not expected:
            raise
        print(f"smi-fast: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        what = f"after it wrote {', '.join(args.written)} to {args.out}" if args.written else "before it wrote anything"
        print(f"smi-fast: interrupted {what}", file=sys.stderr)
        return INTERRUPTED


def _sentence(error: Exception) -> str:
    """An error's message in one line. A DataLoader's worker hands on a traceback, whose last line holds the message."""
    text = str(error).strip() or "out of memory"  # MemoryError says nothing
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _show_warning(message: Warning, *where: object) -> None:
    print(f"smi-fast: warning: {message}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(prog="smi-fast", description="Fast sparse model inversion of Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"smi-fast {smi_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, device, backends, and why Triton is or is not in use")
    info.set_defaults(run=show_info)

    invert = commands.add_parser("invert", help="turn a trained classifier into images of its classes")
    invert.set_defaults(run=invert_classes)
    add_model(invert)
    images = invert.add_argument_group("images")
    images.add_argument(
        "--classes", default="first ten", metavar="LIST", help="such as 0,3,7-9, the model's class names, or all"
    )
    images.add_argument("--images-per-class", type=count, default=2, metavar="N", help="images of each class")
    images.add_argument("--batch-size", type=count, default=128, metavar="N", help="images inverted at once")
    loop = invert.add_argument_group("inversion")
    add_inversion(loop, lr="--lr")
    loop.add_argument("--seed", type=seed, default=0, metavar="N", help="of noise and views")
    machine = add_device(invert)
    machine.add_argument(
        "--dtype", choices=DTYPES,
        help="of the matrix products: bfloat16 on a GPU that has it in hardware, else float32",
    )  # fmt: skip
    machine.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="of the kernels")
    add_output(invert, "smi-fast-output")
    add_downstream(commands)
    return parser


def show_info(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, version in report.versions().items():
        print(f"{name:<12}{version}")
    print(f"{'device':<12}{report.device_name(device)}")
    print(f"{'backend':<12}{kernels.resolve_backend('auto', device)}")
    print(f"{'triton':<12}{kernels.triton_status()}")
    accuracy = json.loads((MODEL_DIR / "cifar10_vit.json").read_text())["test_accuracy"]
    print(f"{'inside':<12}{MODEL_INSIDE}: {accuracy:.2%} of the CIFAR-10 test split right")
    return 0


def invert_classes(args: argparse.Namespace) -> int:
    check_out(args.out, args.overwrite, FILES)
    settings, arguments = inversion_of(args)
    model = model_of(args)
    names = class_names(model)
    classes = parse_classes(args.classes, names)
    inverter = Inverter(
        model,
        **arguments,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        backend=args.backend,
        progress=not args.quiet,
    )
    values = len(inverter.mean) * math.prod(inverter.image_size)
    check_memory("--images-per-class", len(classes) * args.images_per_class, values)
    targets = torch.tensor(classes).repeat_interleave(args.images_per_class)
    batches = targets.split(args.batch_size)
    name = report.device_name(args.device)
    print(f"inverting {len(targets)} images of {len(classes)} classes with {args.model} on {name}")
    started = time.perf_counter()
    results, failure, meter, snapshots = [], None, report.StageMeter(args.device), Snapshots(batches[0])
    for number, batch in enumerate(batches):
        inverter.seed = batch_seed(args.seed, number)
        callbacks = [meter] if results else [meter, snapshots]
        meter.begin_batch()
        try:
            results.append(inverter.run(batch, lambda step, to=callbacks: [tell(step) for tell in to]))
        except NonFiniteError as error:
            failure = error
            results.append(error.result)
        meter.end_batch()
        if failure or results[-1].interrupted:
            break
    seconds = time.perf_counter() - started
    if not meter.costs:
        raise KeyboardInterrupt

    costs = list(meter.costs.values())
    for cost in costs:
        cost.flops = report.iteration_flops(inverter, cost.stage, len(batches[0]))
    summary = {
        "model": args.model,
        "weights": str(args.checkpoint) if args.checkpoint else "pretrained" if args.pretrained else "inside",
        "mean": inverter.mean,
        "std": inverter.std,
        "stopping": str(inverter.stopping),
        "settings": {**asdict(settings), "l2": args.l2, "jitter": inverter.jitter, "flip": inverter.flip},
        "seed": args.seed,
        "dtype": str(inverter.fast.compute_dtype).removeprefix("torch."),
        "backend": kernels.resolve_backend(args.backend, args.device),
        "device": name,
        "versions": report.versions(),
        "interrupted": results[-1].interrupted,
        "error": None if failure is None else str(failure),
    }
    outcome = _outcome(inverter, results, names) | {"seconds": seconds, "stages": report.stage_records(costs)}
    _write(args, results, names, snapshots, summary, outcome)
    print(report.stage_table(costs))
    _print_outcome(outcome, args.written, args.out)
    if failure:
        print(f"smi-fast: error: {failure}; the results are those of the iterations before", file=sys.stderr)
        return 2
    if results[-1].interrupted:
        print("interrupted: the results are those of the iterations that ran", file=sys.stderr)
        return INTERRUPTED
    return 0


def _outcome(inverter: Inverter, results: list[InversionResult], names: list[str]) -> dict:
    """How sure the model is of each image's target, and the losses of the first batch."""
    measured = [
        report.confidences(inverter.fast, r.images, r.keep, r.targets, inverter.mean, inverter.std) for r in results
    ]
    confidence, predicted = (torch.cat(parts) for parts in zip(*measured, strict=True))
    targets = torch.cat([r.targets for r in results])
    return {
        "classified_as_target": (predicted == targets).float().mean().item(),
        "mean_confidence": confidence.mean().item(),
        "images": [
            {"target": int(t), "class": names[t], "predicted": int(p), "confidence": float(c)}
            for t, p, c in zip(targets, predicted, confidence, strict=True)
        ],
        "loss": results[0].losses.tolist(),
    }


def _print_outcome(outcome: dict, written: list[str], out: Path) -> None:
    images = outcome["images"]
    right = sum(image["predicted"] == image["target"] for image in images)
    least = min(image["confidence"] for image in images)
    print(
        f"{right} of {len(images)} images are classified as their target from their kept patches alone; "
        f"confidence {outcome['mean_confidence']:.3f} in the mean, {least:.3f} at least"
    )
    print(f"{outcome['seconds']:.1f} s; wrote {', '.join(written)} to {out}")
    if "curve.png" not in written:
        print("curve.png needs matplotlib: pip install smi-fast[viz]")


class Snapshots:
    """A callback that keeps the images of the first batch at the end of each stage, one image a class."""

    def __init__(self, targets: Tensor):
        first_of_class = {int(target): number for number, target in reversed(list(enumerate(targets)))}
        self.rows = torch.tensor(sorted(first_of_class.values())[:MAX_COLUMNS])
        self.images: list[Tensor] = []
        self.titles: list[str] = []

    def __call__(self, step: Step) -> None:
        if step.iteration + 1 == step.stage.end:
            self.images.append(step.images().cpu()[self.rows])
            self.titles.append(f"iteration {step.stage.end} · {step.stage.patches:.4g} patches")


def _write(
    args: argparse.Namespace,
    results: list[InversionResult],
    names: list[str],
    snapshots: Snapshots,
    summary: dict,
    outcome: dict,
) -> None:
    """Write all results, each file complete or not at all."""
    out, written = args.out, args.written
    out.mkdir(parents=True, exist_ok=True)
    images, targets = torch.cat([r.images for r in results]), torch.cat([r.targets for r in results])
    keep = [row for r in results for row in r.keep]
    dataset = InvertedDataset.from_images(images, keep, targets, results[0].patch_size, summary)
    dataset.save(out / "inverted.safetensors", overwrite=True)
    written.append("inverted.safetensors")
    classes = list(dict.fromkeys(targets.tolist()))[:MAX_ROWS]
    rows = [images[targets == target][:MAX_COLUMNS] for target in classes]
    columns = min(map(len, rows))
    labels = [names[target] for target in classes]
    visualization.save_grid(torch.cat([row[:columns] for row in rows]), out / "grid.png", columns, labels)
    written.append("grid.png")
    if snapshots.images:
        visualization.save_process(snapshots.images, out / "process.png", snapshots.titles)
        written.append("process.png")
    curve = [
        {"iteration": iteration, "loss": results[0].losses[iteration].item(), "tokens": stage.tokens}
        for stage in results[0].history
        for iteration in range(stage.start, stage.end)
    ]
    if curve and visualization.save_curve(curve, out / "curve.png"):
        written.append("curve.png")
    write_json(out / "report.json", summary | outcome)
    written.append("report.json")
    for stale in set(FILES) - set(written):
        (out / stale).unlink(missing_ok=True)  # of an earlier run


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Class numbers out of a list such as "0,3,7-9", of class names, "all" or "first ten" (all, if there are fewer).

    Raises:
        ValueError: a part that names no class.
    """
    if text.strip() in ("all", "first ten"):
        return list(range(len(names)))[: 10 if text.strip() == "first ten" else None]
    classes: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        if part in names:
            classes.append(names.index(part))
        elif part.isdecimal():
            classes.append(_class_number(part, names))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            classes.extend(range(int(first), _class_number(last, names) + 1))
        else:
            raise ValueError(f"--classes: {part!r} is neither a class number, a range such as 0-9, nor a class name")
    return list(dict.fromkeys(classes))


def _class_number(text: str, names: list[str]) -> int:
    if int(text) >= len(names):
        raise ValueError(f"--classes: {text} is no class of the model, which has {len(names)}")
    return int(text)
