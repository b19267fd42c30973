"""An ablation of ours: how much a model loses when patches are removed from its images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from smi_fast.backbones.base import frozen
from smi_fast.backbones.pruning import kept_count
from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.studies.experiment import Experiment, split
from smi_fast.studies.page import Section

REMOVALS = {  # maps what is removed to a function that takes patches sorted by rising attention and returns the rest
    "background": lambda order, count: order[:, -count:],
    "foreground": lambda order, count: order[:, :count],
    "random patches": lambda order, count: order.gather(1, torch.rand(order.shape).argsort(1).to(order)[:, :count]),
}


def removal(run: Experiment) -> Section:
    s, rows = run.settings, []
    sets = [run.inverted(run.dense, number, s.images) for number in range(s.seeds)]
    inverted = [((dataset.images() - run.mean) / run.std, dataset.targets) for dataset in sets]
    num_patches = run.grid.num_patches
    counts = (kept_count(num_patches, 0.3), run.final_count)
    for source, batches in (("real test images", run.test(s.removal_images)), ("dense inverted images", inverted)):
        losses = partial(removal_losses, run.fast, run.watched(batches), counts)
        whole, *parts = run.once(f"removal-{source}", losses)
        rows.append([source, "nothing", num_patches, *whole])
        rows += [[source, what, n, *part] for (n, what), part in zip(product(counts, REMOVALS), parts, strict=True)]
    return Section(
        "An ablation of ours: removing background or foreground patches",
        "Cross-entropy and accuracy on what is left of an image when the patches with the least (background) or the "
        "most (foreground) of the class token's attention, or random ones, are removed. The images are "
        f"{split(s.removal_images)} and {s.seeds * s.images} dense inverted images.",
        {"images": "", "removed": "", "patches left": "d", "loss": ".3f", "accuracy, %": ".2f"},
        rows,
    )


@torch.no_grad()
def removal_losses(
    fast: AcceleratedViT, batches: Iterable[tuple[Tensor, Tensor]], counts: Sequence[int]
) -> list[list[float]]:
    """Measure the mean cross-entropy and accuracy in % on whole images, then for each count of patches that is left and
    each removal: 1 + len(counts) * len(REMOVALS) pairs. Batches are normalised images (B, C, H, W) and classes (B,).
    """
    total, images = 0, 0
    with frozen(fast), torch.random.fork_rng():
        torch.manual_seed(0)
        for x, y in batches:
            x = x.to(fast.device)
            logits, attention = fast(x, return_attention=True)
            order = attention.argsort(1)
            parts = [fast(x, keep=remove(order, count)) for count, remove in product(counts, REMOVALS.values())]
            logits = torch.stack((logits, *parts)).double().cpu()  # (1 + parts, B, classes)
            loss = -logits.log_softmax(2)[:, torch.arange(len(y)), y]
            total = total + torch.stack((loss, 100.0 * (logits.argmax(2) == y)), 2).sum(1)
            images += len(y)
    return (total / images).tolist()
