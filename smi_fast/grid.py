"""PatchGrid: the one place that knows how an image and its patches correspond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smi_fast.kernels import patch_sites
from smi_fast.packed import PackedTokens, all_patches


@dataclass(frozen=True)
class PatchGrid:
    """Images of (H, W) pixels, cut into rows and columns of equal patches.

    Patches are numbered row by row from 0. The pixels of a patch are C * ph * pw values in the order (C, ph, pw) of a
    convolution's weight. `keep` stands for the kept patches of B images, as `pack_keep` returns them.

    Args:
        rows, columns: patches along an image's height and width.
        patch_size: (height, width) of a patch in pixels.
    """

    rows: int
    columns: int
    patch_size: tuple[int, int]

    @staticmethod
    def of(image_size: Sequence[int], patch_size: Sequence[int]) -> PatchGrid:
        """Return the grid of images of (H, W) pixels.

        Raises:
            ValueError: the patches do not divide the images. The message names both sizes.
        """
        (height, width), (ph, pw) = image_size, patch_size
        if min(ph, pw) < 1 or height % ph or width % pw:
            raise ValueError(f"images of {height}x{width} pixels are not divided by patches of {ph}x{pw}")
        return PatchGrid(height // ph, width // pw, (ph, pw))

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.rows * self.patch_size[0], self.columns * self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    def tiles(self, images: Tensor) -> Tensor:
        """View images (B, C, H, W) as patches (B, rows, columns, C, ph, pw), without a copy.

        Raises:
            RuntimeError: torch cannot view images with these strides. Contiguous images always work.
        """
        (ph, pw), (batch, channels) = self.patch_size, images.shape[:2]
        return images.view(batch, channels, self.rows, ph, self.columns, pw).permute(0, 2, 4, 1, 3, 5)

    def places(self, keep: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image, the row and the column of each kept patch, (T,) int64 each."""
        positions = keep.positions.long()
        return keep.owners(), positions // self.columns, positions % self.columns

    def sites(self, keep: PackedTokens) -> Tensor:
        """Return (T, 4) int32: where each kept patch lies and which of its neighbours are kept, for
        `kernels.pixel_step`."""
        return patch_sites(keep.positions, keep.cu_seqlens, self.size)

    def gather(self, images: Tensor, keep: PackedTokens) -> Tensor:
        """Return the pixels (T, C * ph * pw) of the kept patches of images (B, C, H, W)."""
        return self.tiles(images.contiguous())[self.places(keep)].flatten(1)

    def scatter(self, patches: Tensor, keep: PackedTokens, images: Tensor) -> Tensor:
        """Write the pixels (T, C * ph * pw) of the kept patches into images (B, C, H, W), and return the images."""
        tiles = self.tiles(images)
        tiles[self.places(keep)] = patches.view(-1, *tiles.shape[3:])
        return images

    def mask(self, keep: PackedTokens | Tensor) -> Tensor:
        """Return (B, 1, H, W) bool, True where a pixel is kept. Here `keep` may also be patch indices (B, K)."""
        keep = PackedTokens.from_batch(None, keep) if isinstance(keep, Tensor) else keep
        image, row, column = self.places(keep)
        mask = torch.zeros(keep.batch_size * self.num_patches, dtype=torch.bool, device=image.device)
        mask.index_fill_(0, (image * self.rows + row) * self.columns + column, True)
        (ph, pw), mask = self.patch_size, mask.view(-1, 1, self.rows, 1, self.columns, 1)
        return mask.expand(-1, -1, -1, ph, -1, pw).reshape(-1, 1, *self.image_size)

    def recut(self, patches: PackedTokens, grid: PatchGrid) -> PackedTokens:
        """Cut whole images, given as all their patches (T, C * ph * pw) in this grid, into the patches of another grid.

        Raises:
            ValueError: a patch is missing, or the grids are of images of different sizes.
        """
        if grid == self:
            return patches
        if len(patches.positions) != patches.batch_size * self.num_patches or grid.image_size != self.image_size:
            raise ValueError(
                f"only whole images of {self.image_size[0]}x{self.image_size[1]} pixels can be cut into {grid.rows}x"
                f"{grid.columns} patches of {grid.patch_size[0]}x{grid.patch_size[1]}, and "
                f"{len(patches.positions)} patches of {patches.batch_size} images are given"
            )
        values, batch = patches.values, patches.batch_size
        images = values.new_zeros(batch, values.shape[1] // math.prod(self.patch_size), *self.image_size)
        images = self.scatter(values, patches, images)
        keep = all_patches(batch, grid.num_patches, values.device)
        return replace(keep, values=grid.tiles(images).reshape(len(keep.positions), -1))

    def mirrored(self, positions: Tensor) -> Tensor:
        """Return where the patches at `positions` lie once their image is mirrored left-right."""
        return positions + (self.columns - 1) - 2 * (positions % self.columns)
