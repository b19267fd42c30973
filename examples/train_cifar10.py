"""Train one of the CIFAR-10 classifiers that smi-fast carries inside, on a CPU or a GPU.

    python examples/train_cifar10.py --data DIR --out RUN_DIR [--model cifar10_resnet20] [--export]

DIR holds `train/<class>/*` and `test/<class>/*` (an ImageFolder of 32x32 images). RUN_DIR receives `log.jsonl` and,
after every epoch, `checkpoint.pt`, from which a run that was stopped goes on by itself. The last weights are the
result: the test split is read once, after the last epoch, and chooses nothing. With --export they are written as
float16 safetensors, beside the figures of the run, into `smi_fast/models/`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder

from smi_fast.data.states import load_state, save_state
from smi_fast.models import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, MODEL_DIR, cifar10_resnet20, cifar10_vit

MODELS = {"cifar10_vit": cifar10_vit, "cifar10_resnet20": cifar10_resnet20}
RECIPES = {  # options that were not given
    "cifar10_vit": dict(
        epochs=24,
        batch_size=256,
        lr=1e-3,
        weight_decay=0.05,
        label_smoothing=0.1,
        patch_drop_rate=0.25,
        max_grad_norm=1.0,
    ),
    "cifar10_resnet20": dict(
        epochs=50,
        batch_size=128,
        lr=0.2,
        weight_decay=5e-4,
        label_smoothing=0.0,
        patch_drop_rate=0.0,
        max_grad_norm=5.0,
    ),
}


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for a ViT, SGD with Nesterov's momentum for a CNN; only matrices and kernels decay."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=lr)


def read_split(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of an ImageFolder in memory: uint8 (N, 3, 32, 32) and their labels (N,)."""
    dataset = ImageFolder(str(folder))
    if tuple(dataset.classes) != CIFAR10_CLASSES:
        raise SystemExit(f"{folder} has the classes {dataset.classes}, expected {list(CIFAR10_CLASSES)}")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in dataset.samples])
    labels = torch.tensor([label for _, label in dataset.samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def crop_flip(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Random crop after zero padding and a random mirror, drawn for each image."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows = top + torch.arange(height)  # [B, H]
    columns = left + torch.arange(width)  # [B, W]
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # [B, H, W]
    index = index.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(batch, channels, height, width)


def normalise(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    return (images.to(device).float() / 255 - mean) / std


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    """Share of images whose largest logit is their label, in float32, no augmentation."""
    model.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += (model(normalise(x, device)).argmax(1).cpu() == y).sum().item()
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="cifar10_vit")
    for name, value in RECIPES["cifar10_vit"].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()
    for name, value in RECIPES[args.model].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # order and augmentation
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint_file, log_file = args.out / "checkpoint.state", args.out / "log.jsonl"

    images, labels = read_split(args.data / "train")
    dropping = {"patch_drop_rate": args.patch_drop_rate} if args.patch_drop_rate else {}  # which only a ViT has
    model = MODELS[args.model](pretrained=False, **dropping).to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    steps_per_epoch = len(labels) // args.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps_per_epoch)

    first_epoch, seconds = 0, 0.0
    if checkpoint_file.exists():
        state = load_state(checkpoint_file)
        if state["epochs"] != args.epochs:
            raise SystemExit(f"{checkpoint_file} is of a run of {state['epochs']} epochs, not {args.epochs}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        first_epoch, seconds = state["epoch"], state["seconds"]
        print(f"going on after epoch {first_epoch}")

    for epoch in range(first_epoch, args.epochs):
        model.train()
        started, total_loss = time.perf_counter(), torch.zeros((), device=device)
        order = torch.randperm(len(labels), generator=generator)[: steps_per_epoch * args.batch_size]
        for index in order.split(args.batch_size):
            x = normalise(crop_flip(images[index], generator), device)
            y = labels[index].to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y, label_smoothing=args.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            total_loss += loss.detach()
        seconds += time.perf_counter() - started
        record = {"epoch": epoch + 1, "train_loss": total_loss.item() / steps_per_epoch, "seconds": round(seconds, 1)}
        print(json.dumps(record), flush=True)
        with log_file.open("a") as log:
            log.write(json.dumps(record) + "\n")
        save_state(checkpoint_file, {
            "epoch": epoch + 1, "epochs": args.epochs, "seconds": seconds, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "generator": generator.get_state(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        })  # fmt: skip

    half = {
        name: value.half().cpu() if value.is_floating_point() else value.cpu()
        for name, value in model.state_dict().items()
    }
    model = MODELS[args.model](pretrained=False).to(device)
    model.load_state_dict(half)  # what is measured is what is shipped: weights rounded to float16
    figures = {
        "test_accuracy": accuracy(model, *read_split(args.data / "test"), device),
        "train_accuracy_every_5th": accuracy(model, images[::5], labels[::5], device),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "recipe": {k: v for k, v in vars(args).items() if k not in ("data", "out", "export", "device")},
    }
    print(json.dumps(figures, indent=1))
    if args.export:
        from safetensors.torch import save_file

        save_file(half, str(MODEL_DIR / f"{args.model}.safetensors"))
        (MODEL_DIR / f"{args.model}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
