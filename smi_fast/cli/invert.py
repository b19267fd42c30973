"""smi-fast invert: images of a classifier's classes, written as a dataset and as pictures, with a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import smi_fast.cli.arguments as arguments
from smi_fast import kernels
from smi_fast.backbones.base import class_names
from smi_fast.cli.output import INTERRUPTED, Results, add_output
from smi_fast.data.files import write_json
from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion.inverter import InversionResult, Inverter, NonFiniteError, Step
from smi_fast.inversion.meter import StageCost, StageMeter, confidences, iteration_flops
from smi_fast.inversion.state import Stage
from smi_fast.inversion.stream import has_independent_images
from smi_fast.models.loading import INSIDE
from smi_fast.seeds import batch_seed
from smi_fast.studies.pictures import save_grid, save_process
from smi_fast.studies.plots import save_curve
from smi_fast.studies.report import device_name, stage_records, stage_table, versions

DTYPES = ("float32", "bfloat16", "float16")
FILES = ("inverted.safetensors", "grid.png", "process.png", "curve.png", "report.json")
MAX_ROWS, MAX_COLUMNS = 50, 10  # of images in a picture


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("invert", help="turn a trained classifier into images of its classes")
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    images = parser.add_argument_group("images")
    what = "classes by number or by the model's names for them, such as 0,3,7-9 or cat,ship; or all"
    images.add_argument("--classes", default="first ten", metavar="LIST", help=what)
    arguments.add_numbers(
        images,
        images_per_class=(arguments.count, 2, "number of images of each class"),
        batch_size=(arguments.count, 128, "number of images inverted at once"),
    )
    loop = parser.add_argument_group("inversion")
    arguments.add_inversion(loop)
    arguments.add_numbers(loop, seed=(arguments.seed, 0, "seed for the initial noise and the views"))
    what = "another model, which classifies the images now and then; its accuracy is reported"
    arguments.add_model(parser, what, role="verifier", default=None)
    machine = arguments.add_device(parser)
    what = "dtype of the matrix products (default: bfloat16 on a GPU that has it in hardware, otherwise float32)"
    machine.add_argument("--dtype", choices=DTYPES, help=what)
    what = "kernels in Triton or in plain torch; auto takes Triton on CUDA"
    machine.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help=what)
    add_output(parser, "smi-fast-output")


def run(args: argparse.Namespace) -> int:
    results, model = Results(args, FILES), arguments.model_of(args)
    settings = arguments.inversion_settings(args, model)
    names = class_names(model)
    classes = parse_classes(args.classes, names)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    verifier = verifier_of(args)
    inverter = settings.inverter(model, dtype=dtype, backend=args.backend, verifier=verifier, progress=not args.quiet)
    count, shape = len(classes) * args.images_per_class, (len(inverter.mean), *inverter.image_size)
    arguments.check_memory("--images-per-class", count, shape)
    targets = torch.tensor(classes).repeat_interleave(args.images_per_class)
    print(f"inverting {count} images of {len(classes)} classes with {args.model} on {device_name(args.device)}")

    inversion = invert(inverter, targets, args.batch_size, args.seed)
    if not inversion.costs:
        raise KeyboardInterrupt
    weights = "inside" if args.model in INSIDE else "folder"
    about = {
        "model": args.model,
        "weights": str(args.checkpoint) if args.checkpoint else "pretrained" if args.pretrained else weights,
        "mean": inverter.mean,
        "std": inverter.std,
        "stopping": str(inverter.stopping),
        "settings": settings.record(),
        "seed": args.seed,
        "dtype": str(inverter.backbone.compute_dtype).removeprefix("torch."),
        "backend": kernels.resolve_backend(args.backend, args.device),
        "device": device_name(args.device),
        "versions": versions(),
        "interrupted": inversion.interrupted,
        "error": None if inversion.error is None else str(inversion.error),
    }
    report = about | inversion.outcome(names)

    inversion.save(results, names, about)
    results.write("report.json", lambda path: write_json(path, report))
    for stale in set(FILES) - set(results.written):
        (results.folder / stale).unlink(missing_ok=True)  # an earlier run wrote it

    print(stage_table(inversion.costs))
    print(_summary(report), results, sep="\n")
    if "curve.png" not in results.written:
        print("curve.png needs matplotlib: pip install smi-fast[viz]")
    if inversion.error:
        print(f"smi-fast: error: {inversion.error}; the results are those of the iterations before", file=sys.stderr)
        return 2
    if inversion.interrupted:
        print("interrupted: the results are those of the iterations that ran", file=sys.stderr)
        return INTERRUPTED
    return 0


def verifier_of(args: argparse.Namespace) -> nn.Module | None:
    """Load the verifier, if the command has one."""
    if args.verifier is not None:
        return arguments.model_of(args, "verifier")
    for name in ("pretrained", "checkpoint"):
        if getattr(args, f"verifier_{name}"):
            raise ValueError(f"--verifier-{name} is about the weights of the model that --verifier names")
    return None


def invert(inverter: Inverter, targets: Tensor, batch_size: int, seed: int) -> Inversion:
    """Invert batches of targets one after the other, until one is interrupted or its attention is not finite. Images
    that can leave one by one go through the places of one batch."""
    meter, batches = StageMeter(inverter.backbone.device), targets.split(batch_size)
    inversion = Inversion(inverter, snapshots=Snapshots(batches[0], inverter.stages))
    streams = inverter.until is not None and has_independent_images(inverter)
    started = time.perf_counter()
    for number, batch in enumerate([targets] if streams else batches):
        callbacks = [meter] if number else [meter, inversion.snapshots]
        options = {
            "seed": batch_seed(seed, number),
            "callback": lambda step, to=callbacks: [callback(step) for callback in to],
        }
        try:
            with meter.batch():
                result = inverter.stream(batch, batch_size, **options) if streams else inverter.run(batch, **options)
        except NonFiniteError as error:
            inversion.error, result = error, error.result
        inversion.batches.append(result)
        if inversion.error or result.interrupted:
            break
    inversion.seconds = time.perf_counter() - started
    inversion.costs = list(meter.costs.values())
    for cost in inversion.costs:
        cost.flops = iteration_flops(inverter, cost.stage, len(batches[0]))
        cost.flops_paper = iteration_flops(inverter, cost.stage, len(batches[0]), flops="paper")
    return inversion


class Snapshots:
    """A callback that keeps the first image of each class, for up to ten classes, at the end of each stage. If no patch
    stops, it does so at four moments of the run."""

    def __init__(self, targets: Tensor, stages: Sequence[Stage]):
        end = stages[-1].end
        self.moments = {stage.end for stage in stages} | ({end // 20, end // 4, end // 2} if len(stages) < 3 else set())
        self.is_sparse = stages[0].patches != 1
        first_of_class = {int(target): number for number, target in reversed(list(enumerate(targets)))}
        self.numbers = sorted(first_of_class.values())[:MAX_COLUMNS]
        self.images: list[Tensor] = []
        self.titles: list[str] = []

    def __call__(self, step: Step) -> None:
        done, numbers = step.iteration + 1, step._state.numbers
        if done in self.moments and set(self.numbers) <= set(numbers):  # images of a stream leave one by one
            self.moments.remove(done)
            going_on = step.images()[-len(numbers) :]  # without those that were released before
            self.images.append(going_on[[numbers.index(number) for number in self.numbers]].cpu())
            self.titles.append(f"iteration {done}" + f" · {step.stage.patches:.4g} patches" * self.is_sparse)


@dataclass
class Inversion:
    """The batches that the command inverted, and what they cost."""

    inverter: Inverter
    snapshots: Snapshots  # of the first batch
    batches: list[InversionResult] = field(default_factory=list)
    costs: list[StageCost] = field(default_factory=list)  # of each stage that ran
    seconds: float = 0.0
    error: NonFiniteError | None = None  # what ended the last batch

    @property
    def interrupted(self) -> bool:
        return self.batches[-1].interrupted

    @property
    def targets(self) -> Tensor:
        return torch.cat([batch.targets for batch in self.batches])

    def outcome(self, names: Sequence[str]) -> dict:
        """Return the model's confidence in each image's target, the losses of the first batch, and costs by stage."""
        backbone, mean, std = self.inverter.backbone, self.inverter.mean, self.inverter.std
        measured = [confidences(backbone, b.images, b.keep, b.targets, mean, std) for b in self.batches]
        confidence, predicted = (torch.cat(parts) for parts in zip(*measured, strict=True))
        return {
            "classified_as_target": (predicted == self.targets).float().mean().item(),
            "mean_confidence": confidence.mean().item(),
            "images": [
                {"target": int(t), "class": names[t], "predicted": int(p), "confidence": float(c)}
                for t, p, c in zip(self.targets, predicted, confidence, strict=True)
            ],
            "loss": self.batches[0].losses.tolist(),
            "iterations": [int(count) for batch in self.batches for count in batch.iterations],
            "verified": [list(batch.verified) for batch in self.batches],
            "verified_at_end": self.verified(),
            "seconds": self.seconds,
            "images_per_hour": len(self.targets) / self.seconds * 3600,
            "stages": stage_records(self.costs),
        }

    def verified(self) -> float | None:
        """Return the verifier's last accuracy, over the images of all batches, or None without a verifier."""
        checked = [(batch.verified[-1][1], len(batch.targets)) for batch in self.batches if batch.verified]
        return sum(share * count for share, count in checked) / sum(count for _, count in checked) if checked else None

    def save(self, results: Results, names: Sequence[str], about: dict) -> None:
        """Write the dataset and the pictures."""
        first, targets = self.batches[0], self.targets
        images = torch.cat([batch.images for batch in self.batches])
        keep = [row for batch in self.batches for row in batch.keep]
        dataset = InvertedDataset.from_images(images, keep, targets, first.patch_size, about)
        results.write("inverted.safetensors", lambda path: dataset.save(path, overwrite=True))
        classes = list(dict.fromkeys(targets.tolist()))[:MAX_ROWS]
        rows = [images[targets == target][:MAX_COLUMNS] for target in classes]
        columns, labels = min(map(len, rows)), [names[target] for target in classes]
        grid = torch.cat([row[:columns] for row in rows])
        results.write("grid.png", lambda path: save_grid(grid, path, columns, labels))
        if self.snapshots.images:
            results.write("process.png", lambda path: save_process(self.snapshots.images, path, self.snapshots.titles))
        tokens = [stage.tokens for stage in first.history for _ in range(stage.start, stage.end)][: len(first.losses)]
        tokens += tokens[-1:] * (len(first.losses) - len(tokens))
        if tokens:
            results.write("curve.png", lambda path: save_curve(first.losses.tolist(), tokens, path))


def _summary(report: dict) -> str:
    images = report["images"]
    right = sum(image["predicted"] == image["target"] for image in images)
    least = min(image["confidence"] for image in images)
    text = (
        f"From its kept patches alone, the model classifies {right} of {len(images)} images as their target, with a "
        f"confidence of {report['mean_confidence']:.3f} on average and at least {least:.3f}. "
        f"The inversion took {report['seconds']:.1f} s, which is {report['images_per_hour']:.0f} images per hour."
    )
    share = report["verified_at_end"]
    return text + (f" The verifier classifies {share:.1%} as their target." if share is not None else "")


def parse_classes(text: str, names: Sequence[str]) -> list[int]:
    """Read a list of classes such as "0,3,7-9" or "cat,ship", "all", or "first ten" (all, if there are fewer).

    Raises:
        ValueError: a part of the list is not the name or number of a class.
    """
    if not names:
        raise ValueError("--classes: the model has no classes, because it has no classifier")
    if text.strip() in ("all", "first ten"):
        return list(range(len(names)))[: 10 if text.strip() == "first ten" else None]
    classes: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if part in names:
            classes.append(names.index(part))
        elif not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"--classes: {part!r} is neither a class number, a range such as 0-9, nor a class name")
        elif int(last) >= len(names):
            raise ValueError(f"--classes: {last} is no class of the model, which has {len(names)}")
        else:
            classes += range(int(first), int(last) + 1)
    return list(dict.fromkeys(classes))
