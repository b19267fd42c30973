"""The options that several commands share, and the models, settings and data that the options stand for."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from smi_fast.data.files import first_line
from smi_fast.data.labelled import DOWNLOADED, accuracy, download_data, known_name, load_data
from smi_fast.inversion.presets import DEMO, OBJECTIVES, PAPER, InversionSettings, settings_of
from smi_fast.inversion.priors import NORMS
from smi_fast.inversion.schedule import WarmupCosine
from smi_fast.inversion.until import Until
from smi_fast.models import CNN_INSIDE, MODEL_INSIDE
from smi_fast.models.loading import load_model
from smi_fast.seeds import check_seed

MAX_COUNT = 2**31 - 1
OTHERS_WAIT = 30  # seconds
DATA = Path("data")  # where data sets are downloaded to


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors as ValueError, takes no abbreviations, and whose help leaves out the
    defaults None and False."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = not action.required and action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def count(text: str) -> int:
    """Read an option that counts something."""
    value = _number(int, text, "an integer")
    if not 1 <= value <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be {'at least 1' if value < 1 else f'at most {MAX_COUNT}'}, got {text}")
    return value


def finite(text: str) -> float:
    """Read an option that is a real number."""
    value = _number(float, text, "a number")
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def jitter(text: str) -> int | float:
    """Read the largest shift of a view: an integer number of pixels, or a share of the image's side."""
    return int(text) if text.isdecimal() else finite(text)


def size(text: str) -> tuple[int, int]:
    """Read the size of images, such as 224 or 192x256 (height and width), in pixels."""
    sides = [count(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be such as 224 or 192x256, got {text!r}")
    return sides[0], sides[-1]


def seed(text: str) -> int:
    """Read a seed of up to 64 bits."""
    value = _number(int, text, "an integer")
    try:
        return check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("seed ")) from None  # argparse names the option


def device(text: str) -> torch.device:
    """Read the name of a device that this machine has."""
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


def add_numbers(group: argparse._ActionsContainer, **options: tuple[Callable, float | None, str]) -> None:
    """Add options that are numbers. `options` maps the name of each to its type, its default and its help text."""
    for name, (kind, default, what) in options.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=what)


MODELS = (
    f"name of a model: one that comes with smi-fast ({MODEL_INSIDE}, {CNN_INSIDE}), the name of a timm model, "
    "hf-hub:ORG/NAME for one on Hugging Face's hub, torchvision/NAME, or a folder that transformers has written"
)


def add_model(
    parser: argparse.ArgumentParser,
    what: str = MODELS,
    *,
    role: str = "model",
    default: str | None = MODEL_INSIDE,
) -> argparse._ArgumentGroup:
    """Add --model, --pretrained, --checkpoint and --image-size, or --ROLE, --ROLE-pretrained and --ROLE-checkpoint."""
    group, prefix = parser.add_argument_group(role), "" if role == "model" else f"{role}-"
    checkpoint = (
        "read the weights from a safetensors or torch file; the header of a safetensors file may also name the "
        "classes, the normalisation and the image size"
    )
    group.add_argument(f"--{role}", default=default, metavar="NAME", help=what)
    what = (
        "download the pretrained weights of a timm or torchvision model, or take them from the cache (those of an "
        "hf-hub: model are, without this option)"
    )
    group.add_argument(f"--{prefix}pretrained", action="store_true", help=what)
    group.add_argument(f"--{prefix}checkpoint", type=Path, metavar="FILE", help=checkpoint)
    if role == "model":
        what = (
            "size of the images in pixels, such as 224 or 192x256 (height and width), for all models of the command; "
            "the positions of a ViT are interpolated (default: the model's own)"
        )
        group.add_argument("--image-size", type=size, metavar="SIZE", help=what)
    return group


def model_of(args: argparse.Namespace, role: str = "model") -> nn.Module:
    """Load the model that the options of `add_model` name, onto the device of the command."""
    prefix = "" if role == "model" else f"{role}_"
    model = load_model(
        getattr(args, role),
        pretrained=getattr(args, f"{prefix}pretrained"),
        checkpoint=getattr(args, f"{prefix}checkpoint"),
        image_size=args.image_size,
        options=tuple(f"--{prefix}{option}".replace("_", "-") for option in ("pretrained", "checkpoint")),
    )
    return model.to(args.device)


INVERSION = {  # setting -> the type of its option, and what the help says about it
    "iterations": (count, "number of iterations: steps in which the pixels of an image are changed"),
    "lr": (finite, "learning rate of the pixels: the larger, the more a step changes them"),
    "tv_l2": (finite, "weight of total variation, a penalty on differences between neighbours, which smooths images"),
    "tv_l1": (finite, "weight of the total variation of absolute differences, for CNNs"),
    "l2": (finite, "weight of a penalty on the pixels' squares, which keeps them near the mean"),
    "batch_norm": (finite, "weight of the distance to the statistics in the BatchNorm layers of a CNN"),
    "jitter": (
        jitter,
        "largest random shift of the image that the model sees in an iteration: an integer is a number of pixels, a "
        "decimal fraction a share of the side",
    ),
    "flip": (finite, "probability that the image that the model sees in an iteration is mirrored left-right"),
    "until": (finite, "end as soon as the model gives the targets this probability, in several checks in a row"),
    "checks": (count, f"number of these checks in a row (default: {Until.checks})"),
    "every": (count, f"number of iterations between two checks (default: {Until.every})"),
}
VIEWS = ("jitter", "flip")  # the settings that draw the views, where the method does not draw them itself
CHOICES = ("lr_schedule", "norm", "stopping", "published")  # further settings
OPTIONS = {"every": "check-every"}  # the names of options that are not those of their settings
LR_SCHEDULES = {"constant": None, "cosine": WarmupCosine()}


def option_of(setting: str) -> str:
    """Return the name of the option for a setting of an inversion."""
    return f"--{OPTIONS.get(setting, setting).replace('_', '-')}"


def add_inversion(group: argparse._ArgumentGroup, lr: str = "--lr") -> None:
    """Add the settings of an inversion. `lr` is the name of the option for its learning rate."""
    what = (
        "the method, that is, what is minimised, which also decides other defaults: deep_inversion makes images of "
        "classes, deep_inversion_cnn does so with a CNN's statistics, and psaq makes images to calibrate a quantised "
        "ViT on, whose patches differ much (default: deep_inversion, or deep_inversion_cnn for CNNs)"
    )
    group.add_argument("--objective", choices=OBJECTIVES, help=what)
    for field, (kind, what) in INVERSION.items():
        option = lr if field == "lr" else option_of(field)
        paper, demo = (getattr(s, field, None) or getattr(s.objective, field, None) for s in (PAPER, DEMO))
        if paper is not None:
            what += f" (default: {paper:g} for a ViT" + (")" if demo == paper else f", {demo:g} for {MODEL_INSIDE})")
        group.add_argument(option, dest=f"inversion_{field}", type=kind, metavar="N", help=what)
    what = "how the learning rate changes: not at all, or by a warm-up and a cosine"
    group.add_argument("--lr-schedule", dest="inversion_lr_schedule", choices=LR_SCHEDULES, help=what)
    what = (
        'penalties on pixels are those of a whole "batch" (default), or of each "image", so that none depends on others'
    )
    group.add_argument("--norm", dest="inversion_norm", choices=NORMS, help=what)
    what = (
        "when patches stop, that is, are left out of all further computing. A ViT sees an image as a grid of patches, "
        "and the importance of a patch is how much attention the model pays it. ITERATION:FRACTION stops this fraction "
        "of the patches, the least important ones; ITERATION:mass=SHARE keeps the fewest patches with this share of "
        "all importance, such as 50:0.3,100:mass=0.9; paper is the published schedule, scaled to the number of "
        "iterations; rebirth=V makes V sparse images of each target, which have no patch in common; dense stops none "
        "(default: paper for deep_inversion, else dense)"
    )
    group.add_argument("--stopping", dest="inversion_stopping", metavar="SCHEDULE", help=what)
    what = "treat stopped patches as the published code of Sparse Model Inversion does, against the paper"
    group.add_argument("--published", dest="inversion_published", action="store_true", default=None, help=what)


def inversion_settings(args: argparse.Namespace, model: nn.Module) -> InversionSettings:
    """Return the settings for the command's model, replaced by those options of `add_inversion` that were given."""
    given = given_inversion(args)
    checks = {name: given.pop(name) for name in ("checks", "every") if name in given}
    if "until" in given:
        given["until"] = Until(given["until"], **checks)
    elif checks:
        raise ValueError(f"{option_of(next(iter(checks)))} is a setting of the end that --until asks for")
    if "lr_schedule" in given:
        given["lr_schedule"] = LR_SCHEDULES[given["lr_schedule"]]
    settings = settings_of(args.model, model, args.objective).replaced(given)
    fixed = [option_of(name) for name in VIEWS if name in given and settings.views is not None]
    if fixed:
        raise ValueError(f"{fixed[0]}: the method {args.objective} draws its views itself")
    return replace(settings, stopping=settings.schedule)  # a schedule that cannot be read is refused here


def given_inversion(args: argparse.Namespace) -> dict:
    """Return the options of `add_inversion` that were given, by the names of the settings."""
    values = {name: getattr(args, f"inversion_{name}") for name in (*INVERSION, *CHOICES)}
    return {name: value for name, value in values.items() if value is not None}


def add_data(
    parser: argparse.ArgumentParser, what: str = "test images", *, required: bool = True, limit: bool = True
) -> None:
    """Add --data, --root and --download, which name labelled images, and --limit, which selects some test images."""
    data = parser.add_argument_group("data")
    what += (
        ": a folder that holds a folder for each class (or train and test with these), or the name of a data set: "
        "cifar10, cifar100 or imagenet"
    )
    data.add_argument("--data", metavar="DATA", required=required, help=what)
    what = f"folder where torchvision keeps the data set of that name (with --download, the default is {DATA})"
    data.add_argument("--root", type=Path, metavar="FOLDER", help=what)
    what = "download the data set cifar10 or cifar100 first, unless it is there"
    data.add_argument("--download", action="store_true", help=what)
    if limit:
        add_numbers(data, limit=(count, None, "use N evenly spaced test images instead of all"))


def prepare_data(args: argparse.Namespace) -> None:
    """Download the data set, if the command is to, and check that the folder of one that is given by name is known.

    Raises:
        ValueError: the folder is not known, there is no data set to download, the download fails, or several processes
            would share it.
    """
    if not getattr(args, "download", False):
        _check_root(args)
        return
    if args.data is None:
        raise ValueError("--download: --data says which data set to download")
    check_alone("--download")
    args.root = args.root or DATA
    download_data(args.data, args.root)


def _check_root(args: argparse.Namespace) -> None:
    data = getattr(args, "data", None)
    if data is None or args.root is not None or Path(data).is_dir():
        return
    name = known_name(data)
    if name is not None:
        download = ", or --download, which fetches it" if name in DOWNLOADED else ""
        raise ValueError(f"--data {data} needs --root FOLDER, the folder in which torchvision keeps {name}{download}")


def load_test_images(args: argparse.Namespace, model: nn.Module) -> DataLoader:
    """Load the test images that the options of `add_data` name, preprocessed for the model."""
    data = load_data(args.data, args.root, split="test", model=model)
    if args.limit is not None and args.limit < len(data):
        data = Subset(data, torch.linspace(0, len(data) - 1, args.limit).long().tolist())
    return DataLoader(data, args.batch_size)


def timed_accuracy(model: nn.Module, test: DataLoader, progress: bool) -> dict[str, float]:
    """Return the accuracy of the model in [0, 1], and the seconds that the evaluation took."""
    started = time.perf_counter()
    return {"accuracy": accuracy(model, test, progress=progress), "seconds": time.perf_counter() - started}


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --device."""
    machine = parser.add_argument_group("machine")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    machine.add_argument("--device", type=device, default=default, help="where to compute: cpu, cuda, cuda:1, ...")
    return machine


def check_alone(command: str) -> None:
    """Check that torchrun or a scheduler has started only one process. The others leave the first one time to say so,
    because torchrun ends all processes as soon as one has ended.

    Raises:
        ValueError: there are others, and this is the first one.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None or size == "1":
        return
    if rank == "0":
        raise ValueError(f"{command} is for one process, but {size} were started")
    time.sleep(OTHERS_WAIT)
    raise SystemExit(2)


def check_memory(option: str, images: int, shape: Sequence[int]) -> None:
    """Check that a number of float32 images of this shape, or what else is there for each, fits into the memory.

    Raises:
        ValueError: the images do not fit. The message names the option that asks for them.
    """
    needed, there = 4 * images * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{option}: {images} images take {needed / 2**30:.0f} GiB, the machine's memory has {there / 2**30:.0f}"
        )
