"""Fine-tune a timm ViT on an ImageFolder, on a CPU or a GPU: a teacher that smi-fast can invert.

    python examples/finetune.py --data DIR --out RUN_DIR --model vit_small_patch14_dinov2 --checkpoint FILE
    smi-fast invert --model vit_small_patch14_dinov2 --checkpoint RUN_DIR/model.safetensors

DIR holds `train/<class>/*` and `test/<class>/*`. The weights come from FILE (safetensors or a torch file, with or
without a head) or with --pretrained from timm's hub. A head of theirs is left out, because the classes are those of
DIR, and the position embedding is resampled to --image-size.

1. Head: a linear probe, which is logistic regression on the features of --probe-images images.
2. All: AdamW with layer decay (Bao et al., ICLR 2022), linear warm-up and then a cosine, label smoothing, mirrored and
   shifted images, bfloat16 autocast. --freeze N leaves the embedding and the first N blocks as they are.

In both stages the model sees a random part of each image's patches (--patch-drop-rate), which saves time.

RUN_DIR receives `log.jsonl` and `checkpoint.state`, from which the same command goes on after a stop. All that is
random in a step follows from the seed and the number of the step, so that a stop does not change the weights. The last
weights are the result: the test split is read once, after the last step, and chooses nothing. `model.safetensors` has
the weights in float16, with the names of the classes and the normalisation, and `figures.json` what they reach.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from train_cifar10 import crop_flip

from smi_fast import WarmupCosine, accelerate, accuracy, load_data
from smi_fast.data.files import first_line, write_json
from smi_fast.data.states import load_state, model_checksum, save_state
from smi_fast.grid import PatchGrid
from smi_fast.models.loading import load_model
from smi_fast.models.weights import read_weights, save_weights
from smi_fast.runs.evaluation import contents
from smi_fast.runs.machine import device_name, versions
from smi_fast.seeds import batch_seed

ORDER, PROBE, STEP = range(3)  # what a seed is for


def make_model(args: argparse.Namespace, classes: list[str]) -> VisionTransformer:
    """Return a ViT for the classes with the pre-trained weights and a random head, its first blocks frozen."""
    model = timm.create_model(
        args.model, pretrained=args.pretrained, img_size=args.image_size, num_classes=len(classes),
        patch_drop_rate=args.patch_drop_rate,
    )  # fmt: skip
    if args.checkpoint is not None:
        load_backbone(model, args.checkpoint)
    size = (args.image_size, args.image_size)
    PatchGrid.of(size, model.patch_embed.patch_size)  # raises an error if patches do not fill the image
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, *size), "label_names": tuple(classes)}
    if args.freeze:
        layers = group_parameters(model, model.group_matcher(), reverse=True)  # 0: the embedding, 1: the first block
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(layers[name] > args.freeze)
    return model.to(args.device)


def load_backbone(model: VisionTransformer, path: Path) -> None:
    """Load all weights but the head's, with the position embedding resampled to the model's grid."""
    weights = {name: value.float() for name, value in read_weights(path).items() if not name.startswith("head.")}
    try:
        missing, unknown = model.load_state_dict(checkpoint_filter_fn(weights, model), strict=False)
    except RuntimeError as error:
        raise SystemExit(f"{path} does not fit the model: {first_line(error)}") from error
    wrong = [f"it lacks {name}" for name in missing if not name.startswith("head.")]
    wrong += [f"the model has no {name}" for name in unknown]
    if wrong:
        raise SystemExit(f"{path} does not fit the model: {wrong[0]}")


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def fit_head(model: VisionTransformer, data: Dataset, args: argparse.Namespace) -> float:
    """Set the head to the logistic regression on features of some images, and return its accuracy on them."""
    generator = torch.Generator().manual_seed(batch_seed(args.seed, PROBE))
    chosen = torch.randperm(len(data), generator=generator)[: args.probe_images].tolist()
    torch.manual_seed(batch_seed(args.seed, PROBE))
    model.eval()
    model.patch_drop.train()  # as many patches as in training
    features, labels = [], []
    for images, y in DataLoader(Subset(data, chosen), args.batch_size, num_workers=args.workers):
        with torch.no_grad(), autocast(args):
            features.append(model.forward_head(model.forward_features(images.to(args.device)), pre_logits=True))
        labels.append(y)
    x, y = torch.cat(features).float(), torch.cat(labels).to(args.device)
    mean, std = x.mean(0), x.std(0) + 1e-6
    head = logistic_regression((x - mean) / std, y, model.num_classes)
    with torch.no_grad():
        model.head.weight.copy_(head.weight / std)
        model.head.bias.copy_(head.bias - model.head.weight @ mean)
        return (model.head(x).argmax(1) == y).float().mean().item()


def logistic_regression(x: Tensor, y: Tensor, classes: int, l2: float = 1e-3) -> torch.nn.Linear:
    """Fit a layer to features (N, C) and labels (N,) by L-BFGS."""
    head = torch.nn.Linear(x.shape[1], classes, device=x.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + l2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def batches(count: int, batch_size: int, steps: range, seed: int) -> Iterator[list[int]]:
    """Yield the numbers of the images of each step. Each epoch has its own order of the `count` images."""
    per_epoch = count // batch_size
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(batch_seed(seed, ORDER, epoch))
        yield torch.randperm(count, generator=generator)[place * batch_size : (place + 1) * batch_size].tolist()


def train_step(
    model: VisionTransformer, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, factor: float,
    args: argparse.Namespace,
) -> Tensor:  # fmt: skip
    """Change the weights after a batch, at a factor of the learning rate, and return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * group["lr_scale"] * factor
    with autocast(args):
        logits = model(images.to(args.device))
    loss = F.cross_entropy(logits.float(), labels.to(args.device), label_smoothing=args.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    return loss.detach()


def fine_tune(model: VisionTransformer, data: Dataset, args: argparse.Namespace) -> dict:
    """Train the head, then all, from where a checkpoint stands. Return the last checkpoint's figures."""
    begins_with = model_checksum(torch.nn.ModuleList([model.patch_embed, model.blocks]))
    settings = recipe(args) | {"checkpoint": begins_with, "data": contents(data, "data")["data_files"]}
    file = args.out / "checkpoint.state"
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay
    )
    if file.exists():
        state = load_state(file)
        if state["recipe"] != settings:
            changed = [name for name, value in settings.items() if state["recipe"].get(name) != value]
            raise SystemExit(f"{file} is of a run with another --{changed[0].replace('_', '-')}")
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        print(f"going on after step {state['step']}", flush=True)
    else:
        state = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "recipe": settings}

    clocks = time.perf_counter(), time.process_time()

    def save(record: dict) -> dict:
        nonlocal clocks
        now = time.perf_counter(), time.process_time()
        seconds, clocks = [after - before for after, before in zip(now, clocks, strict=True)], now
        spent = {"seconds": state["seconds"] + seconds[0], "cpu_seconds": state["cpu_seconds"] + seconds[1]}
        save_state(file, state | record | spent | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        print(json.dumps(record | spent), flush=True)
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record | spent) + "\n")
        return state | record | spent

    if "probe_accuracy" not in state:
        state = save({"step": 0, "probe_accuracy": fit_head(model, data, args)})
    steps = round(args.epochs * (len(data) // args.batch_size))
    schedule, losses = WarmupCosine(min(args.warmup, steps)), []
    remaining = range(state["step"], steps)
    sampler = list(batches(len(data), args.batch_size, remaining, args.seed))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=args.workers)
    model.train()
    for step, (images, labels) in zip(remaining, loader, strict=True):
        seed = batch_seed(args.seed, STEP, step)
        torch.manual_seed(seed)  # which patches are dropped
        images = crop_flip(images, torch.Generator().manual_seed(seed), args.shift)
        losses.append(train_step(model, optimizer, images, labels, schedule(step, steps), args))
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = save({"step": step + 1, "steps": steps, "loss": torch.stack(losses).mean().item()})
            losses.clear()
    return state


def recipe(args: argparse.Namespace) -> dict:
    """Return the options that the weights depend on."""
    free = ("data", "out", "checkpoint", "workers", "save_every", "device")
    return {name: value for name, value in vars(args).items() if name not in free}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True, help="the name of a ViT in timm")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="a file with pre-trained weights")
    weights.add_argument("--pretrained", action="store_true", help="download timm's weights")
    numbers = dict(
        image_size=224, probe_images=2000, epochs=2.0, batch_size=64, lr=1e-4, layer_decay=0.75, weight_decay=0.05,
        warmup=20, label_smoothing=0.1, shift=24, patch_drop_rate=0.5, freeze=0, max_grad_norm=1.0, seed=0,
        save_every=25, workers=0,
    )  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    try:
        classes = ImageFolder(str(args.data / "train")).classes
        model = make_model(args, classes)
        train = load_data(args.data, split="train", model=model)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # timm and files raise any of these
        images = f"{args.image_size}x{args.image_size} pixels of {args.data}"
        raise SystemExit(f"{args.model} cannot learn images of {images}: {first_line(error)}") from error
    if not 1 <= args.batch_size <= len(train):
        raise SystemExit(f"--batch-size: {args.batch_size} is not 1 to {len(train)}, the images of an epoch")
    state = fine_tune(model, train, args)

    config, file = model.pretrained_cfg, args.out / "model.safetensors"
    size = (args.image_size, args.image_size)
    save_weights(file, model.half(), classes=classes, mean=config["mean"], std=config["std"], image_size=size)
    model = load_model(args.model, checkpoint=file).to(args.device)  # what is measured is what is in the file
    test = DataLoader(load_data(args.data, split="test", model=model), args.batch_size, num_workers=args.workers)
    figures = {
        "test_accuracy": accuracy(accelerate(model, dtype=getattr(torch, args.dtype)), test), "classes": classes,
        **state, "device": device_name(torch.device(args.device)), "threads": torch.get_num_threads(),
        "versions": versions(),
    }  # fmt: skip
    write_json(args.out / "figures.json", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
