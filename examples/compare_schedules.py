"""Compare schedules by seconds per image and by what the images teach: dense, SMI, rebirth and early ends.

    python examples/compare_schedules.py --data DIR --out RUN_DIR [--images 128] [--arms dense,smi,rebirth=4]

All arms invert the ViT for CIFAR-10 in the package, with the demo's settings and the same number of images:

    dense          all patches to the end
    smi            Sparse Model Inversion (Hu et al., ICML 2024): 14 of 64 patches are left
    rebirth=V      Patch Rebirth Inversion (arXiv 2509.23235): each run of a target gives V disjoint sparse images
    until          smi, but each batch ends when the model is sure of all its images
    stream         smi, but each image leaves when the model is sure of it, and the next one takes its place

The images of each arm then teach the student in the package, by linear probing. DIR holds `test/<class>/*` (an
ImageFolder of 32x32 images), which is only measured on. RUN_DIR receives `ARM.json` for each arm, and `table.md` when
all are there. A run that was stopped goes on with the first arm that has no file. --every N measures on every N-th test
image.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from smi_fast import InvertedDataset, Until, deep_inversion, distill, load_data
from smi_fast.data.files import write_json
from smi_fast.inversion.inverter import InversionResult, Inverter
from smi_fast.inversion.meter import confidences
from smi_fast.inversion.presets import DEMO, InversionSettings
from smi_fast.models import cifar10_student, cifar10_vit
from smi_fast.runs.machine import device_name, versions
from smi_fast.seeds import batch_seed

UNTIL = Until(confidence=0.9, checks=2, every=20)
ARMS = {
    "dense": replace(DEMO, stopping="dense"),
    "smi": DEMO,
    "rebirth=2": replace(DEMO, stopping="rebirth=2"),
    "rebirth=4": replace(DEMO, stopping="rebirth=4"),
    "rebirth=7": replace(DEMO, stopping="rebirth=7"),
    "until": replace(DEMO, until=UNTIL),
    "stream": replace(DEMO, objective=deep_inversion(1e-3, norm="image"), until=UNTIL),
}


def inverted(arm: str, inverter: Inverter, images: int, batch_size: int, seed: int) -> list[InversionResult]:
    """Invert all classes in turn until there are so many images."""
    targets = torch.arange(-(-images // inverter.stopping.images_per_target)) % 10
    if arm == "stream":
        return [inverter.stream(targets, batch_size, seed)]
    batches = enumerate(targets.split(batch_size))
    return [inverter.run(batch, batch_seed(seed, number)) for number, batch in batches]


def taught(dataset: InvertedDataset, test: DataLoader, steps: int, seed: int) -> float:
    """Return the accuracy of a student that has learnt from the images."""
    student = cifar10_student()
    result = distill(
        cifar10_vit(), student, dataset=dataset, rounds=1, steps=steps, evaluate=test, seed=seed, progress=False
    )
    return result.history[-1].accuracy


def run_arm(arm: str, settings: InversionSettings, args: argparse.Namespace, test: DataLoader) -> dict:
    """Invert the images of an arm, and measure them."""
    inverter = settings.inverter(cifar10_vit(), progress=False)
    started = time.perf_counter()
    parts = inverted(arm, inverter, args.images, args.batch_size, args.seed)
    seconds = time.perf_counter() - started
    images, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "targets"))
    keep = [row for part in parts for row in part.keep]
    mean, std = inverter.mean, inverter.std
    confidence, predicted = confidences(inverter.backbone, images, keep, targets, mean, std)
    dataset = InvertedDataset.from_images(images, keep, targets, parts[0].patch_size, {"mean": mean, "std": std})
    return {
        "images": len(images), "seconds": seconds, "seconds_per_image": seconds / len(images),
        "images_per_hour": 3600 * len(images) / seconds,
        "iterations": torch.cat([part.iterations for part in parts]).double().mean().item(),
        "patches": sum(map(len, keep)) / len(keep),
        "classified_as_target": (predicted == targets).double().mean().item(), "confidence": confidence.mean().item(),
        "student_accuracy": [taught(dataset, test, args.steps, seed) for seed in range(args.student_seeds)],
        "settings": settings.record(),
    }  # fmt: skip


def table(found: dict[str, dict]) -> str:
    """Return the figures of all arms as a table in Markdown."""
    rows = [
        "| schedule | patches | iterations | s per image | images per hour | as target, % | confidence | student, % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, r in found.items():
        student = 100 * sum(r["student_accuracy"]) / len(r["student_accuracy"])
        rows.append(
            f"| {arm} | {r['patches']:.1f} | {r['iterations']:.0f} | {r['seconds_per_image']:.3f} "
            f"| {r['images_per_hour']:.0f} | {100 * r['classified_as_target']:.0f} | {r['confidence']:.3f} "
            f"| {student:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    counts = {"images": 128, "batch_size": 32, "steps": 300, "student_seeds": 3, "seed": 0, "every": 1}
    for name, default in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    arms = args.arms.split(",")
    if not set(arms) <= set(ARMS):
        raise SystemExit(f"--arms: {args.arms} names others than {', '.join(ARMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    test = load_data(str(args.data), split="test", model=cifar10_vit())
    test = DataLoader(Subset(test, range(0, len(test), args.every)), 500)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "arms")}
    about = {"device": device_name(torch.device("cpu")), "versions": versions(), "run": settings}
    found, shown = {}, ("seconds_per_image", "confidence", "student_accuracy")
    for arm in arms:
        file = args.out / f"{arm}.json"
        if not file.exists():
            write_json(file, about | run_arm(arm, ARMS[arm], args, test))
        found[arm] = json.loads(file.read_text())
        print(arm, {name: found[arm][name] for name in shown}, flush=True)
    (args.out / "table.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
