"""smi-fast quantize: a model with fewer bits, calibrated on inverted images, noise or real images."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import smi_fast.cli.arguments as arguments
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.cli.arguments import count, seed
from smi_fast.cli.output import Results, add_output
from smi_fast.data.files import atomic_write, write_json
from smi_fast.data.labelled import load_data
from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens
from smi_fast.quantization import check_supported, quantize
from smi_fast.runs.machine import device_name, versions
from smi_fast.seeds import seeded_generator
from smi_fast.studies.plots import save_ranges
from smi_fast.studies.report import as_text

FILES = ("quantized.safetensors", "quantized.pt2", "ranges.png", "report.json")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("quantize", help="quantise a model, calibrated on inverted images")
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    calibration = parser.add_argument_group("calibration")
    what = "calibration images: what smi-fast invert wrote, noise, or real for images of --data's training split"
    calibration.add_argument("--calibration", default="noise", metavar="SOURCE", help=what)
    arguments.add_numbers(calibration, images=(count, 32, "number of calibration images"))
    arguments.add_numbers(calibration, seed=(seed, 0, "seed for the noise, or for the choice of real images"))
    bits = parser.add_argument_group("bits")
    arguments.add_numbers(bits, weight_bits=(int, 8, "bits of a weight, from 2 to 8"))
    arguments.add_numbers(bits, activation_bits=(int, 8, "bits of an activation, from 2 to 8"))
    bits.add_argument("--export", action="store_true", help="also write quantized.pt2, an int8 program to deploy")
    arguments.add_data(parser, required=False)
    arguments.add_numbers(parser, batch_size=(count, 128, "number of test images at a time"))
    arguments.add_device(parser)
    add_output(parser, "smi-fast-quantized")


def run(args: argparse.Namespace) -> int:
    results = Results(args, FILES)
    model = arguments.model_of(args)
    check_supported(model)
    test = None if args.data is None else arguments.load_test_images(args, model)
    images, sparsity = calibration_images(args, accelerate(model))

    started = time.perf_counter()
    quantized = quantize(model, images, args.weight_bits, args.activation_bits)
    record = {
        "model": args.model, "calibration": args.calibration, "images": args.images, "sparsity": sparsity,
        "weight_bits": args.weight_bits, "activation_bits": args.activation_bits,
        "seconds": time.perf_counter() - started, "device": device_name(args.device), "versions": versions(),
        "ranges": quantized.ranges,
    }  # fmt: skip
    if test is not None:
        record["test"] = {
            "float": arguments.timed_accuracy(model, test, not args.quiet),
            "quantized": arguments.timed_accuracy(quantized, test, not args.quiet),
            "images": len(test.dataset),
        }
    program = quantized.cpu().export() if args.export else None

    results.write("quantized.safetensors", lambda path: quantized.save(path, overwrite=True))
    if program is not None:
        results.write("quantized.pt2", lambda path: save_program(program, path))
    record["bytes"] = {name: (results.folder / name).stat().st_size for name in results.written}
    record["bytes"]["float32"] = sum(4 * parameter.numel() for parameter in model.parameters())
    results.write("ranges.png", lambda path: save_ranges({args.calibration: quantized.ranges}, path))
    results.write("report.json", lambda path: write_json(path, record))
    print(table(record), results, sep="\n")
    return 0


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
