"""Views of an image during inversion: jitter and flip, for pixels and for patch indices alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smi_fast.kernels import view_cells

__all__ = ["apply_view", "random_views", "view_cells"]


Views = Callable[[int, torch.Generator], Tensor]  # a function of the number of iterations and of a generator


def random_views(
    count: int,
    image_size: tuple[int, int],
    *,
    jitter: float | int = 1 / 8,
    flip: float = 0.5,
    generator: torch.Generator,
    multiple: int = 1,
) -> Tensor:
    """Draw `count` views (dy, dx, flip), as the published code does.

    Args:
        image_size: (H, W) in pixels.
        jitter: offsets are uniform over the integers from -int(side * jitter) to int(side * jitter), both included, or
            from -jitter to jitter if it is an integer.
        flip: the probability that a view is mirrored.
        multiple: offsets are the multiples of this number among these.

    Returns:
        (count, 3) int32 on the CPU.
    """
    views = torch.zeros(count, 3, dtype=torch.int32)
    for axis, side in enumerate(image_size):
        limit = (jitter if isinstance(jitter, int) else int(side * jitter)) // multiple
        views[:, axis] = multiple * torch.randint(-limit, limit + 1, (count,), generator=generator)
    views[:, 2] = torch.rand(count, generator=generator) < flip
    return views


def apply_view(images: Tensor, view: tuple[int, int, int]) -> Tensor:
    """Return whole images (B, C, H, W) as they are seen through one view: rolled by (dy, dx), then mirrored left-right.

    The accelerated model never makes these images. They define what the model sees.
    """
    dy, dx, flip = view
    rolled = images.roll((int(dy), int(dx)), dims=(2, 3))
    return rolled.flip(3) if flip else rolled
