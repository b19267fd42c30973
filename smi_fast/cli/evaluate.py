"""smi-fast evaluate: the accuracy of a model on test images."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import smi_fast.cli.arguments as arguments
from smi_fast.cli.output import add_quiet
from smi_fast.models import MODEL_INSIDE
from smi_fast.quantization import QuantizedViT

DESCRIPTION = (
    "Measure the accuracy of a model, quantised or not: the share of labelled test images whose largest logit is that "
    "of their class. Images are scaled, cropped and normalised as timm does it to evaluate the model."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    what = "measure the accuracy of a model, quantised or not"
    parser = commands.add_parser("evaluate", help=what, description=DESCRIPTION)
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    what = "evaluate the model that smi-fast quantize wrote to this file"
    parser.add_argument("--quantized", type=Path, metavar="FILE", help=what)
    arguments.add_data(parser)
    arguments.add_numbers(parser, batch_size=(arguments.count, 128, "number of images at a time"))
    add_quiet(parser)
    arguments.add_device(parser)


def run(args: argparse.Namespace) -> int:
    model = evaluated_model(args)
    test = arguments.load_test_images(args, model)
    result = arguments.timed_accuracy(model, test, not args.quiet)
    print(f"{result['accuracy']:.2%} of {len(test.dataset)} images, {result['seconds']:.1f} s")
    return 0


def evaluated_model(args: argparse.Namespace) -> nn.Module:
    """Return the quantised model if its file is given, otherwise the model that the other options name."""
    if args.quantized is None:
        return arguments.model_of(args)
    if args.pretrained or args.checkpoint is not None or args.image_size is not None or args.model != MODEL_INSIDE:
        raise ValueError("--quantized holds the whole model: leave out the options of another model")
    return QuantizedViT.load(args.quantized).to(args.device)
