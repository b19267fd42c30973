"""What is minimised: loss terms, and the ready-made objectives made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.kernels.gradients import first_order
from smi_fast.kernels.pixels import variation_of_tiles
from smi_fast.kernels.rows import sequence_of_tokens
from smi_fast.packed import PackedTokens

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Objective(Protocol):
    """A loss that is told which pixels are kept; a plain function of (logits, images, targets) does as well."""

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: KeptPixels | None) -> Tensor:
        """The scalar to minimise.

        Args:
            logits: (B, num_classes), of the images seen through this iteration's view.
            images: (B, C, H, W) float32 in the model's normalised space, in the plain view.
            targets: (B,) int64.
            kept: the pixels that are still inverted; `kept.mask` has them as (B, 1, H, W). None: all of them.
        """
        ...


class KeptPixels:
    """The pixels of the patches that are still inverted.

    Args:
        keep: the kept patches, (B, K) int64, or packed where images keep different numbers.
        grid_size: (rows, columns) of the patch grid.
        patch_size: (height, width) of a patch in pixels.
    """

    def __init__(self, keep: Tensor | PackedTokens, grid_size: tuple[int, int], patch_size: tuple[int, int]):
        self.keep = PackedTokens.from_batch(None, keep) if isinstance(keep, Tensor) else keep
        self.grid_size, self.patch_size = grid_size, patch_size

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column in the patch grid of each kept patch, (T,) int64 each."""
        image = sequence_of_tokens(self.keep.cu_seqlens, len(self.keep.positions))
        positions = self.keep.positions.long()
        return image, positions // self.grid_size[1], positions % self.grid_size[1]

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, H, W) bool, True where a pixel is kept."""
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        image, row, column = self.places
        mask = torch.zeros(self.keep.batch_size * rows * columns, dtype=torch.bool, device=image.device)
        mask.index_fill_(0, (image * rows + row) * columns + column, True)
        mask = mask.view(-1, 1, rows, 1, columns, 1).expand(-1, -1, -1, height, -1, width)
        return mask.reshape(-1, 1, rows * height, columns * width)

    @cached_property
    def mask_tiles(self) -> Tensor:
        """(T, 1, ph + 2, pw + 2) bool, which pixels of `halo_tiles` are kept."""
        return self.halo_tiles(self.mask)

    def halo_tiles(self, images: Tensor) -> Tensor:
        """Kept patches with one pixel around them, zero beyond the image: (B, C, H, W) -> (T, C, ph + 2, pw + 2)."""
        (height, width), (image, row, column) = self.patch_size, self.places
        windows = F.pad(images, (1, 1, 1, 1)).unfold(2, height + 2, height).unfold(3, width + 2, width)
        return windows[image, :, row, column]

    def scatter(self, patches: Tensor, images: Tensor) -> Tensor:
        """Write patches (T, C, ph, pw) into their places in images (B, C, H, W), which is returned."""
        image, row, column = self.places
        self._tiled(images)[image, :, row, :, column] = patches
        return images

    def gather(self, images: Tensor) -> Tensor:
        """The kept patches of images (B, C, H, W): (T, C, ph, pw)."""
        image, row, column = self.places
        return self._tiled(images)[image, :, row, :, column]

    def _tiled(self, images: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        return images.view(*images.shape[:2], rows, height, columns, width)


def total_variation(images: Tensor, kept: KeptPixels | None = None) -> Tensor:
    """Sum over four neighbour directions of the l2 norm, over the whole batch, of the differences.

    The image prior of DeepInversion (Yin et al., CVPR 2020) as the published sparse inversion uses it. The gradient is
    0 in a direction whose norm is 0. Stopped patches are not read.

    Args:
        images: (B, C, H, W).
        kept: only pairs of pixels that are both kept count. None: all.

    Returns:
        A scalar.

    Raises:
        RuntimeError: (its backward pass) under create_graph=True; the gradient has one order.
    """
    return _TotalVariation.apply(images, kept)


class _TotalVariation(torch.autograd.Function):
    """Value and gradient in one pass over tiles that overlap by a pixel, so that no pair needs a neighbouring tile."""

    @staticmethod
    def forward(ctx, images: Tensor, kept: KeptPixels | None) -> Tensor:
        if kept is None:  # one tile an image, with nothing kept around it
            tiles = F.pad(images, (1, 1, 1, 1))
            mask = F.pad(images.new_ones(1, 1, *images.shape[2:], dtype=torch.bool), (1, 1, 1, 1))
        else:
            tiles, mask = kept.halo_tiles(images), kept.mask_tiles
        total, grad = variation_of_tiles(tiles, mask, 1.0)
        ctx.save_for_backward(grad)
        ctx.shape, ctx.kept = images.shape, kept
        return total

    @staticmethod
    @first_order
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, None]:
        grad = ctx.saved_tensors[0] * grad_total
        return grad if ctx.kept is None else ctx.kept.scatter(grad, grad.new_zeros(ctx.shape)), None


def l2_norm(x: Tensor) -> Tensor:
    """The l2 norm of all elements together, with gradient 0 (not NaN) at 0."""
    squared = x.square().sum()
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


@dataclass(frozen=True)
class deep_inversion:
    """Mean cross-entropy + tv_l2 * total variation + l2 * norm, the objective of DeepInversion for ViTs.

    Defaults are those of Sparse Model Inversion (ICML 2024). Both priors see kept pixels of the plain image only.
    """

    tv_l2: float = 1e-4
    l2: float = 0.0

    def classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The term that needs the model. The others `Inverter` leaves to `kernels.pixel_step`."""
        return F.cross_entropy(logits.float(), targets)

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: KeptPixels | None) -> Tensor:
        loss = self.classification(logits, targets)
        if self.tv_l2:
            loss = loss + self.tv_l2 * total_variation(images, kept)
        if self.l2:
            loss = loss + self.l2 * l2_norm(images if kept is None else images * kept.mask)
        return loss


def as_objective(objective: Objective | Loss) -> Objective:
    """An objective out of an objective or a plain function of (logits, images, targets).

    Raises:
        TypeError: neither.
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise TypeError(
            f"an objective is a function of (logits, images, targets) or has a method loss, got {objective!r}"
        )
    return _UserLoss(objective)


@dataclass(frozen=True)
class _UserLoss:
    function: Loss

    def loss(self, logits: Tensor, images: Tensor, targets: Tensor, kept: KeptPixels | None) -> Tensor:
        return self.function(logits, images, targets)
