"""Teach a small CNN without data: DeepInversion, adaptive DeepInversion and noise, with equal budgets.

    python examples/distill_cifar10.py --data DIR --out RUN_DIR [--arms noise,deep_inversion,adaptive]

A ResNet-20 teaches an untrained ResNet-8. Each arm has the same start, the same number of rounds, of images and of
training steps; only the images differ:

    noise            Gaussian noise in normalised space, clamped to the range of pixels
    deep_inversion   images that the teacher is inverted into (Yin et al., CVPR 2020)
    adaptive         the same, in competition with the student, which learns between the batches
    adaptive_exact   the same with the exact Jensen-Shannon divergence instead of the published one
    real             training images, which the other arms do not have: the ceiling

After 150 iterations the teacher puts 52 % of 40 images into their target class with the paper's weight 10 of the
statistics, and all of them with 1. That and the short runs are the differences to the paper's settings.

DIR holds `train/<class>/*` and `test/<class>/*` (an ImageFolder of 32x32 images). The test split is only measured on,
and chooses nothing. RUN_DIR receives for each arm `ARM.json`, `ARM.safetensors` (the student) and `ARM.png` (its last
images), and when all are there `distillation.json`, `accuracy.png` and `table.md`. A run that was stopped goes on with
the first arm that has no `ARM.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from smi_fast import InvertedDataset, Round, distill, load_data
from smi_fast.backbones.cnn import CNN
from smi_fast.data.files import write_json
from smi_fast.data.labelled import accuracy
from smi_fast.inversion.presets import CIFAR10_CNN, InversionSettings
from smi_fast.models.loading import load_model, untrained_model
from smi_fast.runs.machine import device_name, versions
from smi_fast.studies.pictures import save_grid
from smi_fast.studies.plots import save_accuracy

Batches = list[tuple[torch.Tensor, torch.Tensor]]
ARMS = {  # arguments of `distill`
    "noise": {},
    "deep_inversion": {},
    "adaptive": {"adaptive": 10.0},
    "adaptive_exact": {"adaptive": 10.0, "js": "exact"},
    "real": {},
}


def wrapped(model: nn.Module, args: argparse.Namespace) -> CNN:
    """Return a model in the dtype of the run, and in the layout that a CPU prefers for networks of few channels."""
    return CNN(model, getattr(torch, args.dtype), channels_last=True)


def inversion(args: argparse.Namespace) -> InversionSettings:
    given = {"iterations": args.iterations, "lr": args.inversion_lr, "batch_norm": args.batch_norm}
    return CIFAR10_CNN.replaced(given)


def dataset(arm: str, teacher: CNN, args: argparse.Namespace) -> InvertedDataset:
    """Return as many images as the other arms invert: noise, or images of the training split."""
    count, generator = args.rounds * args.samples, torch.Generator().manual_seed(args.seed)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    if arm == "noise":
        normalised = torch.randn(count, teacher.num_channels, *teacher.image_size, generator=generator)
    else:
        data = load_data(args.data, split="train", model=teacher.model)
        chosen = torch.randperm(len(data), generator=generator)[:count].tolist()
        normalised = torch.stack([data[number][0] for number in chosen])
    pixels = (normalised * std + mean).clamp(0, 1)
    return InvertedDataset.from_images(pixels, None, torch.zeros(len(pixels)).long(), teacher.image_size)


def in_memory(data: torch.utils.data.Dataset) -> Batches:
    return list(DataLoader(data, 500))


def agreement(student: CNN, teacher: CNN, batches: Batches) -> float:
    """Share of images that the student puts into the teacher's class."""
    with torch.no_grad():
        return accuracy(student, [(x, teacher(x).argmax(1)) for x, _ in batches], progress=False)


def run_arm(arm: str, teacher: CNN, args: argparse.Namespace, train: Batches, test: Batches) -> dict:
    """Teach a student with the images of an arm, and write its files."""
    student = wrapped(untrained_model(args.student, teacher.model, args.seed), args)
    if arm in ("noise", "real"):
        source = {"dataset": dataset(arm, teacher, args)}
    else:
        source = {"inverter": inversion(args).inverter(teacher, progress=False)}
    started, agreed = time.perf_counter(), []

    def tell(finished: Round, images: torch.utils.data.Dataset) -> None:
        agreed.append(agreement(student, teacher, train))
        seconds = time.perf_counter() - started
        print(f"{arm}: round {finished.number}, loss {finished.loss:.3f}, agreement {agreed[-1]:.2%}, "
              f"accuracy {finished.accuracy:.2%}, {seconds:.0f} s", flush=True)  # fmt: skip

    result = distill(
        teacher, student, rounds=args.rounds, samples=args.samples, steps=args.steps, batch_size=args.batch_size,
        temperature=3.0, lr=args.lr, evaluate=test, seed=args.seed, callback=tell, progress=False,
        **source, **ARMS[arm],
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt
    last = result.batches[-1]
    images = torch.stack([last[number][0] for number in range(min(40, len(last)))])  # each is one patch
    save_grid(images.view(-1, 3, *teacher.image_size), args.out / f"{arm}.png", 10)
    save_file(student.model.state_dict(), args.out / f"{arm}.safetensors")
    rounds = [asdict(r) | {"agreement": a} for r, a in zip(result.history, agreed, strict=True)]
    return {"arm": arm, "rounds": rounds, "seconds": time.perf_counter() - started}


def summarise(found: dict[str, dict], about: dict, out: Path) -> None:
    """Write all figures, a chart and a table."""
    write_json(out / "distillation.json", about | {"arms": found})
    curves = {arm: [(r["samples"], r["accuracy"]) for r in record["rounds"]] for arm, record in found.items()}
    save_accuracy(curves, out / "accuracy.png")
    rows = ["| images | accuracy of the student, % | agreement with the teacher, % | minutes |", "|---|---|---|---|"]
    for arm, record in found.items():
        last = record["rounds"][-1]
        figures = 100 * last["accuracy"], 100 * last["agreement"], record["seconds"] / 60
        rows.append("| {} | {:.2f} | {:.2f} | {:.1f} |".format(arm.replace("_", " "), *figures))
    (out / "table.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="noise,deep_inversion,adaptive")
    parser.add_argument("--model", default="cifar10_resnet20")
    parser.add_argument("--student", default="cifar10_resnet8")
    for name, default in (("rounds", 10), ("samples", 256), ("iterations", 200), ("steps", 300), ("batch_size", 128)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.1, help="of the student")
    parser.add_argument("--inversion-lr", type=float, default=0.1)
    parser.add_argument("--batch-norm", type=float, default=1.0, help="weight of the statistics; the paper has 10")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arms = args.arms.split(",")
    if not set(arms) <= set(ARMS):
        raise SystemExit(f"--arms: {args.arms} names others than {', '.join(ARMS)}")
    args.out.mkdir(parents=True, exist_ok=True)

    teacher = wrapped(load_model(args.model), args)
    data = load_data(args.data, split="train", model=teacher.model)
    train = in_memory(Subset(data, range(0, len(data), 25)))
    test = in_memory(load_data(args.data, split="test", model=teacher.model))
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "arms")}
    about = {
        "settings": settings, "inversion": inversion(args).record(), "device": device_name(teacher.device),
        "versions": versions(), "teacher_accuracy": accuracy(teacher, test, progress=False),
    }  # fmt: skip
    found = {}
    for arm in arms:
        file = args.out / f"{arm}.json"
        if file.exists():
            record = json.loads(file.read_text())
            if record["settings"] != settings:
                raise SystemExit(f"{file} is of a run with other settings: {record['settings']}")
        else:
            record = {"settings": settings} | run_arm(arm, teacher, args, train, test)
            write_json(file, record)
        found[arm] = record
    summarise(found, about, args.out)


if __name__ == "__main__":
    main()
