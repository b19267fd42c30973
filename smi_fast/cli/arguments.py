"""Arguments that several commands share, and what is checked of them before anything is done."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from smi_fast.data.files import first_line
from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.presets import DEMO, PAPER, InversionSettings, settings_of
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.models.loading import MODEL_INSIDE, load_model
from smi_fast.seeds import check_seed

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
MAX_COUNT = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors as ValueError, and whose help leaves out defaults of None and False."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = not action.required and action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def count(text: str) -> int:
    """The type of an option that counts something."""
    value = _number(int, text, "an integer")
    if not 1 <= value <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be {'at least 1' if value < 1 else f'at most {MAX_COUNT}'}, got {text}")
    return value


def finite(text: str) -> float:
    """The type of an option that is a real number."""
    value = _number(float, text, "a number")
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def seed(text: str) -> int:
    """The type of a seed: 64 bits."""
    value = _number(int, text, "an integer")
    try:
        return check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("seed ")) from None  # argparse names the option


def device(text: str) -> torch.device:
    """The type of an option that names a device which this machine has."""
    try:
        found = torch.device(text)
        if found.type not in ("cpu", "cuda"):
            raise ValueError("only cpu and cuda are supported")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {first_line(error)}") from error
    return found


def _number(kind: type, text: str, what: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None


def add_model(
    parser: argparse.ArgumentParser,
    what: str = "a ViT or DeiT of timm's, or the model inside",
    *,
    role: str = "model",
    default: str = MODEL_INSIDE,
) -> argparse._ArgumentGroup:
    """Add --model, --pretrained and --checkpoint; for another role --ROLE, --ROLE-pretrained and --ROLE-checkpoint."""
    group, prefix = parser.add_argument_group(role), "" if role == "model" else f"{role}-"
    group.add_argument(f"--{role}", default=default, metavar="NAME", help=what)
    group.add_argument(f"--{prefix}pretrained", action="store_true", help="download timm's weights for it")
    group.add_argument(f"--{prefix}checkpoint", type=Path, metavar="FILE", help="weights: safetensors, or a torch file")
    return group


def model_of(args: argparse.Namespace, role: str = "model") -> nn.Module:
    """The model that the options of `add_model` name, on the device of the command."""
    prefix = "" if role == "model" else f"{role}_"
    model = load_model(
        getattr(args, role),
        pretrained=getattr(args, f"{prefix}pretrained"),
        checkpoint=getattr(args, f"{prefix}checkpoint"),
        options=tuple(f"--{prefix}{option}".replace("_", "-") for option in ("pretrained", "checkpoint")),
    )
    return model.to(args.device)


def add_inversion(group: argparse._ArgumentGroup, lr: str) -> None:
    """Add the settings of an inversion; `lr` is the option of its learning rate."""
    for option, name, kind, what in (
        ("--iterations", "iterations", count, "iterations of an inversion"),
        (lr, "inversion_lr", finite, "learning rate of the pixels"),
        ("--tv-l2", "tv_l2", finite, "weight of total variation"),
    ):
        field = name.removeprefix("inversion_")
        defaults = f"default: {getattr(PAPER, field):g}, for {MODEL_INSIDE} {getattr(DEMO, field):g}"
        group.add_argument(option, dest=name, type=kind, metavar="N", help=f"{what} ({defaults})")
    group.add_argument("--l2", type=finite, default=0.0, metavar="N", help="weight of the l2 prior")
    group.add_argument(
        "--stopping",
        default="paper",
        metavar="SCHEDULE",
        help="iteration:fraction,... such as 50:0.3,100:0.3; paper (scaled to the number of iterations); dense",
    )


def inversion_of(args: argparse.Namespace) -> tuple[InversionSettings, dict]:
    """The settings that the options of `add_inversion` give, and the arguments of `Inverter` that follow from them."""
    given = {"iterations": args.iterations, "lr": args.inversion_lr, "tv_l2": args.tv_l2}
    settings = replace(settings_of(args.model), **{name: value for name, value in given.items() if value is not None})
    return settings, {
        "stopping": StoppingSchedule.parse(args.stopping, settings.iterations),
        "objective": deep_inversion(tv_l2=settings.tv_l2, l2=args.l2),
        "iterations": settings.iterations,
        "lr": settings.lr,
    }


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DATA", required=required,
        help="test images: a folder with one folder a class, or CIFAR10, CIFAR100 or ImageNet with --root",
    )  # fmt: skip
    data.add_argument("--root", type=Path, metavar="FOLDER", help="where torchvision keeps the data set of that name")
    data.add_argument("--limit", type=count, metavar="N", help="of the test images, N at equal distances; all of them")


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    machine = parser.add_argument_group("machine")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1, ...")
    return machine


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path(default), metavar="FOLDER", help="where the results go")
    output.add_argument("--overwrite", action="store_true", help="replace results in a folder that is not empty")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def check_out(out: Path, overwrite: bool, files: tuple[str, ...]) -> None:
    """Check that the files can be written to the folder `out` at the end, before the work that leads to them.

    Raises:
        ValueError: `out` is no folder, cannot be made or written to, or is not empty and `overwrite` is false.
    """
    check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"--out: the folder {out} is not empty; --overwrite replaces the results in it")
    for name in files:
        if (out / name).is_dir():
            raise ValueError(f"--out: {out / name} is a folder, where a file of that name is to be written")


def check_writable(out: Path) -> None:
    """Make the folder `out`, write a file to it, and leave everything as it was.

    Raises:
        ValueError: this is not possible; the message says why.
    """
    if "\0" in str(out):
        raise ValueError(f"--out: {str(out)!r} holds a NUL byte")
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise ValueError(f"--out: {out} is {'a link to nothing' if out.is_symlink() else 'a file, not a folder'}")
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out) as probe:
                probe.write(b"results")
        finally:
            for folder in missing:
                with suppress(OSError):  # another run may have made it, or use it
                    folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be written to: {error.strerror}") from error


def check_memory(option: str, images: int, values: int) -> None:
    """Check that so many images, of so many float32 values each, fit into the machine's memory at all.

    Raises:
        ValueError: they do not.
    """
    needed, there = 4 * images * values, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{option}: {images} images take {needed / 2**30:.0f} GiB, the machine's memory has {there / 2**30:.0f}"
        )
