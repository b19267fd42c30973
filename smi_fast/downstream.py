"""What the images are for, from the command line: smi-fast quantize, distill, reproduce and evaluate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from smi_fast import report, visualization
from smi_fast.arguments import (
    INTERRUPTED,
    add_data,
    add_device,
    add_model,
    add_output,
    check_out,
    check_positive,
    device_of,
)
from smi_fast.data import accuracy, load_data
from smi_fast.dataset import InvertedDataset, atomic_write, normalize_patches
from smi_fast.distillation import Round, distill
from smi_fast.inversion import Inverter
from smi_fast.loading import STUDENT_INSIDE, load_model
from smi_fast.objectives import deep_inversion
from smi_fast.quantization import QuantizedViT, quantize
from smi_fast.reproduce import PRESETS, SECTIONS, reproduce
from smi_fast.stopping import StoppingSchedule
from smi_fast.tokens import PackedTokens


def add_downstream(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of the commands."""
    as_shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = commands.add_parser("quantize", help="quantise a model, calibrated on inverted images", **as_shown)
    parser.set_defaults(run=run_quantize)
    add_model(parser)
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", default="noise", metavar="SOURCE",
        help="what smi-fast invert wrote, a file or folder; noise; or real, which is --data's training split",
    )  # fmt: skip
    calibration.add_argument("--images", type=int, default=32, metavar="N", help="how many of them, the first")
    calibration.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of noise, and of the choice of real ones"
    )
    bits = parser.add_argument_group("bits")
    bits.add_argument("--weight-bits", type=int, default=8, metavar="N", help="2 to 8")
    bits.add_argument("--activation-bits", type=int, default=8, metavar="N", help="2 to 8")
    bits.add_argument("--export", action="store_true", help="write quantized.pt2 too: an int8 program to deploy")
    add_data(parser, required=False)
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="test images at a time")
    add_device(parser)
    add_output(parser, "smi-fast-quantized")

    parser = commands.add_parser("distill", help="teach a student with inverted images alone", **as_shown)
    parser.set_defaults(run=run_distill)
    add_model(parser, "the teacher: a ViT or DeiT of timm's, or the model inside")
    student = _add_student(parser)
    student.add_argument("--fine-tune", action="store_true", help="train all of it, not the head alone")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--dataset", type=Path, metavar="PATH", help="stored inverted images, in the place of fresh ones"
    )
    images.add_argument("--samples", type=int, metavar="N", help="fresh images a round; 128, or all that are stored")
    images.add_argument("--iterations", type=int, default=600, metavar="N", help="of an inversion")
    images.add_argument("--stopping", default="paper", metavar="SCHEDULE", help="of an inversion, as smi-fast invert")
    images.add_argument("--inversion-lr", type=float, default=0.1, metavar="N", help="of the pixels")
    images.add_argument("--tv-l2", type=float, default=1e-3, metavar="N", help="weight of total variation")
    transfer = parser.add_argument_group("transfer")
    for name, default, text in (
        ("rounds", 10, "of inversion and transfer"), ("steps", 200, "of the student's optimiser, a round"),
        ("batch-size", 128, "images a step"),
    ):  # fmt: skip
        transfer.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    for name, default, text in (
        ("temperature", 20.0, "of the softmax"), ("lr", 0.1, "of SGD"), ("momentum", 0.9, "of SGD"),
        ("weight-decay", 1e-4, "of SGD"),
    ):  # fmt: skip
        transfer.add_argument(f"--{name}", type=float, default=default, metavar="N", help=text)
    transfer.add_argument("--seed", type=int, default=0, metavar="N", help="of inversion and transfer")
    add_data(parser, required=True)
    add_device(parser)
    add_output(parser, "smi-fast-distilled")

    parser = commands.add_parser("reproduce", help="the paper's comparisons, as one page", **as_shown)
    parser.set_defaults(run=run_reproduce)
    add_model(parser)
    _add_student(parser, ", or none")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="as for distill, with a training and a test split"
    )
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="where torchvision keeps the data set of that name")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help="how many images, rounds and seeds")
    parser.add_argument("--sections", metavar="LIST", help=f"of {','.join(SECTIONS)}; all")
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("smi-fast-reproduction"), metavar="FOLDER",
                        help="where the page goes; what is finished there is kept")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")

    parser = commands.add_parser("evaluate", help="the accuracy of a model, or of a quantised one", **as_shown)
    parser.set_defaults(run=run_evaluate)
    add_model(parser)
    parser.add_argument("--quantized", type=Path, metavar="FILE", help="what smi-fast quantize wrote, in its place")
    add_data(parser, required=True)
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser)


def _add_student(parser: argparse.ArgumentParser, more: str = "") -> argparse._ArgumentGroup:
    student = parser.add_argument_group("student")
    student.add_argument(
        "--student", default=STUDENT_INSIDE, metavar="NAME", help=f"of timm's, or the one inside{more}"
    )
    student.add_argument("--student-pretrained", action="store_true", help="download timm's weights for it")
    student.add_argument(
        "--student-checkpoint", type=Path, metavar="FILE", help="weights: safetensors, or a torch file"
    )
    return student


def _student(args: argparse.Namespace) -> nn.Module:
    return load_model(args.student, pretrained=args.student_pretrained, checkpoint=args.student_checkpoint)


def run_quantize(args: argparse.Namespace) -> int:
    check_positive(args, "images", "batch_size", "limit")
    check_out(args.out, args.overwrite)
    device = device_of(args.device)
    model = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)
    test = None if args.data is None else _test_data(args, model)
    source, sparsity = _calibration(args, model)
    started = time.perf_counter()
    quantized = quantize(model, source, args.weight_bits, args.activation_bits)
    seconds = time.perf_counter() - started
    args.out.mkdir(parents=True, exist_ok=True)
    quantized.save(args.out / "quantized.safetensors", overwrite=True)
    written = ["quantized.safetensors"]
    if args.export:
        with atomic_write(args.out / "quantized.pt2") as partial:
            torch.export.save(quantized.cpu().export(), str(partial))
        quantized.to(device)
        written.append("quantized.pt2")
    sizes = {name: (args.out / name).stat().st_size for name in written}
    sizes["float32"] = sum(4 * parameter.numel() for parameter in model.parameters())
    record = {
        "model": args.model, "calibration": args.calibration, "images": args.images, "sparsity": sparsity,
        "weight_bits": args.weight_bits, "activation_bits": args.activation_bits, "seconds": seconds, "bytes": sizes,
        "device": report.device_name(device), "versions": report.versions(), "ranges": quantized.ranges,
    }  # fmt: skip
    if visualization.save_ranges({args.calibration: quantized.ranges}, args.out / "ranges.png"):
        written.append("ranges.png")
    if test is not None:
        record["test"] = {
            name: _evaluated(network, test, not args.quiet)
            for name, network in (("float", model), ("quantized", quantized))
        }
        record["test"]["images"] = len(test.dataset)
    _write_report(args.out, record)
    bits = f"W{args.weight_bits}/A{args.activation_bits}"
    rows = [("", "accuracy", "seconds", "MB")]
    for name, file in (("float", "float32"), ("quantized", "quantized.safetensors")):
        result = record.get("test", {}).get(name)
        figures = (f"{result['accuracy']:.2%}", f"{result['seconds']:.1f}") if result else ("-", "-")
        rows.append((bits if name == "quantized" else name, *figures, f"{sizes[file] / 1e6:.1f}"))
    print(report.as_text(rows))
    print(f"wrote {', '.join([*written, 'report.json'])} to {args.out}")
    return 0


def run_distill(args: argparse.Namespace) -> int:
    check_positive(args, "rounds", "samples", "steps", "batch_size", "iterations", "limit")
    check_out(args.out, args.overwrite)
    device = device_of(args.device)
    teacher = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)
    student = load_model(args.student, pretrained=args.student_pretrained, checkpoint=args.student_checkpoint).to(
        device
    )
    test, images = _test_data(args, student), {}
    if args.dataset is not None:
        images["dataset"] = InvertedDataset.load(args.dataset)
        images["dataset"].verify()
    else:
        paper = args.stopping == "paper"
        images["inverter"] = Inverter(
            teacher,
            stopping=StoppingSchedule.paper(args.iterations) if paper else StoppingSchedule.parse(args.stopping),
            objective=deep_inversion(tv_l2=args.tv_l2),
            iterations=args.iterations,
            lr=args.inversion_lr,
            seed=args.seed,
            progress=False,
        )
    settings = {
        name: getattr(args, name)
        for name in (
            "rounds",
            "samples",
            "steps",
            "batch_size",
            "temperature",
            "lr",
            "momentum",
            "weight_decay",
            "seed",
        )
    }
    record = {
        "teacher": args.model, "student": args.student, "fine_tune": args.fine_tune,
        "images": str(args.dataset or f"inverted, stopping {args.stopping}, {args.iterations} iterations"),
        "settings": settings, "test_images": len(test.dataset), "device": report.device_name(device),
        "versions": report.versions(), "rounds": [],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(finished: Round, batch: Dataset) -> None:
        """What is finished is on disk, whatever happens next."""
        record["rounds"].append(asdict(finished))
        with atomic_write(args.out / "student.safetensors") as partial:
            save_file({name: value.contiguous().cpu() for name, value in student.state_dict().items()}, partial)
        _write_report(args.out, record)

    result = distill(
        teacher, student, linear_probing=not args.fine_tune, evaluate=test, callback=keep, progress=not args.quiet,
        **images, **settings,
    )  # fmt: skip
    if not result.history:
        raise KeyboardInterrupt
    written = ["student.safetensors", "report.json"]
    points = [(finished.samples, finished.accuracy) for finished in result.history]
    if visualization.save_accuracy({args.student: points}, args.out / "accuracy.png"):
        written.append("accuracy.png")
    rows = [("round", "samples", "iterations", "loss", "accuracy", "inversion s", "transfer s")]
    for r in result.history:
        seconds = (f"{r.inversion_seconds:.1f}", f"{r.transfer_seconds:.1f}")
        rows.append((str(r.number), str(r.samples), str(r.iterations), f"{r.loss:.3g}", f"{r.accuracy:.2%}", *seconds))
    print(report.as_text(rows))
    print(f"wrote {', '.join(written)} to {args.out}")
    return INTERRUPTED if result.interrupted else 0


def run_reproduce(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    model = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)
    student, note = None if args.student == "none" else _student(args).to(device), ""
    if args.student == STUDENT_INSIDE:
        note = "It was trained on the same training images without their labels."
    elif student is not None and student.num_classes != model.num_classes:
        student.reset_classifier(model.num_classes)
    sections = None if args.sections is None else [part.strip() for part in args.sections.split(",")]
    try:
        page = reproduce(
            model, args.data, args.out, root=args.root, student=student, student_note=note, settings=args.preset,
            sections=sections, progress=not args.quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(
            f"interrupted: what is finished is in {args.out}, and the same command goes on from there", file=sys.stderr
        )
        return INTERRUPTED
    print(f"wrote {page}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    check_positive(args, "batch_size", "limit")
    if args.quantized is not None:
        model: nn.Module = QuantizedViT.load(args.quantized).to(device_of(args.device))
    else:
        model = load_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint)
        model = model.to(device_of(args.device))
    test = _test_data(args, model)
    result = _evaluated(model, test, not args.quiet)
    print(f"{result['accuracy']:.2%} of {len(test.dataset)} images, {result['seconds']:.1f} s")
    return 0


def _test_data(args: argparse.Namespace, model: nn.Module) -> DataLoader:
    data = load_data(args.data, args.root, split="test", model=model)
    if args.limit is not None and args.limit < len(data):
        data = Subset(data, torch.linspace(0, len(data) - 1, args.limit).long().tolist())
    return DataLoader(data, args.batch_size)


def _calibration(args: argparse.Namespace, model: nn.Module) -> tuple[PackedTokens | Tensor, float]:
    """What to calibrate on, and the share of patches that is missing of it."""
    generator = torch.Generator().manual_seed(args.seed)
    device = next(model.parameters()).device
    if args.calibration == "noise":
        size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        return torch.randn(args.images, *size, generator=generator).to(device), 0.0
    if args.calibration == "real":
        if args.data is None:
            raise ValueError("--calibration real needs --data, of whose training split it takes the images")
        data = load_data(args.data, args.root, split="train", model=model)
        chosen = torch.randperm(len(data), generator=generator)[: args.images].tolist()
        return torch.stack([data[number][0] for number in chosen]).to(device), 0.0
    if not Path(args.calibration).exists():
        raise ValueError(f"--calibration: {args.calibration} is neither noise, real, nor a file or folder")
    dataset = InvertedDataset.load(args.calibration)
    if len(dataset) < args.images:
        raise ValueError(f"--images: {args.calibration} holds {len(dataset)} images, not {args.images}")
    config = resolve_data_config(model=model)
    dataset.check_normalization(config["mean"], config["std"])
    size, patch_size = tuple(model.patch_embed.img_size), tuple(model.patch_embed.patch_size)
    for what, found, expected in (("", dataset.image_size[1:], size), ("patches of ", dataset.patch_size, patch_size)):
        if tuple(found) != expected:
            raise ValueError(f"--calibration: {args.calibration} holds {what}{found}, the model takes {expected}")
    chosen = torch.linspace(0, len(dataset) - 1, args.images).long().tolist()  # of all classes, which lie one by one
    tokens, _ = InvertedDataset.collate([dataset[number] for number in chosen])
    sparsity = 1 - len(tokens.positions) / (args.images * model.patch_embed.num_patches)
    return normalize_patches(tokens, config["mean"], config["std"]), sparsity


def _evaluated(model: nn.Module, test: DataLoader, progress: bool) -> dict[str, float]:
    started = time.perf_counter()
    return {"accuracy": accuracy(model, test, progress=progress), "seconds": time.perf_counter() - started}


def _write_report(out: Path, record: dict) -> None:
    with atomic_write(out / "report.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
