"""What the published code of Sparse Model Inversion does with patches where it differs from the paper."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from smi_fast.backbones.base import Backbone
from smi_fast.backbones.pruning import Drop, keep_highest
from smi_fast.grid import PatchGrid
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.packed import PackedTokens, all_patches


def check_published(stopping: StoppingSchedule, select: object) -> None:
    """Check that the published code can run in this way.

    Raises:
        ValueError: it cannot. The message names the setting that it does not have.
    """
    if select != "attention":
        raise ValueError(f"published=True selects patches by their attention, got select={select!r}")
    for iteration, stop in stopping.stops.items():
        if not isinstance(stop, float):
            raise ValueError(f"published=True stops a fraction of the patches, got {stop} at iteration {iteration}")
    for first, second in pairwise(stopping.stops):
        if second == first + 1:
            raise ValueError(
                f"published=True cannot stop patches at both iterations {first} and {second}: the published code stops "
                "none in an iteration that measures attention for the next one"
            )


@torch.no_grad()
def importance_of_all(images: Tensor, grid: PatchGrid, backbone: Backbone) -> tuple[PackedTokens, Tensor]:
    """Return all patches of images (B, C, H, W), without values, and their importance (B * N,)."""
    patches = all_patches(len(images), grid.num_patches, images.device)
    values = grid.gather(images, patches).to(backbone.patch_dtype)
    outputs = backbone.outputs(replace(patches, values=values), grid_size=grid.size, importance=True)
    return patches, outputs.importance


def chosen_anew(patches: PackedTokens, importance: Tensor, stopping: StoppingSchedule, prefix: int) -> PackedTokens:
    """Choose the most important of all patches, as many as the schedule leaves of all tokens of an image.

    Of 197 tokens, four stoppings of 30 % leave int(197 * 0.7^4) = 47 patches, one more than the loop ends with, because
    the published code rounds once and counts the class token.

    Args:
        patches, importance: what `importance_of_all` returns.
        prefix: the number of tokens per image that are not patches.
    """
    left = 1.0
    for fraction in stopping.stops.values():
        left *= 1 - fraction
    return keep_highest(patches, importance, Drop(int((patches.max_seqlen + prefix) * left)))
