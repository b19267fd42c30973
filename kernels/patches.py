"""Pixels of kept patches, seen through a jitter/flip view -> patch matrix, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import resolve_backend
from .rows import gather_rows, sequence_of_tokens


def gather_patches(
    images: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    view: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int],
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The patches at `positions` of B images, cut out of the images as seen through a view.

    The viewed image is the image rolled by (dy, dx) and then, if flip, mirrored left-right; a patch is cut out at the
    cell that `view_cells` maps its position to. The viewed image is never stored.

    Args:
        images: (B, C, H, W) float32. The gradient flows to the pixels that were read; it is zero elsewhere.
        positions: (T,) int32 patch-grid indices, row-major, packed by image; no two of an image are equal.
        cu_seqlens: (B + 1,) int32 cumulative counts: image b has `positions[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        view: (dy, dx, flip), int32 or int64: (3,) for all images or (B, 3); None is the plain view. Read on its device.
        patch_size: (ph, pw), which divide (H, W).
        dtype: of the patches; that of the images by default.
        backend: "auto", "triton" or "torch".

    Returns:
        patches (T, C * ph * pw) in the order of a convolution's weight (C, ph, pw), and cells (T,) int32, the grid cell
        that each was cut out at (for the position embedding).

    Raises:
        ValueError: a shape, dtype, device or size outside of the above.
    """
    patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    _check_patches(images, positions, cu_seqlens, view, patch_size)
    return patches_reference(images, positions, cu_seqlens, view, patch_size, dtype or images.dtype)


def _check_patches(images, positions, cu_seqlens, view, patch_size) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images is {tuple(images.shape)} {images.dtype}, not (batch, channels, height, width) of floats")
    batch, _, height, width = images.shape
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {patch_size[0]}x{patch_size[1]}")
    if positions.dim() != 1 or positions.dtype != torch.int32:
        raise ValueError(f"positions is {tuple(positions.shape)} {positions.dtype}, not (tokens,) torch.int32")
    if cu_seqlens.shape != (batch + 1,) or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not ({batch + 1},) torch.int32")
    if view is not None:
        if view.shape not in ((3,), (batch, 3)):
            raise ValueError(f"view has shape {tuple(view.shape)}, not (3,) or ({batch}, 3)")
        if view.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"view has dtype {view.dtype}, not torch.int32 or torch.int64")
    for name, tensor in (("positions", positions), ("cu_seqlens", cu_seqlens), ("view", view)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}")


def view_cells(positions: Tensor, view: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The grid cell that each patch is seen in: the nearest to where its centre went, wrapping; one to one.

    Args:
        positions: (...) patch-grid indices, row-major.
        view: (..., 3) (dy, dx, flip), of a shape that broadcasts with positions.
        grid_size: (rows, columns) of the patch grid.
        patch_size: (ph, pw) in pixels.

    Returns:
        (...) cells of the dtype of positions.
    """
    (rows, columns), (ph, pw) = grid_size, patch_size
    dy, dx, flip = view.unbind(-1)
    # floor(offset / patch + 1/2) in integers; an offset by the whole image changes nothing.
    down = (2 * (dy % (rows * ph)) + ph) // (2 * ph)
    right = (2 * (dx % (columns * pw)) + pw) // (2 * pw)
    row = (positions // columns + down) % rows
    column = (positions % columns + right) % columns
    return (row * columns + torch.where(flip != 0, columns - 1 - column, column)).to(positions.dtype)


def patches_reference(
    images: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    view: Tensor | None,
    patch_size: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What `gather_patches` means, in plain torch."""
    batch, channels, height, width = images.shape
    (ph, pw), tokens, device = patch_size, len(positions), images.device
    columns = width // pw
    image = sequence_of_tokens(cu_seqlens, tokens)  # (T,)
    planes = image[:, None] * channels + torch.arange(channels, device=device)  # (T, C)
    if view is None:
        cells = positions.clone()
        y = (cells // columns * ph)[:, None] + torch.arange(ph, device=device)  # (T, ph)
        # A row of a patch is a run of pw pixels, run x of them in its row of the image.
        x = cells % columns
        runs = (planes[:, :, None] * height + y[:, None]) * columns + x[:, None, None]  # (T, C, ph)
        patches = gather_rows(images.reshape(-1, pw), runs.flatten())
    else:
        view = view.expand(batch, 3)[image]  # (T, 3)
        cells = view_cells(positions, view, (height // ph, columns), patch_size)
        dy, dx, flip = view.unbind(1)
        y = (cells // columns * ph)[:, None] + torch.arange(ph, device=device)  # (T, ph) in the viewed image
        x = (cells % columns * pw)[:, None] + torch.arange(pw, device=device)  # (T, pw)
        x = torch.where(flip[:, None] != 0, width - 1 - x, x)
        y = (y - dy[:, None]) % height  # in the image
        x = (x - dx[:, None]) % width
        rows = planes[:, :, None] * height + y[:, None]  # (T, C, ph)
        pixels = rows[..., None] * width + x[:, None, None]  # (T, C, ph, pw)
        patches = gather_rows(images.reshape(-1), pixels.flatten())
    return patches.view(tokens, channels * ph * pw).to(dtype), cells
