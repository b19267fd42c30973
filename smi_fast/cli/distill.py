"""smi-fast distill: teach a student with a teacher's inverted images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import smi_fast.cli.arguments as arguments
from smi_fast.backbones.cnn import CNN
from smi_fast.backbones.conversion import as_backbone
from smi_fast.cli.arguments import count, finite, seed
from smi_fast.cli.output import add_run, check_out
from smi_fast.data.files import atomic_write, write_json
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation import Round, distill, settings_of
from smi_fast.distillation.rounds import TRAINING
from smi_fast.inversion.presets import InversionSettings
from smi_fast.models import CNN_INSIDE, STUDENT_INSIDE
from smi_fast.models.loading import WITHOUT_WEIGHTS, untrained_model
from smi_fast.runs.evaluation import contents
from smi_fast.runs.machine import device_name, made_with, versions
from smi_fast.runs.processes import Processes
from smi_fast.runs.run import Run
from smi_fast.studies.plots import save_accuracy
from smi_fast.studies.report import as_text

DESCRIPTION = (
    "Teach a model, the student, what another one knows, the teacher, without the data that the teacher was trained "
    "on: in each round images are inverted from the teacher, and the student learns to give the teacher's answers to "
    "them. Test images serve only to measure the student after each round."
)
UNTRAINED_STUDENT = "cifar10_resnet8"  # the student of the CNN inside
STUDENT, ACCURACY, REPORT = FILES = ("student.safetensors", "accuracy.png", "report.json")
TRANSFER = {  # argument of `distill` -> type, default, and what the help says about it
    "rounds": (count, 10, "number of rounds; each inverts images, then trains the student"),
    "steps": (count, 200, "number of training steps of the student in a round"),
    "batch_size": (count, 128, "number of images in a step"),
    "temperature": (
        finite,
        20.0,
        "temperature of the answers: the higher, the more of them is about unlikely classes",
    ),
    "lr": (finite, 0.1, "learning rate of the student, which SGD trains"),
    "momentum": (finite, 0.9, "momentum of SGD"),
    "weight_decay": (finite, 1e-4, "weight decay of SGD"),
    "seed": (seed, 0, "seed for the inversion and for the student's training"),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("distill", help="teach a student with inverted images alone", description=DESCRIPTION)
    parser.set_defaults(run=run)
    arguments.add_model(parser, f"name of the teacher: {arguments.MODELS.removeprefix('name of a model: ')}")
    what = (
        f"name of the student, such as that of a timm model, cifar10_resnet8 or cifar10_resnet14 (default: "
        f"{STUDENT_INSIDE}, the ViT trained without labels that comes with smi-fast; for {CNN_INSIDE} an untrained "
        f"{UNTRAINED_STUDENT})"
    )
    student = arguments.add_model(parser, what, role="student", default=None)
    what = "let the student start from random weights, which --seed decides, with the teacher's classes and image size"
    student.add_argument("--student-untrained", action="store_true", help=what)
    what = "train the whole student, not only its head; a CNN and an untrained student are always trained as a whole"
    student.add_argument("--fine-tune", action="store_true", help=what)
    images = parser.add_argument_group("images")
    what = "learn from inverted images that are stored here instead of fresh ones"
    images.add_argument("--dataset", type=Path, metavar="PATH", help=what)
    what = "number of fresh images in each round (default: 128, or all images of --dataset)"
    at_once = "number of these that are inverted at once; processes of torchrun share the batches (default: all)"
    arguments.add_numbers(images, samples=(count, None, what), inversion_batch_size=(count, None, at_once))
    what = "weight of a competition: images on which teacher and student disagree, such as 10 for small CNNs"
    arguments.add_numbers(images, adaptive=(finite, None, what))
    what = "divergence of the competition: as the published code computes it (the default), or the exact one"
    images.add_argument("--js", choices=("published", "exact"), help=what)
    arguments.add_inversion(images, lr="--inversion-lr")
    arguments.add_numbers(parser.add_argument_group("transfer"), **TRANSFER)
    arguments.add_data(parser)
    arguments.add_device(parser)
    add_run(parser, "smi-fast-distilled")


def run(args: argparse.Namespace) -> int:
    check_out(args, FILES)
    teacher = arguments.model_of(args)
    inversion, student = arguments.inversion_settings(args, teacher), student_of(args, teacher)
    linear_probing = not (args.fine_tune or args.student_untrained or isinstance(as_backbone(student), CNN))
    source = image_source(args, teacher, inversion)
    test = arguments.load_test_images(args, student)
    transfer = {name: getattr(args, name) for name in ("samples", *TRANSFER)}
    options = {"linear_probing": linear_probing, **source, **transfer}
    record = {
        "teacher": args.model, "student": args.student, "student_untrained": args.student_untrained,
        "fine_tune": not linear_probing, "images": str(args.dataset),
        "settings": transfer, "test_images": len(test.dataset), "device": device_name(args.device),
        "versions": versions(), "rounds": [],
    }  # fmt: skip
    if args.dataset is None:
        record["images"] = f"inverted, stopping {inversion.stopping}, {inversion.iterations} iterations"
        record["inversion"] = inversion.record() | {"adaptive": args.adaptive, "js": source.get("js")}

    def save_round(finished: Round, batch: object) -> None:
        """Save the results of each round at once, so that they survive an interruption."""
        record["rounds"][finished.number - 1 :] = [asdict(finished)]
        save_student(student, args.out / STUDENT)
        write_json(args.out / REPORT, record)

    settings = settings_of(teacher, student, **options) | contents(test.dataset, "test")
    processes = Processes.of_environment()
    with Run(
        args.out, "distillation", settings, made_with(args.device, args.command) | {"processes": processes.size},
        files=FILES, overwrite=args.overwrite, checkpoint_every=args.checkpoint_every, processes=processes,
    ) as job:  # fmt: skip
        record["rounds"] = (job.checkpoint(TRAINING) or {"history": []})["history"]
        result = distill(
            teacher, student, evaluate=test, callback=save_round, progress=not args.quiet, run=job, **options
        )
        if job.processes.is_first:
            points = [(finished.samples, finished.accuracy) for finished in result.history]
            drawn = save_accuracy({args.student: points}, args.out / ACCURACY) is not False
            written = ", ".join([STUDENT, REPORT, *[ACCURACY] * drawn])
            print(table(result.history), f"wrote {written} to {args.out}", sep="\n")
    return 0


def student_of(args: argparse.Namespace, teacher: nn.Module) -> nn.Module:
    """Return the student on the device of the command, and write into `args` its name and whether it is untrained."""
    if args.student is None:
        args.student = UNTRAINED_STUDENT if args.model == CNN_INSIDE else STUDENT_INSIDE
    weights = [name for name in ("pretrained", "checkpoint") if getattr(args, f"student_{name}")]
    if args.student_untrained and weights:
        raise ValueError(f"give either --student-untrained or --student-{weights[0]}, not both")
    args.student_untrained |= args.student in WITHOUT_WEIGHTS and not weights
    if not args.student_untrained:
        return arguments.model_of(args, "student")
    return untrained_model(args.student, teacher, args.seed).to(args.device)


def image_source(args: argparse.Namespace, teacher: nn.Module, inversion: InversionSettings) -> dict:
    """Return the arguments of `distill` that supply the images: a stored dataset, or an inverter of the teacher and its
    competition with the student."""
    if args.js is not None and args.adaptive is None:
        raise ValueError("--js is a setting of the competition, which --adaptive asks for")
    if args.dataset is None:
        inverter = inversion.inverter(teacher, progress=False)
        arguments.check_memory("--samples", args.samples or 1, (len(inverter.mean), *inverter.image_size))
        competing = {} if args.adaptive is None else {"adaptive": args.adaptive, "js": args.js or "published"}
        return {"inverter": inverter, "inversion_batch_size": args.inversion_batch_size, **competing}
    given = [name for name in ("objective", "adaptive", "inversion_batch_size") if getattr(args, name) is not None]
    for name in (*given, *arguments.given_inversion(args)):
        option = "--inversion-lr" if name == "lr" else arguments.option_of(name)
        raise ValueError(f"{option} is a setting of an inversion, but the images of --dataset are inverted already")
    return {"dataset": InvertedDataset.load(args.dataset)}


def save_student(model: nn.Module, path: Path) -> None:
    """Write the weights of the student to a safetensors file."""
    with atomic_write(path) as partial:
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, partial)


def table(history: Sequence[Round]) -> str:
    """Return the results of each round as text."""
    rows = [("round", "samples", "iterations", "loss", "accuracy", "inversion s", "transfer s")]
    for r in history:
        seconds = (f"{r.inversion_seconds:.1f}", f"{r.transfer_seconds:.1f}")
        rows.append((str(r.number), str(r.samples), str(r.iterations), f"{r.loss:.3g}", f"{r.accuracy:.2%}", *seconds))
    return as_text(rows)
