"""A dense inversion loop of your own, and the same loop made sparse by five changed lines.

    python examples/plug_and_play.py [--iterations 200] [--classes 0,1,2] [--seed 0]

`invert_dense` is a loop as one writes it: own noise, own jitter, own loss, torch.optim.Adam on whole images. It knows
nothing of patches. `invert_sparse` differs, but for its name and the import of smi_fast, in these lines:

1. The model is accelerated, a schedule says when patches are stopped, and all are still kept.
2. At a stopping
3. those patches are kept that had the most of the class token's attention in the iteration before.
4. A stopped pixel gets the value that it has as its lower and its upper bound. The model gives it no gradient any more,
   unless a jittered neighbour borrows it, but Adam's momentum and a loss that sees the whole image would go on moving
   it; the clamp at the loop's end puts it back, bit for bit.
5. The model is told which patches are kept, and the jitter as a view in the place of a rolled image: so `keep` and the
   attention belong to the patches of the image itself, whatever the offset. A flip would be the view's third number.

To have `keep` for later, return it too.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast import StoppingSchedule, accelerate, select_patches
from smi_fast.backbones.base import class_names
from smi_fast.models.loading import load_model


def jitter(side: int, generator: torch.Generator) -> tuple[int, int]:
    """Offsets (dy, dx) of up to an eighth of the image's side."""
    return tuple(torch.randint(-(side // 8), side // 8 + 1, (2,), generator=generator).tolist())


def own_loss(logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, and neighbouring pixels shall differ little."""
    roughness = images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()
    return F.cross_entropy(logits, targets) + 0.05 * roughness


def invert_dense(model: nn.Module, targets: Tensor, iterations: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Images (B, 3, H, W), normalised as the model wants them, the last logits (B, classes), losses (iterations,)."""
    embed, generator, device = model.patch_embed, torch.Generator().manual_seed(seed), targets.device
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    bounds = torch.stack(((0 - mean) / std, (1 - mean) / std))
    images = torch.randn(len(targets), 3, *embed.img_size, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.99))
    losses = torch.zeros(iterations)
    for iteration in range(iterations):
        dy, dx = jitter(embed.img_size[0], generator)
        logits = model(images.roll((dy, dx), dims=(2, 3)))
        loss = own_loss(logits, images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images.data.clamp_(*bounds)
        losses[iteration] = loss.item()
    return images.detach(), logits.detach(), losses


def invert_sparse(model: nn.Module, targets: Tensor, iterations: int, seed: int = 0) -> tuple[Tensor, ...]:
    """As `invert_dense`; the logits are those of the kept patches."""
    embed, generator, device = model.patch_embed, torch.Generator().manual_seed(seed), targets.device
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    bounds = torch.stack(((0 - mean) / std, (1 - mean) / std))
    images = torch.randn(len(targets), 3, *embed.img_size, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.99))
    losses = torch.zeros(iterations)
    fast, schedule, keep, attention = accelerate(model), StoppingSchedule.paper(iterations), None, None
    for iteration in range(iterations):
        dy, dx = jitter(embed.img_size[0], generator)
        if iteration in schedule.stops:
            keep = select_patches(attention, keep, fraction=schedule.stops[iteration])
            bounds = torch.where(fast.grid(embed.img_size).mask(keep), bounds, images.detach())
        logits, attention = fast(images, keep=keep, view=torch.tensor((dy, dx, 0)).to(device), return_attention=True)
        loss = own_loss(logits, images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images.data.clamp_(*bounds)
        losses[iteration] = loss.item()
    return images.detach(), logits.detach(), losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A dense inversion loop beside the same loop made sparse.")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--classes", default="0,1,2,3,4,5,6,7,8,9", help="classes of CIFAR-10 to invert, by number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model().to(device).requires_grad_(False)
    targets = torch.tensor([int(number) for number in args.classes.split(",")], device=device)
    patches = model.patch_embed.num_patches
    kept = [patches, *StoppingSchedule.paper(args.iterations).patches(patches).values()][-1]
    print("inverting", ", ".join(class_names(model)[target] for target in targets))
    print("confidence in them is that of the last iteration, as the loop saw it")
    for name, invert, count in (("dense", invert_dense, patches), ("sparse", invert_sparse, kept)):
        started = time.perf_counter()
        _, logits, _ = invert(model, targets, args.iterations, args.seed)
        confidence = logits.float().softmax(1).gather(1, targets[:, None]).mean().item()
        seconds = time.perf_counter() - started
        print(f"{name:<8}{seconds:6.1f} s   confidence {confidence:.3f}   {count} of {patches} patches in the end")


if __name__ == "__main__":
    main()
