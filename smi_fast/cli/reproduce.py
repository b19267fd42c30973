"""smi-fast reproduce: the paper's comparisons on your model and data, as one page."""

from __future__ import annotations

import argparse

import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import smi_fast.cli.arguments as arguments
from smi_fast.cli.output import add_run, check_out
from smi_fast.models import STUDENT_INSIDE
from smi_fast.models.loading import resized
from smi_fast.studies.reproduce import FILES, PRESETS, SECTIONS, reproduce

DESCRIPTION = (
    "Repeat the comparisons of the paper on Sparse Model Inversion with a model and data of yours, and write them as "
    "one page: how fast sparse images (of which only the important patches are made) are beside dense ones, how well "
    "they quantise a model and teach a student, and which patches to stop."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    what = "repeat the paper's comparisons and write them as one page"
    parser = commands.add_parser("reproduce", help=what, description=DESCRIPTION)
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    what = "name of the student: a timm ViT or DeiT, the ViT trained without labels that comes with smi-fast, or none"
    arguments.add_model(parser, what, role="student", default=STUDENT_INSIDE)
    arguments.add_data(parser, "labelled images with a training and a test split", limit=False)
    what = "size of the comparisons: paper, as published; vit-s, for a ViT-S of 224 pixels, hours; or demo, minutes"
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help=what)
    what = f"sections of the page, from {','.join(SECTIONS)} (default: all)"
    parser.add_argument("--sections", metavar="LIST", help=what)
    arguments.add_device(parser)
    add_run(parser, "smi-fast-reproduction")


def run(args: argparse.Namespace) -> int:
    arguments.check_alone("reproduce")
    check_out(args, FILES)
    model = arguments.model_of(args)
    student, note = student_of(args, model)
    sections = None if args.sections is None else [part.strip() for part in args.sections.split(",")]
    page = reproduce(
        model, args.data, args.out, root=args.root, student=student, student_note=note, settings=args.preset,
        sections=sections, progress=not args.quiet, checkpoint_every=args.checkpoint_every, overwrite=args.overwrite,
        command=args.command,
    )  # fmt: skip
    print(f"wrote {page}")
    return 0


def student_of(args: argparse.Namespace, teacher: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the student, made for the teacher's images and with a new head unless it came with classes of its own that
    are as many, and a sentence on it for the page."""
    if args.student == "none":
        return None, ""
    student = arguments.model_of(args, "student")
    if args.student == STUDENT_INSIDE:
        return student, "It was trained on the same training images without their labels."
    size = resolve_data_config(model=teacher)["input_size"][1:]
    if isinstance(student, VisionTransformer) and student.patch_embed.img_size != size:
        student = resized(student, size)
    if student.num_classes != teacher.num_classes:
        with torch.random.fork_rng([]):  # of the CPU, so that the next call has the same head
            torch.default_generator.manual_seed(0)
            student.reset_classifier(teacher.num_classes)
        return student.to(args.device).eval(), "Its head is new."
    return student, "It came with a head for as many classes, which goes on learning."
