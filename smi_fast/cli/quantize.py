"""smi-fast quantize: a model with fewer bits, calibrated on inverted images, noise or real images."""

from __future__ import annotations

import argparse
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

import smi_fast.cli.arguments as arguments
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.cli.arguments import count, seed
from smi_fast.cli.output import add_run, check_out
from smi_fast.data.files import atomic_write, checksum, write_json
from smi_fast.data.labelled import load_data
from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.data.states import model_checksum
from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens
from smi_fast.quantization import QuantizedViT, check_bits, check_supported, quantize
from smi_fast.runs.evaluation import contents, evaluate
from smi_fast.runs.machine import device_name, made_with, versions
from smi_fast.runs.processes import Processes
from smi_fast.runs.run import Run
from smi_fast.seeds import seeded_generator
from smi_fast.studies.experiment import name_of
from smi_fast.studies.plots import save_ranges
from smi_fast.studies.report import as_text

DESCRIPTION = (
    "Quantise a model: round its weights, and its activations (the numbers between its layers), to fewer bits. W4/A8 "
    "stands for weights of 4 bits and activations of 8. The ranges of the activations are measured on calibration "
    "images. Inverted images serve where there are no real ones."
)
MODEL, PROGRAM = "quantized.safetensors", "quantized.pt2"
FILES = (MODEL, PROGRAM, "ranges.png", "report.json")
CALIBRATION = "calibration"  # the checkpoint of what the calibration has observed


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize", help="quantise a model, calibrated on inverted images", description=DESCRIPTION
    )
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    calibration = parser.add_argument_group("calibration")
    what = "calibration images: the folder of smi-fast invert, noise, or real for images of --data's training split"
    calibration.add_argument("--calibration", default="noise", metavar="SOURCE", help=what)
    arguments.add_numbers(calibration, images=(count, 32, "number of calibration images"))
    arguments.add_numbers(calibration, seed=(seed, 0, "seed for the noise, or for the choice of real images"))
    bits = parser.add_argument_group("bits")
    arguments.add_numbers(bits, weight_bits=(int, 8, "bits of a weight, from 2 to 8: the number after the W of W4/A8"))
    arguments.add_numbers(bits, activation_bits=(int, 8, "bits of an activation, from 2 to 8: the number after the A"))
    bits.add_argument("--export", action="store_true", help="also write quantized.pt2, an int8 program to deploy")
    arguments.add_data(parser, required=False)
    arguments.add_numbers(parser, batch_size=(count, 128, "number of test images at a time"))
    arguments.add_device(parser)
    add_run(parser, "smi-fast-quantized")


def run(args: argparse.Namespace) -> int:
    arguments.check_alone("quantize")
    check_out(args, FILES)
    check_bits(weight_bits=args.weight_bits, activation_bits=args.activation_bits)
    model = arguments.model_of(args)
    check_supported(model)
    test = None if args.data is None else arguments.load_test_images(args, model)
    images, sparsity = calibration_images(args, accelerate(model))
    job = Run(
        args.out, "quantization", settings(args, model, images, test), made_with(args.device, args.command),
        files=FILES, overwrite=args.overwrite, checkpoint_every=args.checkpoint_every, processes=Processes(),
    )  # fmt: skip
    with job:
        seconds = written(job, MODEL, lambda path: calibrated(args, model, images, job).save(path, overwrite=True))
        job.discard(CALIBRATION)
        quantized = QuantizedViT.load(job.folder / MODEL).to(args.device)
        record = {
            "model": args.model, "calibration": args.calibration, "images": args.images, "sparsity": sparsity,
            "weight_bits": args.weight_bits, "activation_bits": args.activation_bits, "seconds": seconds,
            "device": device_name(args.device), "versions": versions(), "ranges": quantized.ranges,
        }  # fmt: skip
        if test is not None:
            record["test"] = {
                "float": evaluate(job, "float", lambda: model, test, not args.quiet),
                "quantized": evaluate(job, "quantized", lambda: quantized, test, not args.quiet),
                "images": len(test.dataset),
            }
        if args.export:
            written(job, PROGRAM, lambda path: save_program(quantized.cpu().export(), path))
        sizes = {name: (job.folder / name).stat().st_size for name in (MODEL, PROGRAM) if (job.folder / name).exists()}
        record["bytes"] = sizes | {"float32": sum(4 * parameter.numel() for parameter in model.parameters())}
        save_ranges({args.calibration: quantized.ranges}, job.folder / "ranges.png")
        write_json(job.folder / "report.json", record)
        files = [name for name in FILES if (job.folder / name).exists()]
    print(table(record), f"wrote {', '.join(files)} to {args.out}", sep="\n")
    return 0


def settings(
    args: argparse.Namespace, model: nn.Module, images: PackedTokens | Tensor, test: DataLoader | None
) -> dict:
    """Return what decides the quantised model and its accuracy, for the run's manifest."""
    tensors = (images,) if isinstance(images, Tensor) else (images.values, images.positions, images.cu_seqlens)
    value = 0
    for tensor in tensors:
        value = checksum(tensor.cpu(), value)
    kind = args.calibration if args.calibration in ("noise", "real") else "inverted"
    return {
        "model": name_of(model),
        "weights": model_checksum(model),
        "preprocessing": resolve_data_config(model=model),
        **{name: getattr(args, name) for name in ("weight_bits", "activation_bits", "seed")},
        "calibration": kind,
        "calibration_images": args.images,
        "calibration_checksum": value,
        **({} if test is None else contents(test.dataset, "test")),
    }


def written(job: Run, name: str, write: Callable[[Path], object]) -> float:
    """Let `write` write a file of the run, unless it is there as it was written. Return the seconds that it took."""
    file, record = job.folder / name, job.checkpoint(name)
    if record is not None:
        if file.is_file() and zlib.crc32(file.read_bytes()) == record["checksum"]:
            return record["seconds"]
        warnings.warn(f"{file} is damaged or was removed; it is made again", stacklevel=2)
    started = time.perf_counter()
    write(file)
    seconds = time.perf_counter() - started
    job.save(name, {"checksum": zlib.crc32(file.read_bytes()), "seconds": seconds})
    job.signals.check()
    return seconds


def calibrated(args: argparse.Namespace, model: nn.Module, images: PackedTokens | Tensor, job: Run) -> QuantizedViT:
    """Quantise the model, from the last checkpoint of the calibration."""

    def pause(state: dict) -> None:
        job.pause(CALIBRATION, lambda: state)

    state = job.checkpoint(CALIBRATION)
    return quantize(model, images, args.weight_bits, args.activation_bits, callback=pause, state=state)


def calibration_images(args: argparse.Namespace, fast: AcceleratedViT) -> tuple[PackedTokens | Tensor, float]:
    """Return normalised calibration images, whole (N, C, H, W) or sparse, and the share of patches that they lack."""
    if args.calibration == "noise":
        shape = (fast.num_channels, *fast.image_size)
        arguments.check_memory("--images", args.images, shape)
        return torch.randn(args.images, *shape, generator=seeded_generator(args.seed)).to(fast.device), 0.0
    if args.calibration == "real":
        return real_images(args, fast.model).to(fast.device), 0.0
    if not Path(args.calibration).exists():
        raise ValueError(f"--calibration: {args.calibration} is neither noise, real, nor a file or folder")
    tokens = inverted_images(args, fast)
    return tokens, 1 - len(tokens.positions) / (args.images * fast.grid(fast.image_size).num_patches)


def real_images(args: argparse.Namespace, model: nn.Module) -> Tensor:
    """Load random images (N, C, H, W) of the training split, preprocessed for the model."""
    if args.data is None:
        raise ValueError("--calibration real needs --data, because it takes the images from its training split")
    data = load_data(args.data, args.root, split="train", model=model)
    if len(data) < args.images:
        raise ValueError(f"--images: the training split of {args.data} holds {len(data)} images, not {args.images}")
    chosen = torch.randperm(len(data), generator=seeded_generator(args.seed))[: args.images]
    return torch.stack([data[number][0] for number in chosen.tolist()])


def inverted_images(args: argparse.Namespace, fast: AcceleratedViT) -> PackedTokens:
    """Load images of the stored dataset, evenly spaced in the order of their classes, normalised for the model."""
    dataset = InvertedDataset.load(args.calibration)
    if len(dataset) < args.images:
        raise ValueError(f"--images: {args.calibration} holds {len(dataset)} images, not {args.images}")
    dataset.check_normalization(fast.mean, fast.std)
    grid, found = fast.grid(fast.image_size), PatchGrid.of(dataset.image_size[1:], dataset.patch_size)
    if found != grid:
        ours, theirs = ("{}x{} pixels in patches of {}x{}".format(*g.image_size, *g.patch_size) for g in (grid, found))
        raise ValueError(f"--calibration: {args.calibration} holds images of {theirs}, the model takes {ours}")
    by_class = torch.as_tensor(dataset.targets).argsort(stable=True)
    chosen = by_class[torch.linspace(0, len(dataset) - 1, args.images).long()].tolist()
    tokens, _ = InvertedDataset.collate([dataset[number] for number in chosen])
    return normalize_patches(tokens, fast.mean, fast.std)


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        torch.export.save(program, file)


def table(record: dict) -> str:
    """Return accuracy, seconds and size before and after the quantisation as text."""
    rows = [("", "accuracy", "seconds", "MB")]
    bits = f"W{record['weight_bits']}/A{record['activation_bits']}"
    for label, name, file in (("float", "float", "float32"), (bits, "quantized", "quantized.safetensors")):
        test = record.get("test", {}).get(name)
        figures = (f"{test['accuracy']:.2%}", f"{test['seconds']:.1f}") if test else ("-", "-")
        rows.append((label, *figures, f"{record['bytes'][file] / 1e6:.1f}"))
    return as_text(rows)
