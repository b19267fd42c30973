"""Pre-train the student that smi-fast carries inside, without labels, on a CPU or a GPU.

    python examples/pretrain_student.py --data DIR --out RUN_DIR [--epochs 4] [--export]

A student of a knowledge transfer must not know the classes beforehand. This one, of the architecture of the model
inside, has learnt to predict bags of visual words (Gidaris et al., CVPR 2020) of the training images:

1. words: the k-means centres of whitened patches of 6x6 pixels (Coates, Lee & Ng, AISTATS 2011);
2. bag: how near each word is to an image's patches, pooled over quadrants, of the image and its mirror image;
3. targets: the whitened first principal components of the bags;
4. the ViT sees a cropped, perhaps mirrored image, of which only some patches, and predicts the targets from its class
   token, by a linear layer that is thrown away. The head that is shipped is zero.

DIR and RUN_DIR are as for `train_cifar10.py`, and so is how a run that was stopped goes on. Labels are read when the
weights are final, for the accuracy of a linear probe; they and the test split choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm
from train_cifar10 import crop_flip, normalise, read_split

import smi_fast
from smi_fast.data.states import load_state, save_state
from smi_fast.models import MODEL_DIR, cifar10_vit

WINDOW, STRIDE = 6, 2  # of the patches that are words, in pixels
NUM_PATCHES = 64  # of the ViT


def windows(images: Tensor) -> Tensor:
    """Windows of uint8 images (B, 3, 32, 32), brightness and contrast removed: (B, 14 * 14, 108)."""
    values = F.unfold(images.float(), WINDOW, stride=STRIDE).mT
    values = values - values.mean(-1, keepdim=True)
    return values / (values.var(-1, keepdim=True) + 10).sqrt()  # 10: as published, for pixels up to 255


def k_means(points: Tensor, count: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """(n, D) -> `count` centres (count, D). A centre that no point is nearest to stays where it is."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(iterations):
        nearest = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


class Vocabulary:
    """Visual words, learnt from windows drawn from the images."""

    def __init__(self, images: Tensor, count: int, generator: torch.Generator, samples: int = 100_000):
        chosen = images[torch.randperm(len(images), generator=generator)[: samples // 10]]
        points = windows(chosen)
        drawn = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :10]
        points = points.gather(1, drawn[..., None].expand(-1, -1, points.shape[2])).flatten(0, 1)
        self.mean = points.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(points.T))
        self.whitening = axes / (variances.clamp(min=0) + 0.1).sqrt()
        self.words = k_means((points - self.mean) @ self.whitening, count, generator)

    def bags(self, images: Tensor) -> Tensor:
        """How near each word is to an image, by quadrant: (B, 3, 32, 32) uint8 -> (B, 4 * words)."""
        distances = torch.cdist((windows(images) - self.mean) @ self.whitening, self.words)  # [B, 196, words]
        nearness = (distances.mean(-1, keepdim=True) - distances).relu()  # the "triangle" of Coates et al.
        return nearness.unflatten(1, (2, 7, 2, 7)).sum((2, 4)).flatten(1)


def bag_targets(images: Tensor, words: int, components: int, generator: torch.Generator) -> Tensor:
    """What is to be predicted of each image: (N, components) float32, each of variance 1 over the images."""
    vocabulary = Vocabulary(images, words, generator)
    bags = torch.cat([vocabulary.bags(x) + vocabulary.bags(x.flip(-1)) for x in tqdm(images.split(200), desc="bags")])
    bags = (bags - bags.mean(0)) / (bags.std(0) + 1e-6)
    variances, axes = torch.linalg.eigh(bags.T @ bags / len(bags))
    return bags @ (axes[:, -components:] / variances[-components:].sqrt())


@torch.no_grad()
def class_tokens(model: VisionTransformer, images: Tensor, device: torch.device) -> Tensor:
    """What the head of a model reads of uint8 images, all patches, in float32: (N, 192)."""
    model = copy.deepcopy(model).eval()
    model.reset_classifier(0)
    fast = smi_fast.accelerate(model, dtype=torch.float32)
    return torch.cat([fast(normalise(x, device)) for x in tqdm(images.split(500), desc="class tokens")])


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of the multinomial logistic regression on the features, solved to convergence by L-BFGS."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, test_features = (features - mean) / std, (test_features - mean) / std
    head = torch.nn.Linear(features.shape[1], 10, device=features.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (head(test_features).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--words", type=int, default=512, help="of the vocabulary")
    parser.add_argument("--components", type=int, default=64, help="principal components to predict")
    parser.add_argument("--patches", type=int, nargs=2, default=(8, 20), help="fewest and most that a batch keeps")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", action="store_true")
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # vocabulary, order, augmentation and patches
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint_file, log_file = args.out / "checkpoint.state", args.out / "log.jsonl"
    targets_file = args.out / f"targets_{args.words}_{args.components}.state"

    images, labels = read_split(args.data / "train")
    if not targets_file.exists():
        save_state(targets_file, {"targets": bag_targets(images, args.words, args.components, generator)})
    targets = load_state(targets_file)["targets"]
    generator.manual_seed(args.seed + 1)
    model = cifar10_vit(pretrained=False, num_classes=args.components).to(device)
    fast = smi_fast.accelerate(model)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps_per_epoch = len(images) // args.batch_size
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
        first_epoch, seconds = state["epoch"], state["seconds"]
        print(f"going on after epoch {first_epoch}")

    for epoch in range(first_epoch, args.epochs):
        fast.train()
        started, total_loss = time.perf_counter(), torch.zeros((), device=device)
        order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * args.batch_size]
        for index in tqdm(order.split(args.batch_size), desc=f"epoch {epoch + 1}", mininterval=10):
            x = normalise(crop_flip(images[index], generator), device)
            fewest, most = args.patches
            count = int(torch.randint(fewest, most + 1, (), generator=generator))
            keep = torch.rand(len(x), NUM_PATCHES, generator=generator).argsort(1)[:, :count].to(device)
            loss = F.mse_loss(fast(x, keep=keep).float(), targets[index].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
            "generator": generator.get_state(),
        })  # fmt: skip

    model.reset_classifier(10)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    half = {name: value.half().cpu() for name, value in model.state_dict().items()}
    model.to(device).load_state_dict(half)  # what is measured is what is shipped: weights rounded to float16
    test_images, test_labels = read_split(args.data / "test")
    probe = linear_probe(
        class_tokens(model, images[::5], device), labels[::5].to(device),
        class_tokens(model, test_images, device), test_labels.to(device),
    )  # fmt: skip
    figures = {
        "test_accuracy_of_a_linear_probe": probe,
        "labelled_images_of_the_probe": len(labels[::5]),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "recipe": {k: v for k, v in vars(args).items() if k not in ("data", "out", "export", "device")},
    }
    print(json.dumps(figures, indent=1))
    if args.export:
        from safetensors.torch import save_file

        save_file(half, str(MODEL_DIR / "cifar10_student.safetensors"))
        (MODEL_DIR / "cifar10_student.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
