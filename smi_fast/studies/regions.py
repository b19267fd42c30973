"""Table 2: what it changes to invert only the background of an image, or only its foreground."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.backbones.base import frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.inversion.priors import total_variation
from smi_fast.inversion.views import apply_view, random_views
from smi_fast.studies.experiment import Experiment
from smi_fast.studies.page import Section
from smi_fast.studies.paper import TABLE2

COLUMNS = {
    "what is inverted": "", "patches": "d", "loss before": ".2f", "loss after": ".2f", "paper: before": ".2f",
    "paper: after": ".2f",
}  # fmt: skip


def table2(run: Experiment) -> Section:
    s, rows = run.settings, []
    dense = run.inverted(run.dense, 0, s.images)
    images, targets = (dense.images(range(s.region_images)) - run.mean) / run.std, dense.targets[: s.region_images]
    few, patches = run.final_count, run.grid.num_patches
    with frozen(run.fast), torch.no_grad():
        order = run.fast(images.to(run.device), return_attention=True)[1].argsort(1, descending=True)
    regions = {
        "background": order[:, few:],
        f"background, the {few} patches with the least attention": order[:, -few:],
        "foreground": order[:, :few],
        "the whole image": order,
    }
    for name, region in regions.items():
        before, after = run.once(f"region-{name}", lambda region=region: invert_region(run, region, targets))
        rows.append([name, region.shape[1], before, after, *TABLE2.get(name, ("", ""))])
    (background, before), (foreground, _) = ((rows[row][3], rows[row][2]) for row in (0, 2))
    if background > before / 2 > foreground:
        verdict = "Only the foreground can be made to show the class, as in the paper."
    else:
        verdict = "Unlike in the paper, the two do not differ in whether they can be made to show the class."
    return Section(
        "Table 2: inverting only the background or only the foreground",
        f"The foreground of an image consists of the {few} of its {patches} patches that got the most of the class "
        "token's attention in a dense inversion, and the background of the others. From noise, only the pixels of "
        "one of them are then optimised, while the model sees all patches: the classification loss before and after "
        f"{s.inversion.iterations} iterations, as a mean over {s.region_images} images. The paper does not say how "
        "many patches its foreground has.",
        COLUMNS,
        rows,
        [
            f"After inverting the foreground the loss is {foreground:.2f}, after inverting the background "
            f"{background:.2f}. {verdict}"
        ],
    )


def invert_region(run: Experiment, region: Tensor, targets: Tensor) -> list[float]:
    """Optimise only the patches `region` (B, K) of noise images, and return the mean cross-entropy before and after.

    The model sees whole images, so that this is an inversion of images in plain torch, which none of `Inverter`'s
    schedules is.
    """
    settings, grid = run.settings.inversion, run.grid
    fast, device = accelerate(run.model, dtype=run.dtype), run.device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(targets), fast.num_channels, *grid.image_size, generator=generator).to(device)
    pixels.requires_grad_(True)
    shown = grid.mask(region.to(device)).expand_as(pixels)
    views = random_views(
        settings.iterations, grid.image_size, jitter=settings.jitter, flip=settings.flip, generator=generator
    )
    low, high = ((bound - run.mean) / run.std for bound in (0, 1))
    adam, targets = torch.optim.Adam([pixels], settings.lr, settings.betas), targets.to(device)
    with frozen(fast):
        before = _loss(fast, pixels, targets)
        for view in views.tolist():
            loss = F.cross_entropy(fast(apply_view(pixels, view)).float(), targets)
            loss = loss + settings.objective.tv_l2 * total_variation(pixels)
            adam.zero_grad()
            loss.backward()
            pixels.grad.mul_(shown)
            adam.step()
            with torch.no_grad():
                pixels.copy_(torch.where(shown, pixels.clamp(low.to(device), high.to(device)), pixels))
            run.job.signals.check()
        return [before, _loss(fast, pixels, targets)]


@torch.no_grad()
def _loss(fast: AcceleratedViT, pixels: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(fast(pixels).float(), targets).item()
