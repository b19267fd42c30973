"""Image prior (total variation, l2) gradient + Adam + clamp, on kept pixels only, in two passes.

The pixels live in two image batches that take turns: a step reads one and writes the kept pixels of the other where
they lie. So a neighbour is always read as it was before the step, no pixel is moved only to be stepped, and
`gather_patches` reads the images as they are. Stopped pixels are equal in both and no step touches them. The moments of
Adam are packed, (T, C * ph * pw). The norms of the prior are sums over the batch, so two passes are the least: the
first adds up squares, the second does all else.

Bytes for a kept pixel and step, with a gradient of G bytes: the first pass reads 4; the second reads 4 (pixel), 8
(moments) and G, and writes 12: 28 + G. 24 + G are the floor of any optimiser step, 4 the price of the norms.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, jit, launch, next_power_of_2, resolve_backend, tl
from .dispatch import choose
from .patches import _load_view, _view_stride, _wrap, check_images, check_view
from .rows import sequence_of_tokens

# The neighbours that total variation compares: right, down, and the two diagonals. (dy, dx) from the upper pixel.
NEIGHBOURS = ((0, 1), (1, 0), (1, -1), (1, 1))
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SUMS = len(NEIGHBOURS) + 1  # of squared differences in each direction, and of squared pixels


def patch_sites(positions: Tensor, cu_seqlens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Where each kept patch lies, and which of its neighbours are kept: made once for many steps.

    Args:
        positions: (T,) int32 patch-grid indices, row-major, packed by image; no two of an image are equal.
        cu_seqlens: (B + 1,) int32 cumulative counts.
        grid_size: (rows, columns) of the patch grid.

    Returns:
        (T, 4) int32: image, row and column; and bits of which number 3 * (r + 1) + (c + 1) says that the patch r rows
        below and c columns to the right is kept.

    Raises:
        ValueError: a shape, dtype or device outside of the above.
    """
    rows, columns = grid_size
    if positions.dim() != 1 or positions.dtype != torch.int32:
        raise ValueError(f"positions is {tuple(positions.shape)} {positions.dtype}, not (tokens,) torch.int32")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (batch + 1,) torch.int32")
    if positions.device != cu_seqlens.device:
        raise ValueError(f"positions is on {positions.device}, cu_seqlens on {cu_seqlens.device}")
    image = sequence_of_tokens(cu_seqlens, len(positions))  # (T,)
    row, column = positions.long() // columns, positions.long() % columns
    kept = positions.new_zeros(len(cu_seqlens) - 1, rows + 2, columns + 2)
    # Scattered, because filling by indices copies the one from the host and so waits for it.
    kept.view(-1).scatter_(0, (image * (rows + 2) + row + 1) * (columns + 2) + column + 1, torch.ones_like(positions))
    bits = torch.zeros_like(positions)
    for r in (-1, 0, 1):
        for c in (-1, 0, 1):
            bits |= kept[image, row + 1 + r, column + 1 + c] << (3 * (r + 1) + c + 1)
    return torch.stack([image.int(), row.int(), column.int(), bits], 1)


@torch.no_grad()
def pixel_step(
    next_images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    images: Tensor,
    grad: Tensor,
    sites: Tensor,
    lowest: Tensor,
    highest: Tensor,
    inverse: Tensor | None = None,
    view: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    tv_l2: float = 0.0,
    l2: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """One step of Adam (Kingma & Ba 2015, as torch.optim.Adam) on the kept pixels of images, then into their range.

    The gradient is that of the model's loss and of the prior of DeepInversion (Yin et al., CVPR 2020),
    tv_l2 * total variation + l2 * norm. Total variation is the sum over four neighbour directions of the l2 norm, over
    the batch, of the differences of pixel pairs of which both are kept; the gradient of a norm that is 0 is 0.

    Args:
        next_images: (B, C, H, W), written at the kept pixels. Elsewhere it should hold what images holds.
        exp_avg, exp_avg_sq: (T, C * ph * pw), the moments of Adam, zero at first; updated.
        step: int32 or int64, one element: steps done so far, counted up by one.
        images: (B, C, H, W) float32, contiguous. Not written. Of stopped patches nothing is read.
        grad: (T, C * ph * pw) or (T, C, ph, pw), the gradient of the model's loss in any floating dtype: without a
            view, that of the kept patches; with one, that of the patches that `gather_patches` saw through it.
        sites: (T, 4) of `patch_sites`.
        lowest, highest: (C,), the range of a channel.
        inverse: (B, rows, columns) of `launch_gather_patches`; only with a view.
        view: as in `gather_patches`; a kept pixel whose viewed cell shows no kept patch has no gradient of the model.
        patch_size: (ph, pw), which divide (H, W).
        lr, betas, eps: of Adam. tv_l2, l2: of the prior.
        backend: "auto", "triton" or "torch".

    Returns:
        The prior of images as a scalar on their device.

    Raises:
        ValueError: a shape, dtype, device, layout or number outside of the above.
    """
    patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    _check_numbers(lr, betas, eps, tv_l2, l2)
    _check_state(next_images, exp_avg, exp_avg_sq, step, images, sites, lowest, highest, patch_size)
    _check_gradient(images, grad, sites, inverse, view, patch_size)
    state = next_images, exp_avg, exp_avg_sq, step
    inputs = images, grad, sites, lowest, highest, inverse, view
    numbers = *patch_size, float(lr), *map(float, betas), float(eps), float(tv_l2), float(l2)
    if resolve_backend(backend, images.device) == "torch":
        return pixel_step_reference(*state, *inputs, *numbers)
    if images.dtype != torch.float32:
        raise ValueError(f'images are {images.dtype}: backend "triton" takes torch.float32')
    return pixel_step_op(*state, *inputs, *numbers)


def _check_numbers(lr, betas, eps, tv_l2, l2) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("tv_l2", tv_l2), ("l2", l2)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def _check_state(next_images, exp_avg, exp_avg_sq, step, images, sites, lowest, highest, patch_size) -> None:
    check_images(images, patch_size)
    channels, (ph, pw) = images.shape[1], patch_size
    if sites.dim() != 2 or sites.shape[1] != 4 or sites.dtype != torch.int32:
        raise ValueError(f"sites is {tuple(sites.shape)} {sites.dtype}, not (patches, 4) torch.int32")
    moments = len(sites), channels * ph * pw
    for name, tensor, shape in (
        ("next_images", next_images, tuple(images.shape)),
        ("exp_avg", exp_avg, moments),
        ("exp_avg_sq", exp_avg_sq, moments),
        ("lowest", lowest, (channels,)),
        ("highest", highest, (channels,)),
    ):
        if tensor.shape != shape or tensor.dtype != images.dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {images.dtype}")
    if step.numel() != 1 or step.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step is {tuple(step.shape)} {step.dtype}, not one torch.int32 or torch.int64")
    if next_images.data_ptr() == images.data_ptr() and images.numel():
        raise ValueError("next_images is images itself: a step reads neighbours that it would have overwritten")
    for name, tensor in (
        ("images", images),
        ("next_images", next_images),
        ("exp_avg", exp_avg),
        ("exp_avg_sq", exp_avg_sq),
        ("step", step),
        ("sites", sites),
        ("lowest", lowest),
        ("highest", highest),
    ):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}")


def _check_gradient(images, grad, sites, inverse, view, patch_size) -> None:
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    shapes = (len(sites), channels * ph * pw), (len(sites), channels, ph, pw)
    if grad.shape not in shapes or not grad.is_floating_point():
        raise ValueError(f"grad is {tuple(grad.shape)} {grad.dtype}, not floats {shapes[0]} or {shapes[1]}")
    if (view is None) != (inverse is None):
        raise ValueError(f"view and inverse come together: {'view' if view is None else 'inverse'} is None")
    if view is not None:
        check_view(view, batch)
        cells = batch, height // ph, width // pw
        if inverse.shape != cells or inverse.dtype != torch.int32:
            raise ValueError(f"inverse is {tuple(inverse.shape)} {inverse.dtype}, not {cells} torch.int32")
    for name, tensor in (("grad", grad), ("inverse", inverse), ("view", view)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}")


def pixel_step_reference(
    next_images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    images: Tensor,
    grad: Tensor,
    sites: Tensor,
    lowest: Tensor,
    highest: Tensor,
    inverse: Tensor | None,
    view: Tensor | None,
    ph: int,
    pw: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    tv_l2: float,
    l2: float,
) -> Tensor:
    """What `pixel_step` means, in plain torch."""
    channels, height, width = images.shape[1:]
    image, row, column = sites[:, :3].long().unbind(1)
    # A row of a patch is a run of pw pixels, run `column` of its row of the image.
    planes = image[:, None] * channels + torch.arange(channels, device=images.device)  # (T, C)
    rows = planes[:, :, None] * height + (row * ph)[:, None, None] + torch.arange(ph, device=images.device)
    runs = (rows * (width // pw) + column[:, None, None]).flatten()  # (T * C * ph,)
    pixels = images.view(-1, pw).index_select(0, runs)
    if view is not None:
        grad = viewed_gradient_reference(grad, sites, inverse, view, channels, ph, pw)
    grad = grad.to(images.dtype).reshape(exp_avg.shape)
    prior = images.new_zeros(())
    if tv_l2 or l2:
        prior, prior_grad = prior_reference(images, sites, ph, pw, tv_l2, l2)
        grad = prior_grad.reshape(exp_avg.shape) + grad
    step += 1
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = (1 - beta ** step.double().view(()) for beta in (beta1, beta2))
    denominator = exp_avg_sq.sqrt().div_(correction2.sqrt().to(images.dtype)).add_(eps)
    update = (exp_avg / denominator).mul_((lr / correction1).to(images.dtype))
    pixels = (pixels.view_as(update) - update).view(len(sites), channels, ph * pw)
    pixels = torch.minimum(torch.maximum(pixels, lowest[:, None]), highest[:, None])
    next_images.view(-1, pw).index_copy_(0, runs, pixels.view(-1, pw))
    return prior


def prior_reference(images: Tensor, sites: Tensor, ph: int, pw: int, tv_l2: float, l2: float) -> tuple[Tensor, Tensor]:
    """The prior of the kept pixels, and its gradient (T, C, ph, pw) there."""
    image, row, column, bits = sites.long().unbind(1)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, ph + 2, ph).unfold(3, pw + 2, pw)
    tiles = windows[image, :, row, column]  # (T, C, ph + 2, pw + 2)
    # Which of the nine patches around it a pixel of a tile lies in.
    down, right = (torch.arange(size + 2, device=images.device) for size in (ph, pw))
    bit = 3 * ((down > 0).int() + (down > ph).int())[:, None] + (right > 0).int() + (right > pw).int()
    kept = (bits[:, None, None, None] >> bit) & 1 != 0  # (T, 1, ph + 2, pw + 2)

    pixels = tiles[..., 1 : 1 + ph, 1 : 1 + pw]
    value, grad = images.new_zeros(()), torch.zeros_like(pixels)
    if tv_l2:
        value, grad = variation_of_tiles(tiles, kept, tv_l2)
    if l2:
        norm = torch.linalg.vector_norm(pixels)
        value = value + l2 * norm
        grad = grad + pixels * torch.where(norm == 0, 0, l2 / norm)
    return value, grad


def variation_of_tiles(tiles: Tensor, kept: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Weighted total variation over all tiles, and its gradient in their inner pixels.

    Tiles overlap by a pixel, so that every neighbour of an inner pixel is in its own tile. A pair counts once: in the
    tile where its upper pixel, or of a row the left one, is an inner one.

    Args:
        tiles: (T, C, ph + 2, pw + 2), kept patches with a pixel around them.
        kept: (T, 1, ph + 2, pw + 2) bool, which pixels are kept. Of others nothing is read.

    Returns:
        A scalar, and (T, C, ph, pw).
    """
    height, width = tiles.shape[2] - 2, tiles.shape[3] - 2
    value, grad = tiles.new_zeros(()), torch.zeros_like(tiles)
    for dy, dx in NEIGHBOURS:
        first, second = pixel_pairs(tiles, dy, dx)
        difference = zero_unless(torch.logical_and(*pixel_pairs(kept, dy, dx)), first - second)
        left = 1 - max(0, -dx)  # of the inner pixels, among the first ones
        norm = torch.linalg.vector_norm(difference[..., 1 : 1 + height, left : left + width].flatten())
        value = value + weight * norm
        difference *= torch.where(norm == 0, 0, weight / norm)
        grad_first, grad_second = pixel_pairs(grad, dy, dx)
        grad_first += difference
        grad_second -= difference
    return value, grad[..., 1:-1, 1:-1]


def zero_unless(condition: Tensor, x: Tensor) -> Tensor:
    """torch.where(condition, x, 0) on the bits of x, for which a CPU takes an eighth of the time."""
    if x.dtype not in BITS:
        return torch.where(condition, x, 0)
    bits = BITS[x.dtype]
    return x.view(bits).bitwise_and(-condition.to(bits)).view(x.dtype)


def pixel_pairs(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Both ends of all pixel pairs that are (dy, dx) apart, as views of (..., H, W)."""
    height, width = x.shape[-2:]
    first = x[..., : height - dy, max(0, -dx) : width - max(0, dx)]
    second = x[..., dy:, max(0, dx) : width - max(0, -dx)]
    return first, second


def viewed_gradient_reference(
    grad: Tensor, sites: Tensor, inverse: Tensor, view: Tensor, channels: int, ph: int, pw: int
) -> Tensor:
    """The gradient (T, C * ph * pw) of the kept pixels out of that of the patches that were seen through a view."""
    batch, rows, columns = inverse.shape
    height, width = rows * ph, columns * pw
    image, row, column = sites[:, :3].long().unbind(1)
    device = grad.device
    dy, dx, flip = view.expand(batch, 3)[image].long().unbind(1)
    y = ((row * ph + dy)[:, None] + torch.arange(ph, device=device)) % height  # (T, ph), in the viewed image
    x = ((column * pw + dx)[:, None] + torch.arange(pw, device=device)) % width  # (T, pw)
    x = torch.where(flip[:, None] != 0, width - 1 - x, x)
    seen = (image * rows)[:, None] + y // ph  # (T, ph)
    token = inverse.view(-1)[seen[:, :, None] * columns + (x // pw)[:, None]].long()  # (T, ph, pw)
    within = (y % ph * pw)[:, :, None] + (x % pw)[:, None]  # (T, ph, pw)
    first = token * (channels * ph * pw) + within  # (T, ph, pw), in the first channel
    source = first[:, None] + (torch.arange(channels, device=device) * (ph * pw))[:, None, None]  # (T, C, ph, pw)
    pixels = grad.reshape(-1).index_select(0, source.clamp_(min=0).flatten()).view(source.shape)
    return zero_unless(token[:, None] >= 0, pixels).view(len(sites), -1)


@jit
def _element(block, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BE: tl.constexpr):
    """Elements [1, BE] of a patch in the order (C, PH, PW), which there are, and their channel, row and column."""
    e = block * BE + tl.arange(0, BE)[None, :]  # [1, BE]
    return e, e < C * PH * PW, e // (PH * PW), e // PW % PH, e % PW


@jit
def _bits(y, x, dy: tl.constexpr, dx: tl.constexpr, there, PH: tl.constexpr, PW: tl.constexpr):
    """The bit of a site [1, BE] that says whether the pixel (dy, dx) from (y, x) is kept; 0 where no pixel is."""
    r = tl.where(y + dy < 0, 0, tl.where(y + dy >= PH, 2, 1))
    c = tl.where(x + dx < 0, 0, tl.where(x + dx >= PW, 2, 1))
    return tl.where(there, 1 << (3 * r + c), 0)


@jit
def _site(sites, t, patches):
    """Image, row, column and kept neighbours of patches [BT, 1]; no neighbour, nor itself, where there is no patch."""
    image = tl.load(sites + 4 * t, mask=t < patches, other=0)
    row = tl.load(sites + 4 * t + 1, mask=t < patches, other=0)
    column = tl.load(sites + 4 * t + 2, mask=t < patches, other=0)
    return image, row, column, tl.load(sites + 4 * t + 3, mask=t < patches, other=0)


@jit
def _difference(pixels, source, kept, bit):
    """Pixels minus a neighbour [BT, BE], 0 where the neighbour is not kept."""
    mask = (kept & bit) != 0
    return tl.where(mask, pixels - tl.load(source, mask=mask, other=0.0), 0.0)


@jit
def _power(base: tl.constexpr, n):
    """base ** n in float64, by squaring."""
    factor = tl.full([], base, tl.float64)
    power = tl.full([], 1.0, tl.float64)
    for bit in range(31):
        power = tl.where((n >> bit) & 1 != 0, power * factor, power)
        factor = factor * factor
    return power


@jit
def _prior_sums_kernel(
    sums,
    corrections,
    step,
    images,
    sites,
    patches,
    lr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    TV: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Reads each of T C PH PW pixels once, besides four neighbours from the cache, and writes five sums a program; 14
    operations a pixel. The first program counts the step and writes what corrects the bias of Adam."""
    W: tl.constexpr = COLUMNS * PW
    _, there, channel, y, x = _element(tl.program_id(1), C, PH, PW, BE)
    within = channel * (ROWS * PH * W) + y * W + x  # [1, BE]
    own = _bits(y, x, 0, 0, there, PH, PW)
    right, down = _bits(y, x, 0, 1, there, PH, PW), _bits(y, x, 1, 0, there, PH, PW)
    down_left, down_right = _bits(y, x, 1, -1, there, PH, PW), _bits(y, x, 1, 1, there, PH, PW)
    squares = tl.zeros([BT, BE], tl.float32)
    right_squares, down_squares, down_left_squares, down_right_squares = squares, squares, squares, squares
    for first in range(tl.program_id(0) * BT, patches, tl.num_programs(0) * BT):
        t = first + tl.arange(0, BT)[:, None]  # [BT, 1]
        image, row, column, kept = _site(sites, t, patches)
        source = images + image.to(tl.int64) * (C * ROWS * PH * W) + (row * (PH * W) + column * PW) + within
        pixels = tl.load(source, mask=(kept & own) != 0, other=0.0)  # [BT, BE]
        squares += pixels * pixels
        if TV:
            difference = _difference(pixels, source + 1, kept, right)
            right_squares += difference * difference
            difference = _difference(pixels, source + W, kept, down)
            down_squares += difference * difference
            difference = _difference(pixels, source + (W - 1), kept, down_left)
            down_left_squares += difference * difference
            difference = _difference(pixels, source + (W + 1), kept, down_right)
            down_right_squares += difference * difference
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    if TV:
        tl.store(sums + program, tl.sum(right_squares))
        tl.store(sums + programs + program, tl.sum(down_squares))
        tl.store(sums + 2 * programs + program, tl.sum(down_left_squares))
        tl.store(sums + 3 * programs + program, tl.sum(down_right_squares))
    tl.store(sums + 4 * programs + program, tl.sum(squares))
    if program == 0:
        # Here, because nobody reads the step before the next launch.
        n = tl.load(step) + 1
        tl.debug_barrier()  # all threads have loaded the step before one stores the next
        tl.store(step, n)
        correction1 = (1.0 - _power(BETA1, n)).to(tl.float32)
        correction2 = (1.0 - _power(BETA2, n)).to(tl.float32)
        tl.store(corrections, tl.div_rn(lr, correction1))
        tl.store(corrections + 1, tl.div_rn(1.0, tl.sqrt_rn(correction2)))


@jit
def _norm(sums, number, programs, BP: tl.constexpr):
    """A norm out of the sums of all programs, which are added up in one order always."""
    p = tl.arange(0, BP)  # [BP]
    return tl.sqrt_rn(tl.sum(tl.load(sums + number * programs + p, mask=p < programs, other=0.0), 0))


@jit
def _scale(weight, norm):
    """Of the gradient of weight * norm, which is 0 where the norm is."""
    return tl.where(norm == 0, 0.0, tl.div_rn(weight, tl.where(norm == 0, 1.0, norm)))


@jit
def _shift(
    view, image, stride_image, y, x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """How many cells a view moves pixels (y, x) of a patch down and right, whether it mirrors, and where in the patch
    of the viewed image they are seen."""
    dy, dx, flip = _load_view(view, image, stride_image, ROWS * PH, COLUMNS * PW)
    y, x = y + dy % PH, x + dx % PW  # up to twice a patch
    down, right = dy // PH + (y >= PH).to(tl.int32), dx // PW + (x >= PW).to(tl.int32)
    x = _wrap(x, PW)
    return down, right, flip, _wrap(y, PH) * PW + tl.where(flip, PW - 1 - x, x)


@jit
def _seen_cell(row, column, down, right, flip, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The cell of the viewed image that pixels of the patch at (row, column) are seen in."""
    column = _wrap(column + right, COLUMNS)
    return _wrap(row + down, ROWS) * COLUMNS + tl.where(flip, COLUMNS - 1 - column, column)


@jit
def _pixel_step_kernel(
    prior,
    next_images,
    exp_avg,
    exp_avg_sq,
    images,
    grad,
    sites,
    lowest,
    highest,
    inverse,
    view,
    sums,
    corrections,
    patches,
    sum_programs,
    view_stride_image,
    weight1,
    beta2,
    weight2,
    eps,
    tv_l2,
    l2,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VIEW: tl.constexpr,
    SHARED_VIEW: tl.constexpr,
    TV: tl.constexpr,
    L2: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Reads pixel, gradient and two moments of T C PH PW kept pixels once, besides eight neighbours from the cache, and
    writes pixel and moments: 24 bytes a pixel and the gradient, about 50 operations."""
    W: tl.constexpr = COLUMNS * PW
    E: tl.constexpr = C * PH * PW
    value = 0.0
    if TV:
        norm_right, norm_down = _norm(sums, 0, sum_programs, BP), _norm(sums, 1, sum_programs, BP)
        norm_down_left, norm_down_right = _norm(sums, 2, sum_programs, BP), _norm(sums, 3, sum_programs, BP)
        value += tv_l2 * (norm_right + norm_down + norm_down_left + norm_down_right)
        scale_right, scale_down = _scale(tv_l2, norm_right), _scale(tv_l2, norm_down)
        scale_down_left, scale_down_right = _scale(tv_l2, norm_down_left), _scale(tv_l2, norm_down_right)
    if L2:
        norm = _norm(sums, 4, sum_programs, BP)
        value += l2 * norm
        scale = _scale(l2, norm)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(prior, value)
    step_size, correction = tl.load(corrections), tl.load(corrections + 1)
    # All that a pixel's place in its patch decides, once for all patches.
    e, there, channel, y, x = _element(tl.program_id(1), C, PH, PW, BE)
    within = channel * (ROWS * PH * W) + y * W + x  # [1, BE]
    low = tl.load(lowest + channel, mask=there, other=0.0)
    high = tl.load(highest + channel, mask=there, other=0.0)
    own = _bits(y, x, 0, 0, there, PH, PW)
    left, right = _bits(y, x, 0, -1, there, PH, PW), _bits(y, x, 0, 1, there, PH, PW)
    up, down = _bits(y, x, -1, 0, there, PH, PW), _bits(y, x, 1, 0, there, PH, PW)
    up_left, up_right = _bits(y, x, -1, -1, there, PH, PW), _bits(y, x, -1, 1, there, PH, PW)
    down_left, down_right = _bits(y, x, 1, -1, there, PH, PW), _bits(y, x, 1, 1, there, PH, PW)
    if SHARED_VIEW:
        rows_down, columns_right, flip, seen = _shift(view, 0, 0, y, x, ROWS, COLUMNS, PH, PW)
    for first in range(tl.program_id(0) * BT, patches, tl.num_programs(0) * BT):
        t = first + tl.arange(0, BT)[:, None]  # [BT, 1]
        image, row, column, kept = _site(sites, t, patches)
        mask = (kept & own) != 0  # [BT, BE]
        n = t.to(tl.int64) * E + e
        place = image.to(tl.int64) * (C * ROWS * PH * W) + (row * (PH * W) + column * PW) + within
        source = images + place
        pixels = tl.load(source, mask=mask, other=0.0)  # [BT, BE]
        first_moment = tl.load(exp_avg + n, mask=mask, other=0.0)
        second_moment = tl.load(exp_avg_sq + n, mask=mask, other=0.0)
        if VIEW:
            if SHARED_VIEW:
                cell = _seen_cell(row, column, rows_down, columns_right, flip, ROWS, COLUMNS)
                seen_at = channel * (PH * PW) + seen
            else:
                each_down, each_right, each_flip, each_seen = _shift(
                    view, image, view_stride_image, y, x, ROWS, COLUMNS, PH, PW
                )
                cell = _seen_cell(row, column, each_down, each_right, each_flip, ROWS, COLUMNS)
                seen_at = channel * (PH * PW) + each_seen
            # Flat, or the compiler finds no order in these addresses and moves what it loads from thread to thread.
            cell = tl.reshape(image * (ROWS * COLUMNS) + cell, [BT * BE])
            token = tl.load(inverse + cell, mask=tl.reshape(mask, [BT * BE]), other=-1)
            seen_at = tl.reshape(tl.broadcast_to(seen_at, [BT, BE]), [BT * BE])
            g = tl.load(grad + token.to(tl.int64) * E + seen_at, mask=token >= 0, other=0.0)
            g = tl.reshape(g, [BT, BE]).to(tl.float32)
        else:
            g = tl.load(grad + n, mask=mask, other=0.0).to(tl.float32)
        if TV:
            difference = _difference(pixels, source + 1, kept, right)
            g += scale_right * (difference + _difference(pixels, source - 1, kept, left))
            difference = _difference(pixels, source + W, kept, down)
            g += scale_down * (difference + _difference(pixels, source - W, kept, up))
            difference = _difference(pixels, source + (W - 1), kept, down_left)
            g += scale_down_left * (difference + _difference(pixels, source - (W - 1), kept, up_right))
            difference = _difference(pixels, source + (W + 1), kept, down_right)
            g += scale_down_right * (difference + _difference(pixels, source - (W + 1), kept, up_left))
        if L2:
            g += scale * pixels
        first_moment += weight1 * (g - first_moment)
        second_moment = beta2 * second_moment + weight2 * g * g
        tl.store(exp_avg + n, first_moment, mask=mask)
        tl.store(exp_avg_sq + n, second_moment, mask=mask)
        denominator = tl.sqrt_rn(second_moment) * correction + eps
        pixels -= step_size * tl.div_rn(first_moment, denominator)
        # Not tl.clamp, which makes a number of NaN.
        pixels = tl.where(pixels < low, low, pixels)
        pixels = tl.where(pixels > high, high, pixels)
        tl.store(next_images + place, pixels, mask=mask)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; without one, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tiles(operation: str, device: torch.device, patches: int, elements: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Constants of a kernel, and its grid: programs that share the patches, times blocks of a patch.

    A program takes BT patches at a time and BE elements of each: one a thread, because a pixel's neighbours to the left
    and right cannot be read in wider accesses. PER_SM programs a multiprocessor run together; no more start.
    """
    _, tiles = choose(operation, device, elements)
    blocks = cdiv(elements, tiles["BE"])
    resident = tiles.pop("PER_SM") * _multiprocessors(device) // blocks
    return tiles, (max(1, min(resident, cdiv(patches, tiles["BT"]))), blocks)


def _scratch(images: Tensor, programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prior, the sums of each program and the corrections of Adam's bias."""
    return images.new_empty(()), images.new_empty(SUMS, programs), images.new_empty(2)


def launch_pixel_step(
    next_images: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    images: Tensor,
    grad: Tensor,
    sites: Tensor,
    lowest: Tensor,
    highest: Tensor,
    inverse: Tensor | None,
    view: Tensor | None,
    ph: int,
    pw: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    tv_l2: float,
    l2: float,
) -> Tensor:
    """What `pixel_step_reference` does, in two launches."""
    _, channels, height, width = images.shape
    size, shape = channels * ph * pw, dict(C=channels, ROWS=height // ph, COLUMNS=width // pw, PH=ph, PW=pw)
    # Without a prior there is nothing to sum up, but a step to count.
    patches = len(sites) if tv_l2 or l2 else 0
    tiles, grid = _tiles("prior_sums", images.device, patches, size)
    prior, sums, corrections = _scratch(images, math.prod(grid))
    launch(
        _prior_sums_kernel, grid,
        sums, corrections, step, images, sites, patches, lr,
        **shape, BETA1=beta1, BETA2=beta2, TV=tv_l2 != 0, **tiles,
    )  # fmt: skip
    tiles, grid = _tiles("pixel_step", images.device, len(sites), size)
    view = None if view is None else view.contiguous()
    inverse = None if inverse is None else inverse.contiguous()
    launch(
        _pixel_step_kernel, grid,
        prior, next_images, exp_avg, exp_avg_sq, images, grad.contiguous(), sites, lowest, highest, inverse, view,
        sums, corrections, len(sites), sums.shape[1], _view_stride(view), 1 - beta1, beta2, 1 - beta2, eps, tv_l2, l2,
        **shape, VIEW=view is not None, SHARED_VIEW=view is not None and view.dim() == 1, TV=tv_l2 != 0, L2=l2 != 0,
        BP=next_power_of_2(sums.shape[1]), **tiles,
    )  # fmt: skip
    return prior


pixel_step_op = torch.library.custom_op(
    "smi_fast::pixel_step", launch_pixel_step, mutates_args=("next_images", "exp_avg", "exp_avg_sq", "step")
)


@pixel_step_op.register_fake
def _fake_pixel_step(next_images, exp_avg, exp_avg_sq, step, images, *_):
    return images.new_empty(())
