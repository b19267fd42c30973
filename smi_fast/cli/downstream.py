"""What the images are for, from the command line: smi-fast quantize, distill, reproduce and evaluate."""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from smi_fast.cli.arguments import (
    INTERRUPTED,
    add_data,
    add_device,
    add_inversion,
    add_model,
    add_output,
    check_memory,
    check_out,
    check_writable,
    count,
    finite,
    inversion_of,
    model_of,
    seed,
)
from smi_fast.data.files import atomic_write, write_json
from smi_fast.data.labelled import accuracy, load_data
from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.distillation.rounds import Round, distill
from smi_fast.inversion import meter as report
from smi_fast.inversion.inverter import Inverter
from smi_fast.models.loading import MODEL_INSIDE, STUDENT_INSIDE
from smi_fast.packed import PackedTokens
from smi_fast.quantization import QuantizedViT, check_supported, quantize
from smi_fast.seeds import seeded_generator
from smi_fast.studies import pictures as visualization
from smi_fast.studies.reproduce import PRESETS, SECTIONS, reproduce


def add_downstream(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of the commands."""
    parser = commands.add_parser("quantize", help="quantise a model, calibrated on inverted images")
    parser.set_defaults(run=run_quantize)
    add_model(parser)
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", default="noise", metavar="SOURCE",
        help="what smi-fast invert wrote, a file or folder; noise; or real, which is --data's training split",
    )  # fmt: skip
    calibration.add_argument("--images", type=count, default=32, metavar="N", help="how many images")
    calibration.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of noise, and of the choice of real ones"
    )
    bits = parser.add_argument_group("bits")
    bits.add_argument("--weight-bits", type=int, default=8, metavar="N", help="2 to 8")
    bits.add_argument("--activation-bits", type=int, default=8, metavar="N", help="2 to 8")
    bits.add_argument("--export", action="store_true", help="write quantized.pt2 too: an int8 program to deploy")
    add_data(parser, required=False)
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="test images at a time")
    add_device(parser)
    add_output(parser, "smi-fast-quantized")

    parser = commands.add_parser("distill", help="teach a student with inverted images alone")
    parser.set_defaults(run=run_distill)
    add_model(parser, "the teacher: a ViT or DeiT of timm's, or the model inside")
    student = add_model(parser, "of timm's, or the one inside", role="student", default=STUDENT_INSIDE)
    student.add_argument("--fine-tune", action="store_true", help="train all of it, not the head alone")
    images = parser.add_argument_group("images")
    images.add_argument("--dataset", type=Path, metavar="PATH", help="stored inverted images, instead of fresh ones")
    images.add_argument("--samples", type=count, metavar="N", help="fresh images a round; 128, or all that are stored")
    add_inversion(images, lr="--inversion-lr")
    transfer = parser.add_argument_group("transfer")
    for name, default, text in (
        ("rounds", 10, "of inversion and transfer"), ("steps", 200, "of the student's optimiser, a round"),
        ("batch-size", 128, "images a step"),
    ):  # fmt: skip
        transfer.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    for name, default, text in (
        ("temperature", 20.0, "of the softmax"), ("lr", 0.1, "of SGD"), ("momentum", 0.9, "of SGD"),
        ("weight-decay", 1e-4, "of SGD"),
    ):  # fmt: skip
        transfer.add_argument(f"--{name}", type=finite, default=default, metavar="N", help=text)
    transfer.add_argument("--seed", type=seed, default=0, metavar="N", help="of inversion and transfer")
    add_data(parser, required=True)
    add_device(parser)
    add_output(parser, "smi-fast-distilled")

    parser = commands.add_parser("reproduce", help="the paper's comparisons, as one page")
    parser.set_defaults(run=run_reproduce)
    add_model(parser)
    add_model(parser, "of timm's, or the one inside, or none", role="student", default=STUDENT_INSIDE)
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

    parser = commands.add_parser("evaluate", help="the accuracy of a model, or of a quantised one")
    parser.set_defaults(run=run_evaluate)
    add_model(parser, "any classifier of timm's, or the model inside")
    parser.add_argument("--quantized", type=Path, metavar="FILE", help="what smi-fast quantize wrote, in its place")
    add_data(parser, required=True)
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="images at a time")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser)


def run_quantize(args: argparse.Namespace) -> int:
    check_out(args.out, args.overwrite, ("quantized.safetensors", "quantized.pt2", "ranges.png", "report.json"))
    model = model_of(args)
    check_supported(model)
    test = None if args.data is None else _test_data(args, model)
    source, sparsity = _calibration(args, model)
    started = time.perf_counter()
    quantized = quantize(model, source, args.weight_bits, args.activation_bits)
    seconds = time.perf_counter() - started
    record = {
        "model": args.model, "calibration": args.calibration, "images": args.images, "sparsity": sparsity,
        "weight_bits": args.weight_bits, "activation_bits": args.activation_bits, "seconds": seconds,
        "device": report.device_name(args.device), "versions": report.versions(),
        "ranges": quantized.ranges,
    }  # fmt: skip
    if test is not None:
        record["test"] = {
            name: _evaluated(network, test, not args.quiet)
            for name, network in (("float", model), ("quantized", quantized))
        }
        record["test"]["images"] = len(test.dataset)
    program = io.BytesIO()
    if args.export:
        torch.export.save(quantized.cpu().export(), program)

    args.out.mkdir(parents=True, exist_ok=True)
    quantized.save(args.out / "quantized.safetensors", overwrite=True)
    args.written.append("quantized.safetensors")
    if args.export:
        with atomic_write(args.out / "quantized.pt2") as partial:
            partial.write_bytes(program.getbuffer())
        args.written.append("quantized.pt2")
    sizes = record["bytes"] = {name: (args.out / name).stat().st_size for name in args.written}
    sizes["float32"] = sum(4 * parameter.numel() for parameter in model.parameters())
    if visualization.save_ranges({args.calibration: quantized.ranges}, args.out / "ranges.png"):
        args.written.append("ranges.png")
    write_json(args.out / "report.json", record)
    args.written.append("report.json")
    bits = f"W{args.weight_bits}/A{args.activation_bits}"
    rows = [("", "accuracy", "seconds", "MB")]
    for name, file in (("float", "float32"), ("quantized", "quantized.safetensors")):
        result = record.get("test", {}).get(name)
        figures = (f"{result['accuracy']:.2%}", f"{result['seconds']:.1f}") if result else ("-", "-")
        rows.append((bits if name == "quantized" else name, *figures, f"{sizes[file] / 1e6:.1f}"))
    print(report.as_text(rows))
    print(f"wrote {', '.join(args.written)} to {args.out}")
    return 0


def run_distill(args: argparse.Namespace) -> int:
    check_out(args.out, args.overwrite, ("student.safetensors", "accuracy.png", "report.json"))
    inversion, arguments = inversion_of(args)
    teacher, student = model_of(args), model_of(args, "student")
    if args.dataset is not None:
        for option, value in (
            ("iterations", args.iterations),
            ("inversion-lr", args.inversion_lr),
            ("tv-l2", args.tv_l2),
        ):
            if value is not None:
                raise ValueError(f"--{option} is of an inversion, and the images of --dataset are inverted already")
        source = {"dataset": InvertedDataset.load(args.dataset)}
        source["dataset"].verify()
        images = str(args.dataset)
    else:
        inverter = Inverter(teacher, **arguments, seed=args.seed, progress=False)
        check_memory("--samples", args.samples or 1, len(inverter.mean) * math.prod(inverter.image_size))
        source = {"inverter": inverter}
        images = f"inverted, stopping {args.stopping}, {inversion.iterations} iterations"
    test = _test_data(args, student)
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
        "images": images, "settings": settings, "test_images": len(test.dataset),
        "device": report.device_name(args.device), "versions": report.versions(), "rounds": [],
    }  # fmt: skip
    if args.dataset is None:
        record["inversion"] = {**asdict(inversion), "l2": args.l2, "stopping": str(arguments["stopping"])}

    def keep(finished: Round, batch: Dataset) -> None:
        """What is finished is on disk, whatever happens next."""
        record["rounds"].append(asdict(finished))
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out / "student.safetensors") as partial:
            save_file({name: value.contiguous().cpu() for name, value in student.state_dict().items()}, partial)
        write_json(args.out / "report.json", record)
        args.written[:] = ["student.safetensors", "report.json"]

    result = distill(
        teacher, student, linear_probing=not args.fine_tune, evaluate=test, callback=keep, progress=not args.quiet,
        **source, **settings,
    )  # fmt: skip
    if not result.history:
        raise KeyboardInterrupt
    points = [(finished.samples, finished.accuracy) for finished in result.history]
    if visualization.save_accuracy({args.student: points}, args.out / "accuracy.png"):
        args.written.append("accuracy.png")
    rows = [("round", "samples", "iterations", "loss", "accuracy", "inversion s", "transfer s")]
    for r in result.history:
        seconds = (f"{r.inversion_seconds:.1f}", f"{r.transfer_seconds:.1f}")
        rows.append((str(r.number), str(r.samples), str(r.iterations), f"{r.loss:.3g}", f"{r.accuracy:.2%}", *seconds))
    print(report.as_text(rows))
    print(f"wrote {', '.join(args.written)} to {args.out}")
    return INTERRUPTED if result.interrupted else 0


def run_reproduce(args: argparse.Namespace) -> int:
    check_writable(args.out)
    model = model_of(args)
    student, note = None if args.student == "none" else model_of(args, "student"), ""
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
        if not (args.out / "about.json").exists():
            raise
        print(
            f"interrupted: what is finished is in {args.out}, and the same command goes on from there", file=sys.stderr
        )
        return INTERRUPTED
    print(f"wrote {page}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    if args.quantized is None:
        model: nn.Module = model_of(args)
    elif args.pretrained or args.checkpoint is not None or args.model != MODEL_INSIDE:
        raise ValueError("--quantized holds the whole model: leave out --model, --pretrained and --checkpoint")
    else:
        model = QuantizedViT.load(args.quantized).to(args.device)
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
    generator = seeded_generator(args.seed)
    device = next(model.parameters()).device
    if args.calibration == "noise":
        size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        check_memory("--images", args.images, math.prod(size))
        return torch.randn(args.images, *size, generator=generator).to(device), 0.0
    if args.calibration == "real":
        if args.data is None:
            raise ValueError("--calibration real needs --data, of whose training split it takes the images")
        data = load_data(args.data, args.root, split="train", model=model)
        if len(data) < args.images:
            raise ValueError(f"--images: the training split of {args.data} holds {len(data)} images, not {args.images}")
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
    chosen = torch.linspace(0, len(dataset) - 1, args.images).long().tolist()  # the dataset is sorted by class
    tokens, _ = InvertedDataset.collate([dataset[number] for number in chosen])
    sparsity = 1 - len(tokens.positions) / (args.images * model.patch_embed.num_patches)
    return normalize_patches(tokens, config["mean"], config["std"]), sparsity


def _evaluated(model: nn.Module, test: DataLoader, progress: bool) -> dict[str, float]:
    started = time.perf_counter()
    return {"accuracy": accuracy(model, test, progress=progress), "seconds": time.perf_counter() - started}
