"""The command line: smi-fast info and invert; the commands that use the images are in downstream.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import smi_fast
from smi_fast import kernels, report, visualization
from smi_fast.arguments import INTERRUPTED, add_device, add_model, add_output, check_out, check_positive, device_of
from smi_fast.dataset import InvertedDataset, atomic_write
from smi_fast.downstream import add_downstream
from smi_fast.inversion import InversionResult, Inverter, Step
from smi_fast.loading import MODEL_INSIDE, class_names, load_model
from smi_fast.models import MODEL_DIR
from smi_fast.objectives import deep_inversion
from smi_fast.stopping import StoppingSchedule

PAPER_SETTINGS = {"iterations": 4000, "lr": 0.25, "tv_l2": 1e-4}
# A small model of small images is sure sooner, and needs a smoother prior and smaller steps.
MODEL_INSIDE_SETTINGS = {"iterations": 600, "lr": 0.1, "tv_l2": 1e-3}
DTYPES = ("float32", "bfloat16", "float16")
FILES = ("inverted.safetensors", "grid.png", "process.png", "curve.png", "report.json")
MAX_ROWS, MAX_COLUMNS = 50, 10  # of the pictures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
        print(f"smi-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("smi-fast: interrupted before there was anything to keep", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smi-fast", description="Fast sparse model inversion of Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"smi-fast {smi_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, device, backends, and why Triton is or is not in use")
    info.set_defaults(run=show_info)

    invert = commands.add_parser(
        "invert",
        help="turn a trained classifier into images of its classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    invert.set_defaults(run=invert_classes)
    add_model(invert)
    images = invert.add_argument_group("images")
    images.add_argument(
        "--classes", default="first ten", metavar="LIST", help="such as 0,3,7-9, the model's class names, or all"
    )
    images.add_argument("--images-per-class", type=int, default=2, metavar="N", help="images of each class")
    images.add_argument("--batch-size", type=int, default=128, metavar="N", help="images inverted at once")
    loop = invert.add_argument_group("inversion")
    settings = f"paper's: %s; {MODEL_INSIDE}: %s"
    for name, kind in (("iterations", int), ("lr", float), ("tv_l2", float)):
        both = settings % (PAPER_SETTINGS[name], MODEL_INSIDE_SETTINGS[name])
        loop.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, metavar="N", help=both)
    loop.add_argument("--l2", type=float, default=0.0, metavar="N", help="weight of the l2 prior")
    loop.add_argument(
        "--stopping",
        default="paper",
        metavar="SCHEDULE",
        help="iteration:fraction,... such as 50:0.3,100:0.3; paper (scaled to the number of iterations); dense",
    )
    loop.add_argument("--seed", type=int, default=0, metavar="N", help="of noise and views")
    machine = add_device(invert)
    machine.add_argument(
        "--dtype", choices=DTYPES, default=argparse.SUPPRESS,
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
    check_positive(args, "images_per_class", "batch_size")
    check_out(args.out, args.overwrite)
    settings = {**(MODEL_INSIDE_SETTINGS if args.model == MODEL_INSIDE else PAPER_SETTINGS)}
    settings |= {name: getattr(args, name) for name in settings if hasattr(args, name)}
    if settings["iterations"] < 1:
        raise ValueError(f"--iterations must be at least 1, got {settings['iterations']}")
    if args.stopping == "paper":
        stopping = StoppingSchedule.paper(settings["iterations"])
    else:
        stopping = StoppingSchedule.parse(args.stopping)
    device = device_of(args.device)
    model = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)
    names = class_names(model)
    classes = parse_classes(args.classes, names)
    targets = torch.tensor(classes).repeat_interleave(args.images_per_class)
    batches = targets.split(args.batch_size)
    inverters = [
        Inverter(
            model,
            stopping=stopping,
            objective=deep_inversion(tv_l2=settings["tv_l2"], l2=args.l2),
            iterations=settings["iterations"],
            lr=settings["lr"],
            dtype=getattr(torch, args.dtype) if hasattr(args, "dtype") else None,
            backend=args.backend,
            seed=args.seed + number,
            progress=not args.quiet,
        )
        for number in range(len(batches))
    ]
    name = report.device_name(device)
    print(f"inverting {len(targets)} images of {len(classes)} classes with {args.model} on {name}")
    started = time.perf_counter()
    results, meter, snapshots = [], report.StageMeter(device), Snapshots(batches[0])
    for inverter, batch in zip(inverters, batches, strict=True):
        callbacks = [meter] if results else [meter, snapshots]
        meter.begin_batch()
        results.append(inverter.run(batch, lambda step, to=callbacks: [tell(step) for tell in to]))
        meter.end_batch()
        if results[-1].interrupted:
            break
    seconds = time.perf_counter() - started
    if not meter.costs:
        raise KeyboardInterrupt

    first, costs = inverters[0], list(meter.costs.values())
    for cost in costs:
        cost.flops = report.iteration_flops(first, cost.stage, len(batches[0]))
    summary = {
        "model": args.model,
        "weights": str(args.checkpoint) if args.checkpoint else "pretrained" if args.pretrained else "inside",
        "mean": first.mean,
        "std": first.std,
        "stopping": str(stopping),
        "settings": {**settings, "l2": args.l2, "jitter": first.jitter, "flip": first.flip},
        "seed": args.seed,
        "dtype": str(first.fast.compute_dtype).removeprefix("torch."),
        "backend": kernels.resolve_backend(args.backend, device),
        "device": name,
        "versions": report.versions(),
        "interrupted": results[-1].interrupted,
    }
    outcome = _outcome(first, results, names) | {"seconds": seconds, "stages": report.stage_records(costs)}
    written = _write(args.out, results, names, snapshots, summary, outcome)
    print(report.stage_table(costs))
    _print_outcome(outcome, written, args.out)
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
    out: Path, results: list[InversionResult], names: list[str], snapshots: Snapshots, summary: dict, outcome: dict
) -> list[str]:
    """Write all results, each file complete or not at all; returns their names."""
    out.mkdir(parents=True, exist_ok=True)
    images, targets = torch.cat([r.images for r in results]), torch.cat([r.targets for r in results])
    keep = [row for r in results for row in r.keep]
    dataset = InvertedDataset.from_images(images, keep, targets, results[0].patch_size, summary)
    dataset.save(out / "inverted.safetensors", overwrite=True)
    classes = list(dict.fromkeys(targets.tolist()))[:MAX_ROWS]
    rows = [images[targets == target][:MAX_COLUMNS] for target in classes]
    columns = min(map(len, rows))
    labels = [names[target] for target in classes]
    visualization.save_grid(torch.cat([row[:columns] for row in rows]), out / "grid.png", columns, labels)
    written = ["inverted.safetensors", "grid.png"]
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
    with atomic_write(out / "report.json") as partial:
        partial.write_text(json.dumps(summary | outcome, indent=1) + "\n")
    written.append("report.json")
    for stale in set(FILES) - set(written):
        (out / stale).unlink(missing_ok=True)  # of an earlier run
    return written


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
        elif part.isdigit():
            classes.append(int(part))
        elif dash and first.isdigit() and last.isdigit() and int(first) <= int(last):
            classes.extend(range(int(first), int(last) + 1))
        else:
            raise ValueError(f"--classes: {part!r} is neither a class number, a range such as 0-9, nor a class name")
    wrong = [number for number in classes if number >= len(names)]
    if wrong:
        raise ValueError(f"--classes: {wrong[0]} is no class of the model, which has {len(names)}")
    return list(dict.fromkeys(classes))
