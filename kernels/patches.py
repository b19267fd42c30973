"""Cut patches out of images that are seen through a view (jitter and flip), and carry their gradients back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import cdiv, jit, launch, resolve_backend, tl
from .cpu import CPP_TYPES, call_cpp, suits_cpp
from .dispatch import choose
from .gradients import any_order, transformed
from .operators import operation, wants_gradient
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
    """Cut the patches at `positions` out of B images that are seen through a view.

    The viewed image is the image rolled by (dy, dx) and then, if flip is not 0, mirrored left-right. A patch is cut out
    at the cell to which `view_cells` maps its position. The viewed image is never stored.

    Args:
        images: (B, C, H, W) of a floating dtype. The gradient flows to the pixels that were read and is zero elsewhere.
        positions: (T,) int32 patch-grid indices, row-major, packed by image. Those of one image are distinct.
        cu_seqlens: (B + 1,) int32 cumulative counts: image b has `positions[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        view: (dy, dx, flip), int32 or int64, of shape (3,) for all images or (B, 3). None is the plain view. The values
            are read on their device.
        patch_size: (ph, pw), which divide (H, W).
        dtype: the dtype of the patches, by default that of the images.
        return_inverse: whether to return the inverse of the cells too.
        backend: "auto", "triton" or "torch".

    Returns:
        The patches, (T, C * ph * pw) in the order of a convolution's weight (C, ph, pw), and their cells, (T,) int32,
        the grid cell at which each patch was cut out (for the position embedding). With `return_inverse` also the
        inverse for `pixel_step`, (B, rows, columns) int32: the index t of the patch cut out at each cell, or -1.

    Raises:
        ValueError: if an argument has another shape, dtype, device or size.
    """
    patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    _check_patches(images, positions, cu_seqlens, view, patch_size)
    dtype = dtype or images.dtype
    if resolve_backend(backend, images.device) == "torch" or transformed():
        if backend == "auto" and dtype in CPP_TYPES and _suits_cpp(images):
            patches, cells, inverse = gather_patches_in_cpp(images, positions, cu_seqlens, view, *patch_size, dtype)
            return (patches, cells, inverse) if return_inverse else (patches, cells)
        patches, cells = patches_reference(images, positions, cu_seqlens, view, patch_size, dtype)
        grid_size = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
        inverse = inverse_reference(cells, cu_seqlens, grid_size) if return_inverse else None
    else:
        patches, cells, inverse = _gather(images, positions, cu_seqlens, view, *patch_size, dtype)
    return (patches, cells, inverse) if return_inverse else (patches, cells)


def check_images(images: Tensor, patch_size: tuple[int, int]) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images is {tuple(images.shape)} {images.dtype}, not floats (batch, channels, height, width)")
    height, width = images.shape[2:]
    ph, pw = patch_size
    if ph < 1 or pw < 1 or height % ph or width % pw:
        raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {ph}x{pw}")


def check_view(view: Tensor, batch: int) -> None:
    if not isinstance(view, Tensor):
        raise ValueError(f"view is a {type(view).__name__}, not a tensor of integers (dy, dx, flip)")
    if view.shape not in ((3,), (batch, 3)):
        raise ValueError(f"view has shape {tuple(view.shape)}, not (3,) or ({batch}, 3)")
    if view.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"view has dtype {view.dtype}, not torch.int32 or torch.int64")


def _check_patches(images, positions, cu_seqlens, view, patch_size) -> None:
    check_images(images, patch_size)
    batch = images.shape[0]
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
    """Compute the grid cell in which each patch is seen through a view.

    It is the cell nearest to where the view moves the patch's centre, wrapped at the borders. Half a patch is rounded
    up. Different positions have different cells.

    Args:
        positions: (...) patch-grid indices, row-major.
        view: (..., 3), each (dy, dx, flip) in pixels; the leading shape broadcasts with positions.
        grid_size: (rows, columns) of the patch grid.
        patch_size: (ph, pw) in pixels.

    Returns:
        (...) cells in the dtype of positions.
    """
    (rows, columns), (ph, pw) = grid_size, patch_size
    dy, dx, flip = view.unbind(-1)
    # floor(offset / patch + 1/2) in integers. An offset by the whole image changes nothing.
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
    """Define `gather_patches` in plain torch: the patches (T, C * ph * pw) and their cells (T,)."""
    batch, channels, height, width = images.shape
    (ph, pw), tokens, device = patch_size, positions.shape[0], images.device
    columns = width // pw
    image = sequence_of_tokens(cu_seqlens, tokens)  # (T,)
    planes = image[:, None] * channels + torch.arange(channels, device=device)  # (T, C)
    if view is None:
        cells = positions.clone()
        y = (cells // columns * ph)[:, None] + torch.arange(ph, device=device)  # (T, ph)
        # A row of a patch is a run of pw pixels, the one with number x in its row of the image.
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


def _suits_cpp(images: Tensor) -> bool:
    """Return whether patches are cut out in C++, which has no rule for gradients of the images."""
    return images.dtype == torch.float32 and not wants_gradient(images) and suits_cpp(images)


def gather_patches_in_cpp(
    images: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    view: Tensor | None,
    ph: int,
    pw: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out patches in C++. Returns what `launch_gather_patches` does."""
    (batch, channels, height, width), tokens = images.shape, positions.shape[0]
    patches, cells = images.new_empty(tokens, channels * ph * pw, dtype=dtype), torch.empty_like(positions)
    inverse = positions.new_empty(batch, height // ph, width // pw)
    call_cpp(
        "gather_patches", patches, cells, inverse, images.contiguous(), positions.contiguous(), cu_seqlens.contiguous(),
        *cpu_view(view), tokens, batch, channels, height // ph, width // pw, ph, pw,
    )  # fmt: skip
    return patches, cells, inverse


def cpu_view(view: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a view as the functions in C++ read it, and how far apart the views of images are."""
    view = None if view is None else view.to(torch.int64).contiguous()
    return view, view_stride(view)


def inverse_reference(cells: Tensor, cu_seqlens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Compute the index t of the patch in each cell: (B, rows, columns) int32, -1 where there is none."""
    batch, size = cu_seqlens.shape[0] - 1, grid_size[0] * grid_size[1]
    inverse = torch.full((batch * size,), -1, dtype=torch.int32, device=cells.device)
    taken = sequence_of_tokens(cu_seqlens, cells.shape[0]) * size + cells
    rows = torch.arange(cells.shape[0], dtype=torch.int32, device=cells.device)
    return inverse.scatter_(0, taken, rows).view(batch, *grid_size)


@jit
def _modulo(a, n):
    """Compute a modulo n in 0..n-1, also for negative a."""
    return ((a % n) + n) % n


@jit
def wrap(a, n):
    """Compute a modulo n for a in 0..2n-1. If a < n, then a - n as an unsigned integer is greater than a."""
    return tl.minimum(a.to(tl.uint32), (a - n).to(tl.uint32)).to(tl.int32)


@jit
def load_view(view, image, stride_image, height, width):
    """Load an image's view: dy in 0..height-1, dx in 0..width-1, and whether the view is mirrored."""
    view += image * stride_image
    dy = _modulo(tl.load(view), height).to(tl.int32)
    dx = _modulo(tl.load(view + 1), width).to(tl.int32)
    return dy, dx, tl.load(view + 2) != 0


@jit
def _cell(
    position, dy, dx, flip,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, VIEW: tl.constexpr,
):  # fmt: skip
    """Compute the row and column of the cell that `view_cells` defines, for dy in 0..height-1 and dx in 0..width-1."""
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
    """Compute the offsets [BT, BE] in the image of the elements e [BE] of patches that are seen through a view in the
    cells (row, column) [BT]."""
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
        offsets = within[None, :] + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    else:
        within += along_y.to(tl.int64) * stride_y + along_x.to(tl.int64) * stride_x
        offsets = (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None] + within[None, :]
    return offsets


@jit
def _gather_kernel(
    patches, cells, inverse,
    images, positions, cu_seqlens, view,
    stride_image, stride_channel, stride_y, stride_x, view_stride_image,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VIEW: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """patches[t, (c, i, j)] = viewed image[c, row ph + i, column pw + j] for the cell (row, column) of each patch t;
    the cells; and their inverse, where inverse[cells[t]] = t and -1 elsewhere. `patches_reference` and
    `inverse_reference` define them.

    The grid is (images, blocks of BT patches). All programs together read and write each of T C PH PW pixels once, and
    write two integers for each patch and one for each cell. They compute only addresses.
    """
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
        tl.debug_barrier()  # the stores below overwrite what other threads stored above
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
    # A view breaks the alignment of pixels. The tile is then flat, so that neighbouring threads access neighbouring
    # pixels. Without a view, each thread accesses 16 bytes.
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
    patch_grad, inverse, view, view_stride_image,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VIEW: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """grad[the pixel that patches[t, e] was read from] = patch_grad[t, e], 0 elsewhere: the gradient of
    `patches_reference`. Each pixel is read at most once, so no gradients are added up.

    The grid is (images, blocks of BT cells). All programs together read the T C PH PW gradients of the patches once and
    write the gradients of all B C H W pixels once. They compute only addresses.
    """
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
    # A view breaks the alignment of pixels. The tile is then flat, so that neighbouring threads access neighbouring
    # pixels. Without a view, each thread accesses 16 bytes.
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
    """Return the stride from one image's view to the next, which is 0 if all images share a view."""
    return view.stride(0) if view is not None and view.dim() == 2 else 0


def launch_gather_patches(
    images: Tensor, positions: Tensor, cu_seqlens: Tensor, view: Tensor | None, ph: int, pw: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the patches (T, C * ph * pw), their cells (T,), and the inverse (B, rows, columns) in one launch."""
    batch, channels, _, _ = images.shape
    patches, cells, inverse = _fake_gather_patches(images, positions, cu_seqlens, view, ph, pw, dtype)
    _, rows, columns = inverse.shape
    if inverse.numel():
        view = None if view is None else view.contiguous()
        _, tiles = choose("gather_patches", images.device, patches.shape[1])
        launch(
            _gather_kernel, (batch, cdiv(rows * columns, tiles["BT"])),
            patches=patches, cells=cells, inverse=inverse,
            images=images, positions=positions.contiguous(), cu_seqlens=cu_seqlens, view=view,
            **dict(zip(("stride_image", "stride_channel", "stride_y", "stride_x"), images.stride(), strict=True)),
            view_stride_image=view_stride(view),
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
    """Compute the gradient (B, C, H, W) of the images in one launch that writes every pixel once."""
    batch, rows, columns = inverse.shape
    out = _fake_gather_patches_backward(grad, inverse, view, channels, ph, pw, dtype)
    if out.numel():
        view = None if view is None else view.contiguous()
        _, tiles = choose("gather_patches_backward", grad.device, channels * ph * pw)
        launch(
            _gather_backward_kernel, (batch, cdiv(rows * columns, tiles["BT"])),
            grad=out, patch_grad=grad.contiguous(), inverse=inverse, view=view, view_stride_image=view_stride(view),
            C=channels, ROWS=rows, COLUMNS=columns, PH=ph, PW=pw, VIEW=view is not None, **tiles,
        )  # fmt: skip
    return out


gather_patches_backward_op = torch.library.custom_op(
    "smi_fast::gather_patches_backward", launch_gather_patches_backward, mutates_args=()
)
_gather_backward = operation(gather_patches_backward_op, launch_gather_patches_backward)


@gather_patches_backward_op.register_fake
def _fake_gather_patches_backward(grad, inverse, view, channels, ph, pw, dtype):
    batch, rows, columns = inverse.shape
    return grad.new_empty(batch, channels, rows * ph, columns * pw, dtype=dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    images, positions, cu_seqlens, view, ctx.ph, ctx.pw, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype
    ctx.save_for_backward(output[2], view, positions, cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros are written as the gradients of cells and inverse


def _derivative(ctx, grad, *_):
    _, view, positions, cu_seqlens = ctx.saved_tensors
    numbers = torch.arange(math.prod(ctx.shape), device=grad.device).view(ctx.shape)
    pixels, _ = patches_reference(numbers, positions, cu_seqlens, view, (ctx.ph, ctx.pw), torch.int64)
    zeros = grad.new_zeros(numbers.numel(), dtype=ctx.dtype)
    grad = zeros.index_copy(0, pixels.flatten(), grad.flatten().to(ctx.dtype)).view(ctx.shape)
    return grad, None, None, None, None, None, None


@any_order(_derivative)
def _backward(ctx, grad, *_):
    inverse, view, *_ = ctx.saved_tensors
    grad = _gather_backward(grad, inverse, view, ctx.shape[1], ctx.ph, ctx.pw, ctx.dtype)
    return grad, None, None, None, None, None, None


_gather = operation(gather_patches_op, launch_gather_patches, setup_context=_save_for_backward, backward=_backward)
