"""Pixels of kept patches, seen through a jitter/flip view -> patch matrix, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import cdiv, jit, launch, resolve_backend, tl
from .dispatch import choose
from .gradients import first_order
from .rows import gather_rows, sequence_of_tokens


def gather_patches(
    images: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    view: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int],
    dtype: torch.dtype | None = None,
    return_inverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
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
        return_inverse: return the inverse of cells too.
        backend: "auto", "triton" or "torch".

    Returns:
        patches (T, C * ph * pw) in the order of a convolution's weight (C, ph, pw), and cells (T,) int32, the grid cell
        that each was cut out at (for the position embedding). With `return_inverse` also (B, rows, columns) int32, the
        row of `patches` that was cut out at each cell, or -1, as `pixel_step` takes it.

    Raises:
        ValueError: a shape, dtype, device or size outside of the above.
    """
    patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    _check_patches(images, positions, cu_seqlens, view, patch_size)
    if resolve_backend(backend, images.device) == "torch":
        patches, cells = patches_reference(images, positions, cu_seqlens, view, patch_size, dtype or images.dtype)
        grid_size = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
        inverse = inverse_reference(cells, cu_seqlens, grid_size) if return_inverse else None
    else:
        patches, cells, inverse = gather_patches_op(
            images, positions, cu_seqlens, view, *patch_size, dtype or images.dtype
        )
    return (patches, cells, inverse) if return_inverse else (patches, cells)


def check_images(images: Tensor, patch_size: tuple[int, int]) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images is {tuple(images.shape)} {images.dtype}, not floats (batch, channels, height, width)")
    height, width = images.shape[2:]
    ph, pw = patch_size
    if ph < 1 or pw < 1 or height % ph or width % pw:
        raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {ph}x{pw}")


def check_view(view: Tensor, batch: int) -> None:
    if view.shape not in ((3,), (batch, 3)):
        raise ValueError(f"view has shape {tuple(view.shape)}, not (3,) or ({batch}, 3)")
    if view.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"view has dtype {view.dtype}, not torch.int32 or torch.int64")


def _check_patches(images, positions, cu_seqlens, view, patch_size) -> None:
    check_images(images, patch_size)
    batch = len(images)
    if positions.dim() != 1 or positions.dtype != torch.int32:
        raise ValueError(f"positions is {tuple(positions.shape)} {positions.dtype}, not (tokens,) torch.int32")
    if cu_seqlens.shape != (batch + 1,) or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not ({batch + 1},) torch.int32")
    if view is not None:
        check_view(view, batch)
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


def inverse_reference(cells: Tensor, cu_seqlens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The row (B, rows, columns) int32 of the patch that lies in each cell, -1 where none does."""
    batch, size = len(cu_seqlens) - 1, grid_size[0] * grid_size[1]
    inverse = torch.full((batch * size,), -1, dtype=torch.int32, device=cells.device)
    taken = sequence_of_tokens(cu_seqlens, len(cells)) * size + cells
    rows = torch.arange(len(cells), dtype=torch.int32, device=cells.device)
    return inverse.scatter_(0, taken, rows).view(batch, *grid_size)


@jit
def _modulo(a, n):
    """a modulo n in 0..n-1, also for negative a."""
    return ((a % n) + n) % n


@jit
def wrap(a, n):
    """a modulo n for a of 0..2n-1: below n, a - n is beyond any a as an unsigned integer."""
    return tl.minimum(a.to(tl.uint32), (a - n).to(tl.uint32)).to(tl.int32)


@jit
def load_view(view, image, stride_image, height, width):
    """dy in 0..height-1, dx in 0..width-1 and whether to mirror."""
    view += image * stride_image
    dy = _modulo(tl.load(view), height).to(tl.int32)
    dx = _modulo(tl.load(view + 1), width).to(tl.int32)
    return dy, dx, tl.load(view + 2) != 0


@jit
def _cell(
    position, dy, dx, flip,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Row and column of `view_cells`, for offsets of 0..height-1 and 0..width-1."""
    row, column = position // COLUMNS, position % COLUMNS
    if VIEW:
        row = wrap(row + (2 * dy + PH) // (2 * PH), ROWS)
        column = wrap(column + (2 * dx + PW) // (2 * PW), COLUMNS)
        column = tl.where(flip, COLUMNS - 1 - column, column)
    return row, column


@jit
def _pixel_offsets(
    row, column, e, dy, dx, flip, stride_channel, stride_y, stride_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Where in its image [BT, BE] the elements [BE] lie of the patches that the viewed image has in some cells [BT]."""
    height, width = ROWS * PH, COLUMNS * PW
    y, x = row * PH, column * PW  # [BT], the first pixel of the patch
    along_y, along_x = e // PW % PH, e % PW  # [BE]
    within = (e // (PH * PW)).to(tl.int64) * stride_channel  # [BE]
    if VIEW:
        y = wrap(y + height - dy, height)  # [BT], in the image
        x = wrap(tl.where(flip, width - PW - x, x) + width - dx, width)
        along_x = tl.where(flip, PW - 1 - along_x, along_x)
        y, x = y[:, None] + along_y[None, :], x[:, None] + along_x[None, :]  # [BT, BE]
        y, x = wrap(y, height), wrap(x, width)
        pixels = within[None, :] + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        within += along_y.to(tl.int64) * stride_y + along_x.to(tl.int64) * stride_x
        pixels = (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None] + within[None, :]
    return pixels


@jit
def _gather_kernel(
    patches,
    cells,
    inverse,
    images,
    positions,
    cu_seqlens,
    view,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    view_stride_image,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VIEW: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Reads and writes each of T C PH PW pixels once, and writes two integers a patch and one a cell; no arithmetic but
    addresses."""
    image = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + image).to(tl.int64)
    count = (tl.load(cu_seqlens + image + 1) - start).to(tl.int32)
    dy, dx, flip = 0, 0, False
    if VIEW:
        dy, dx, flip = load_view(view, image, view_stride_image, ROWS * PH, COLUMNS * PW)
    first = tl.program_id(1) * BT
    if first == 0:
        inverse += image * (ROWS * COLUMNS)
        for g in range(0, ROWS * COLUMNS, BE):
            cell = g + tl.arange(0, BE)  # [BE]
            tl.store(inverse + cell, -1, mask=cell < ROWS * COLUMNS)
        tl.debug_barrier()  # what follows overwrites what other threads stored
        for g in range(0, count, BE):
            t = g + tl.arange(0, BE)  # [BE]
            position = tl.load(positions + start + t, mask=t < count, other=0)
            row, column = _cell(position, dy, dx, flip, ROWS, COLUMNS, PH, PW, VIEW)
            cell = row * COLUMNS + column
            tl.store(cells + start + t, cell, mask=t < count)
            tl.store(inverse + cell, (start + t).to(tl.int32), mask=t < count)
    if first >= count:
        return
    t = first + tl.arange(0, BT)  # [BT]
    position = tl.load(positions + start + t, mask=t < count, other=0)
    row, column = _cell(position, dy, dx, flip, ROWS, COLUMNS, PH, PW, VIEW)
    images += image * stride_image
    patches += (start + t)[:, None] * (C * PH * PW)  # [BT, 1]
    # Flat where pixels lie apart, so that neighbouring threads take neighbouring ones; else a thread takes 16 bytes.
    SHAPE: tl.constexpr = [BT * BE] if VIEW else [BT, BE]
    for block in range(0, C * PH * PW, BE):
        e = block + tl.arange(0, BE)  # [BE], elements of a patch in the order (C, PH, PW)
        mask = (t < count)[:, None] & (e < C * PH * PW)[None, :]  # [BT, BE]
        source = _pixel_offsets(
            row, column, e, dy, dx, flip, stride_channel, stride_y, stride_x, ROWS, COLUMNS, PH, PW, VIEW
        )
        pixels = tl.load(images + tl.reshape(source, SHAPE), mask=tl.reshape(mask, SHAPE))
        pixels = tl.reshape(pixels, [BT, BE])
        tl.store(patches + e[None, :], pixels.to(patches.dtype.element_ty), mask=mask)


@jit
def _gather_backward_kernel(
    grad,
    patch_grad,
    inverse,
    view,
    view_stride_image,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VIEW: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Reads the T C PH PW gradients of the patches once and writes those of all B C H W pixels once; no arithmetic but
    addresses."""
    image = tl.program_id(0).to(tl.int64)
    height, width = ROWS * PH, COLUMNS * PW
    dy, dx, flip = 0, 0, False
    if VIEW:
        dy, dx, flip = load_view(view, image, view_stride_image, height, width)
    cell = tl.program_id(1) * BT + tl.arange(0, BT)  # [BT]
    in_grid = cell < ROWS * COLUMNS  # [BT]
    token = tl.load(inverse + image * (ROWS * COLUMNS) + cell, mask=in_grid, other=-1).to(tl.int64)  # [BT]
    grad += image * (C * height * width)
    patch_grad += token[:, None] * (C * PH * PW)  # [BT, 1]
    # Flat where pixels lie apart, so that neighbouring threads take neighbouring ones; else a thread takes 16 bytes.
    SHAPE: tl.constexpr = [BT * BE] if VIEW else [BT, BE]
    for block in range(0, C * PH * PW, BE):
        e = block + tl.arange(0, BE)  # [BE], elements of a patch in the order (C, PH, PW)
        in_patch = (e < C * PH * PW)[None, :]  # [1, BE]
        pixels = tl.load(patch_grad + e[None, :], mask=(token >= 0)[:, None] & in_patch, other=0.0)  # [BT, BE]
        target = _pixel_offsets(
            cell // COLUMNS, cell % COLUMNS, e, dy, dx, flip, height * width, width, 1, ROWS, COLUMNS, PH, PW, VIEW
        )
        mask = in_grid[:, None] & in_patch  # [BT, BE]
        pixels = tl.reshape(pixels.to(grad.dtype.element_ty), SHAPE)
        tl.store(grad + tl.reshape(target, SHAPE), pixels, mask=tl.reshape(mask, SHAPE))


def view_stride(view: Tensor | None) -> int:
    """From one image's view to the next: 0 where all share one."""
    return view.stride(0) if view is not None and view.dim() == 2 else 0


def launch_gather_patches(
    images: Tensor, positions: Tensor, cu_seqlens: Tensor, view: Tensor | None, ph: int, pw: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The patches (T, C * ph * pw), their cells (T,), and the inverse map (B, rows, columns): the row of the patch that
    is seen in each cell, -1 where none is."""
    batch, channels, _, _ = images.shape
    patches, cells, inverse = _fake_gather_patches(images, positions, cu_seqlens, view, ph, pw, dtype)
    _, rows, columns = inverse.shape
    if inverse.numel():
        view = None if view is None else view.contiguous()
        _, tiles = choose("gather_patches", images.device, patches.shape[1])
        launch(
            _gather_kernel, (batch, cdiv(rows * columns, tiles["BT"])),
            patches, cells, inverse, images, positions.contiguous(), cu_seqlens, view,
            *images.stride(), view_stride(view),
            C=channels, ROWS=rows, COLUMNS=columns, PH=ph, PW=pw, VIEW=view is not None, **tiles,
        )  # fmt: skip
    return patches, cells, inverse


gather_patches_op = torch.library.custom_op("smi_fast::gather_patches", launch_gather_patches, mutates_args=())


@gather_patches_op.register_fake
def _fake_gather_patches(images, positions, cu_seqlens, view, ph, pw, dtype):
    batch, channels, height, width = images.shape
    tokens = positions.shape[0]  # len() would tie a traced graph to this number
    patches = images.new_empty(tokens, channels * ph * pw, dtype=dtype)
    inverse = images.new_empty(batch, height // ph, width // pw, dtype=torch.int32)
    return patches, images.new_empty(tokens, dtype=torch.int32), inverse


def launch_gather_patches_backward(
    grad: Tensor, inverse: Tensor, view: Tensor | None, channels: int, ph: int, pw: int, dtype: torch.dtype
) -> Tensor:
    """The gradient (B, C, H, W) of the images: every pixel is written once."""
    batch, rows, columns = inverse.shape
    out = _fake_gather_patches_backward(grad, inverse, view, channels, ph, pw, dtype)
    if out.numel():
        view = None if view is None else view.contiguous()
        _, tiles = choose("gather_patches_backward", grad.device, channels * ph * pw)
        launch(
            _gather_backward_kernel, (batch, cdiv(rows * columns, tiles["BT"])),
            out, grad.contiguous(), inverse, view, view_stride(view),
            C=channels, ROWS=rows, COLUMNS=columns, PH=ph, PW=pw, VIEW=view is not None, **tiles,
        )  # fmt: skip
    return out


gather_patches_backward_op = torch.library.custom_op(
    "smi_fast::gather_patches_backward", launch_gather_patches_backward, mutates_args=()
)


@gather_patches_backward_op.register_fake
def _fake_gather_patches_backward(grad, inverse, view, channels, ph, pw, dtype):
    batch, rows, columns = inverse.shape
    return grad.new_empty(batch, channels, rows * ph, columns * pw, dtype=dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    images, _, _, view, ctx.ph, ctx.pw, _ = inputs
    ctx.channels, ctx.dtype = images.shape[1], images.dtype
    ctx.save_for_backward(output[2], view)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for each of them


@first_order
def _backward(ctx, grad, *_):
    inverse, view = ctx.saved_tensors
    grad = gather_patches_backward_op(grad, inverse, view, ctx.channels, ctx.ph, ctx.pw, ctx.dtype)
    return grad, None, None, None, None, None, None


gather_patches_op.register_autograd(_backward, setup_context=_save_for_backward)
