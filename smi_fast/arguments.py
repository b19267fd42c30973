"""Arguments that several commands share, and what is checked of them before anything is done."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from smi_fast.loading import MODEL_INSIDE

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def add_model(parser: argparse.ArgumentParser, what: str = "a ViT or DeiT of timm's, or the model inside") -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=MODEL_INSIDE, metavar="NAME", help=what)
    model.add_argument("--pretrained", action="store_true", help="download timm's weights for it")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights: safetensors, or a torch file")


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DATA", required=required,
        help="test images: a folder with one folder a class, or CIFAR10, CIFAR100 or ImageNet with --root",
    )  # fmt: skip
    data.add_argument("--root", type=Path, metavar="FOLDER", help="where torchvision keeps the data set of that name")
    data.add_argument("--limit", type=int, metavar="N", help="of the test images, N at equal distances; all of them")


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    machine = parser.add_argument_group("machine")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ...")
    return machine


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path(default), metavar="FOLDER", help="where the results go")
    output.add_argument("--overwrite", action="store_true", help="replace results in a folder that is not empty")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"--out: the folder {out} is not empty; --overwrite replaces the results in it")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out: {existing} cannot be written to")


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
