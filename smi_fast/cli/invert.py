"""smi-fast invert: images of a classifier's classes, written batch by batch, with pictures and a report."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

import torch
from torch import nn

import smi_fast.cli.arguments as arguments
from smi_fast import kernels
from smi_fast.backbones.base import class_names
from smi_fast.cli.output import add_run, check_out, say
from smi_fast.cli.report import FILES, write_report
from smi_fast.models.loading import HUB, INSIDE
from smi_fast.runs.inversion import invert
from smi_fast.runs.log import KINDS
from smi_fast.runs.machine import processor, versions

DESCRIPTION = (
    "Make images of a classifier's classes out of its weights alone: pixels that begin as noise are changed until the "
    "model sees the class in them. A Vision Transformer (ViT) cuts an image into patches, small squares. Those that it "
    "pays the least attention to are stopped on the way: they are not computed any more, which saves most of the time, "
    "and the images that come out are sparse: only their important patches are left. Writes the images and a page "
    "that shows them, index.html."
)
DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "invert", help="turn a trained classifier into images of its classes", description=DESCRIPTION
    )
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    images = parser.add_argument_group("images")
    what = "classes by number or by the model's names for them, such as 0,3,7-9 or church,tench; or all"
    images.add_argument("--classes", default="first ten", metavar="LIST", help=what)
    arguments.add_numbers(
        images,
        images_per_class=(arguments.count, 2, "number of images of each class"),
        batch_size=(arguments.count, 128, "number of images inverted at once"),
    )
    loop = parser.add_argument_group("inversion")
    arguments.add_inversion(loop)
    arguments.add_numbers(
        loop,
        seed=(arguments.seed, 0, "seed for the initial noise, and for the shifts and mirrors of --jitter and --flip"),
    )
    what = "another model, which classifies the images now and then; its accuracy is reported"
    arguments.add_model(parser, what, role="verifier", default=None)
    machine = arguments.add_device(parser)
    what = "dtype of the matrix products (default: bfloat16 on a GPU that has it in hardware, otherwise float32)"
    machine.add_argument("--dtype", choices=DTYPES, help=what)
    what = "what the arithmetic runs in: Triton's kernels or plain torch; auto takes Triton on CUDA"
    machine.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help=what)
    output = add_run(parser, "smi-fast-output")
    what = "write loss, confidence, patches and images per second to the folder log"
    output.add_argument("--log", choices=KINDS, help=what)
    arguments.add_numbers(output, log_every=(arguments.count, 50, "iterations from one line of the log to the next"))


def run(args: argparse.Namespace) -> int:
    check_out(args, FILES)
    model = arguments.model_of(args)
    settings = arguments.inversion_settings(args, model)
    names = class_names(model)
    classes = parse_classes(args.classes, names)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    verifier = verifier_of(args)
    inverter = settings.inverter(model, dtype=dtype, backend=args.backend, verifier=verifier, progress=not args.quiet)
    count, shape = len(classes) * args.images_per_class, (len(inverter.mean), *inverter.image_size)
    arguments.check_memory("--images-per-class", count, (2,))  # the targets; images are written batch by batch
    arguments.check_memory("--batch-size", min(args.batch_size, count), shape)
    targets = torch.tensor(classes).repeat_interleave(args.images_per_class)
    weights, downloaded = "inside" if args.model in INSIDE else "folder", args.pretrained or args.model.startswith(HUB)
    about = {
        "model": args.model,
        "weights": str(args.checkpoint) if args.checkpoint else "pretrained" if downloaded else weights,
        "stopping": str(inverter.stopping),
        "settings": settings.record(),
        "dtype": str(inverter.backbone.compute_dtype).removeprefix("torch."),
        "backend": kernels.resolve_backend(args.backend, args.device),
        "device": processor(args.device),
        "versions": versions(),
    }
    say(f"inverting {len(targets)} images of {len(classes)} classes with {args.model} on {about['device']}")
    invert(
        inverter, targets, args.out, batch_size=args.batch_size, seed=args.seed, overwrite=args.overwrite,
        checkpoint_every=args.checkpoint_every, about=about, names=names, command=args.command, files=FILES,
        log=args.log, log_every=args.log_every,
        finish=lambda run: say(write_report(run.folder)),
    )  # fmt: skip
    return 0


def verifier_of(args: argparse.Namespace) -> nn.Module | None:
    """Load the verifier, if the command has one."""
    if args.verifier is not None:
        return arguments.model_of(args, "verifier")
    for name in ("pretrained", "checkpoint"):
        if getattr(args, f"verifier_{name}"):
            raise ValueError(f"--verifier-{name} is about the weights of the model that --verifier names")
    return None


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
    by_name = {_plain(name): number for number, name in reversed(list(enumerate(names)))}
    for part in (part.strip() for part in text.split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if _plain(part) in by_name:
            classes.append(by_name[_plain(part)])
        elif not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            near = difflib.get_close_matches(_plain(part), by_name, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--classes: {part!r} is neither a class number, a range such as 0-9, nor a class name{hint}"
            )
        elif int(last) >= len(names):
            raise ValueError(f"--classes: {last} is no class of the model, which has {len(names)}")
        else:
            classes += range(int(first), int(last) + 1)
    return list(dict.fromkeys(classes))


def _plain(name: str) -> str:
    """Return the name of a class without what is easily written in another way."""
    return name.strip().lower().replace("_", " ")
