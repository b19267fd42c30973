"""One step on the kept pixels: the gradient of the image prior (total variation, l2), Adam, and the pixels' range.

The pixels live in two image batches that take turns. A step reads one batch and writes the kept pixels of the other, so
a neighbour is always read as it was before the step, and no pixel is copied without taking a step. `gather_patches`
reads the images in place. Stopped pixels have the same values in both batches, and no step touches them. The moments of
Adam are packed, (T, C * ph * pw). The gradient of the prior needs norms over the batch or over each image, so a step
takes at least two passes: the first adds up squares, and the second does everything else.

With a gradient of G bytes, a step moves 28 + G bytes for each kept pixel. The first pass reads 4 bytes. The second one
reads 4 (the pixel), 8 (the moments) and G, and writes 12. Any step of Adam moves at least 24 + G bytes; the other 4 are
the price of the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, jit, launch, next_power_of_2, resolve_backend, tl
from .cpu import call_cpp, suits_cpp
from .dispatch import choose
from .operators import operation
from .patches import check_images, check_view, cpu_view, load_view, view_stride, wrap
from .rows import sequence_of_tokens

# The neighbours that total variation compares, as (dy, dx) from the upper pixel: right, down, and the two diagonals.
NEIGHBOURS = ((0, 1), (1, 0), (1, -1), (1, 1))
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MAX_CPP_SIDE = 1024  # of a patch in pixels; C++ leaves larger ones to plain torch
SUMS = len(NEIGHBOURS) + 1  # sums of squared differences in each direction, and the sum of squared pixels


def patch_sites(positions: Tensor, cu_seqlens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Compute where each kept patch lies and which of its neighbours are kept; one result serves many steps.

    Args:
        positions: (T,) int32 patch-grid indices, row-major, packed by image. Those of one image are distinct.
        cu_seqlens: (B + 1,) int32 cumulative counts.
        grid_size: (rows, columns) of the patch grid.

    Returns:
        (T, 4) int32: image, row, column and neighbours. Bit 3 * (r + 1) + (c + 1) of the neighbours is set if the patch
        r rows below and c columns to the right is kept, for r and c in -1, 0 and 1.

    Raises:
        ValueError: if an argument has another shape, dtype or device.
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
    # A scatter, because assigning 1 by index would copy the 1 from the host and wait for the copy.
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
    pixel_grad: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int],
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    tv_l2: float = 0.0,
    l2: float = 0.0,
    norm: str = "batch",
    backend: str = "auto",
) -> Tensor:
    """Take one step of Adam (Kingma & Ba 2015, Algorithm 1) on the kept pixels, then clamp them to their range.

    The gradient is the sum of the gradient of the model's loss, of `pixel_grad`, and of the prior of DeepInversion
    (R_prior in Yin et al., CVPR 2020), tv_l2 * total variation + l2 * norm of the pixels. Total variation is the sum
    over four neighbour directions of the l2 norm of the differences of all pixel pairs of which both are kept. The
    gradient of a norm that is 0 is 0.

    Args:
        next_images: (B, C, H, W); the kept pixels are written. The other pixels should equal those of images.
        exp_avg, exp_avg_sq: (T, C * ph * pw), the moments of Adam, zero before the first step; updated in place.
        step: (B,) int32 or int64, the number of steps that each image has taken, which is increased by one. A single
            element is a count that all images share.
        images: (B, C, H, W) float32, contiguous; not written. Pixels of stopped patches are not read.
        grad: (T, C * ph * pw) or (T, C, ph, pw) of any floating dtype, the gradient of the model's loss. Without a view
            it belongs to the kept patches; with a view, to the patches that `gather_patches` saw through it, which may
            be fewer than those that take the step.
        sites: (T, 4), made by `patch_sites`.
        lowest, highest: (C,), the range of each channel.
        inverse: (B, rows, columns) int32, made by `gather_patches`; needed with a view, and only then.
        view: see `gather_patches`. A kept pixel that is seen in a cell without a kept patch gets no gradient from the
            model's loss.
        pixel_grad: (T, C * ph * pw) or (T, C, ph, pw) of the images' dtype, a further gradient of the kept pixels in
            the plain view, such as that of a loss that reads the images themselves.
        patch_size: (ph, pw), which divide (H, W).
        lr: the learning rate, or a schedule (steps,) float32 on the images' device, from which an image takes the
            element of its own number of steps. Its last element serves all later steps.
        betas, eps: further settings of Adam.
        tv_l2, l2: the weights of the prior.
        norm: "batch": each norm in the prior runs over the whole batch, as published. "image": each norm runs over one
            image, and the prior is the sum over the images. The step of an image then depends on no other image.
        backend: "auto", "triton" or "torch".

    Returns:
        The prior of `images`, a scalar on their device.

    Raises:
        ValueError: if an argument has another shape, dtype, device, layout or value.
    """
    patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    lrs = None
    if isinstance(lr, Tensor):
        if lr.dim() != 1 or not lr.numel() or lr.dtype != torch.float32 or lr.device != images.device:
            found = f"{tuple(lr.shape)} {lr.dtype} on {lr.device}"
            raise ValueError(f"lr is {found}, not a number or (steps,) torch.float32 on {images.device}")
        lr, lrs = 1.0, lr.contiguous()
    _check_numbers(lr, betas, eps, tv_l2, l2, norm)
    _check_state(next_images, exp_avg, exp_avg_sq, step, images, sites, lowest, highest, patch_size)
    _check_gradients(images, grad, sites, inverse, view, pixel_grad, patch_size)
    plain = resolve_backend(backend, images.device) == "torch"
    if not plain and images.dtype != torch.float32:
        raise ValueError(f'images are {images.dtype}: backend "triton" takes torch.float32')
    numbers = *patch_size, float(lr), *map(float, betas), float(eps), float(tv_l2), float(l2)
    run = pixel_step_reference if plain else _pixel_step
    if plain and backend == "auto" and max(patch_size) <= MAX_CPP_SIDE and _suits_cpp(images, grad):
        run = pixel_step_in_cpp
    return run(
        next_images, exp_avg, exp_avg_sq, step, images, grad, sites, lowest, highest, inverse, view, *numbers,
        pixel_grad, norm, lrs,
    )  # fmt: skip


def _check_numbers(lr, betas, eps, tv_l2, l2, norm) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("tv_l2", tv_l2), ("l2", l2)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if norm not in ("batch", "image"):
        raise ValueError(f'norm must be "batch" or "image", got {norm!r}')


def _check_state(next_images, exp_avg, exp_avg_sq, step, images, sites, lowest, highest, patch_size) -> None:
    check_images(images, patch_size)
    (batch, channels), (ph, pw) = images.shape[:2], patch_size
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
    if (step.numel() != 1 and step.shape != (batch,)) or step.dtype not in (torch.int32, torch.int64):
        wanted = f"({batch},) or one element, torch.int32 or torch.int64"
        raise ValueError(f"step is {tuple(step.shape)} {step.dtype}, not {wanted}")
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


def _check_gradients(images, grad, sites, inverse, view, pixel_grad, patch_size) -> None:
    batch, channels, height, width = images.shape
    ph, pw = patch_size
    shapes = (len(sites), channels * ph * pw), (len(sites), channels, ph, pw)
    seen = (sites if view is None else grad).shape[:1]
    flat, square = ((*seen, *shape[1:]) for shape in shapes)
    if grad.shape not in (flat, square) or not grad.is_floating_point():
        raise ValueError(f"grad is {tuple(grad.shape)} {grad.dtype}, not floats {flat} or {square}")
    if pixel_grad is not None and (pixel_grad.shape not in shapes or pixel_grad.dtype != images.dtype):
        found, wanted = f"{tuple(pixel_grad.shape)} {pixel_grad.dtype}", f"{shapes[0]} or {shapes[1]} {images.dtype}"
        raise ValueError(f"pixel_grad is {found}, not {wanted}")
    if (view is None) != (inverse is None):
        raise ValueError(f"view and inverse come together: {'view' if view is None else 'inverse'} is None")
    if view is not None:
        check_view(view, batch)
        cells = batch, height // ph, width // pw
        if inverse.shape != cells or inverse.dtype != torch.int32:
            raise ValueError(f"inverse is {tuple(inverse.shape)} {inverse.dtype}, not {cells} torch.int32")
    for name, tensor in (("grad", grad), ("inverse", inverse), ("view", view), ("pixel_grad", pixel_grad)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}")


def pixel_step_reference(
    next_images: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor,
    images: Tensor, grad: Tensor, sites: Tensor, lowest: Tensor, highest: Tensor,
    inverse: Tensor | None, view: Tensor | None,
    ph: int, pw: int,
    lr: float, beta1: float, beta2: float, eps: float, tv_l2: float, l2: float,
    pixel_grad: Tensor | None = None, norm: str = "batch", lrs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Define `pixel_step` in plain torch."""
    batch, channels, height, width = images.shape
    image, row, column = sites[:, :3].long().unbind(1)
    # A row of a patch is a run of pw pixels; run number `column` in its row of the image.
    planes = image[:, None] * channels + torch.arange(channels, device=images.device)  # (T, C)
    rows = planes[:, :, None] * height + (row * ph)[:, None, None] + torch.arange(ph, device=images.device)
    runs = (rows * (width // pw) + column[:, None, None]).flatten()  # (T * C * ph,)
    pixels = images.view(-1, pw).index_select(0, runs)
    if view is not None:
        grad = viewed_gradient_reference(grad, sites, inverse, view, channels, ph, pw)
    grad = grad.to(images.dtype).reshape(exp_avg.shape)
    if pixel_grad is not None:
        grad = grad + pixel_grad.reshape(exp_avg.shape)
    prior = images.new_zeros(())
    if tv_l2 or l2:
        prior, prior_grad = prior_reference(images, sites, ph, pw, tv_l2, l2, norm)
        grad = prior_grad.reshape(exp_avg.shape) + grad
    step += 1
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    n = step.double().view(-1)
    lr = _rates(lr, lrs, step)
    corrections = torch.stack((lr / (1 - beta1**n), (1 - beta2**n).sqrt())).to(images.dtype)  # (2, B) or (2, 1)
    step_size, correction = corrections.expand(2, batch)[:, image, None]  # (T, 1) each
    denominator = exp_avg_sq.sqrt().div_(correction).add_(eps)
    update = (exp_avg / denominator).mul_(step_size)
    pixels = (pixels.view_as(update) - update).view(len(sites), channels, ph * pw)
    pixels = torch.minimum(torch.maximum(pixels, lowest[:, None]), highest[:, None])
    next_images.view(-1, pw).index_copy_(0, runs, pixels.view(-1, pw))
    return prior


def _rates(lr: float, lrs: Tensor | None, step: Tensor) -> float | Tensor:
    """Return the learning rate of each count of steps, which are at least 1: a number, or (counts,) float64."""
    return lr if lrs is None else lr * lrs.double()[step.long().view(-1).clamp(max=len(lrs)) - 1]


def _suits_cpp(images: Tensor, grad: Tensor) -> bool:
    return images.dtype == torch.float32 and suits_cpp(images, grad)


def pixel_step_in_cpp(
    next_images: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor,
    images: Tensor, grad: Tensor, sites: Tensor, lowest: Tensor, highest: Tensor,
    inverse: Tensor | None, view: Tensor | None,
    ph: int, pw: int,
    lr: float, beta1: float, beta2: float, eps: float, tv_l2: float, l2: float,
    pixel_grad: Tensor | None = None, norm: str = "batch", lrs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Do what `pixel_step_reference` does on a CPU in C++."""
    batch, channels, height, width = images.shape
    rows, columns = height // ph, width // pw
    shape = len(sites), batch, channels, rows, columns, ph, pw
    prior, scales = images.new_zeros(()), None
    if tv_l2 or l2:
        squares = images.new_empty(len(sites), SUMS, dtype=torch.float64)
        call_cpp("prior_squares", squares, images, sites, *shape)
        if norm == "image":
            image, row, column, _ = sites.long().unbind(1)
            cells = squares.new_zeros(batch, rows * columns, SUMS)  # as in `norm_of_images`
            sums = cells.index_put_((image, row * columns + column), squares).sum(1)
        else:
            sums = squares.sum(0)
        norms = sums.sqrt_()
        prior = (tv_l2 * norms[..., :-1].sum() + l2 * norms[..., -1].sum()).to(images.dtype)
        scales = norms.reciprocal().masked_fill_(norms == 0, 0)
        scales[..., :-1] *= tv_l2
        scales[..., -1] *= l2
        scales = scales.to(images.dtype)
    step += 1
    n = step.double().view(-1)
    lr = _rates(lr, lrs, step)
    corrections = torch.stack((lr / (1 - beta1**n), (1 - beta2**n).rsqrt()), 1).to(images.dtype)  # (B, 2) or (1, 2)
    call_cpp(
        "pixel_step", next_images, exp_avg, exp_avg_sq, images, grad.contiguous(),
        None if pixel_grad is None else pixel_grad.contiguous(), sites, lowest, highest,
        None if inverse is None else inverse.contiguous(), *cpu_view(view), scales, SUMS if norm == "image" else 0,
        corrections, 2 if len(corrections) > 1 else 0, 1 - beta1, beta2, 1 - beta2, eps, len(grad), *shape,
    )  # fmt: skip
    torch.autograd.graph.increment_version([x for x in (next_images, exp_avg, exp_avg_sq) if not x.is_inference()])
    return prior


def prior_reference(
    images: Tensor, sites: Tensor, ph: int, pw: int, tv_l2: float, l2: float, norm: str = "batch"
) -> tuple[Tensor, Tensor]:
    """Compute the prior of the kept pixels, a scalar, and its gradient for them, (T, C, ph, pw)."""
    image, row, column, bits = sites.long().unbind(1)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, ph + 2, ph).unfold(3, pw + 2, pw)
    tiles = windows[image, :, row, column]  # (T, C, ph + 2, pw + 2)
    # Each pixel of a tile lies in one of 3 x 3 patches, whose bit in the site says whether it is kept.
    down, right = (torch.arange(size + 2, device=images.device) for size in (ph, pw))
    bit = 3 * ((down > 0).int() + (down > ph).int())[:, None] + (right > 0).int() + (right > pw).int()
    kept = (bits[:, None, None, None] >> bit) & 1 != 0  # (T, 1, ph + 2, pw + 2)

    weighted_norm = norm_of_batch
    if norm == "image":
        batch, (rows, columns) = len(images), windows.shape[2:4]
        weighted_norm = partial(norm_of_images, image=image, cell=row * columns + column, shape=(batch, rows * columns))
    pixels = tiles[..., 1 : 1 + ph, 1 : 1 + pw]
    value, grad = images.new_zeros(()), torch.zeros_like(pixels)
    if tv_l2:
        value, grad = variation_of_tiles(tiles, kept, tv_l2, weighted_norm)
    if l2:
        norm_value, scale = weighted_norm(pixels, l2)
        value = value + norm_value
        grad = grad + pixels * scale
    return value, grad


def norm_of_batch(x: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Compute weight * the l2 norm of x, and weight / norm (0 for norm 0), which turns x into the gradient."""
    norm = torch.linalg.vector_norm(x)
    return weight * norm, torch.where(norm == 0, 0, weight / norm)


def norm_of_images(
    x: Tensor, weight: float, *, image: Tensor, cell: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute weight * the sum of the images' l2 norms, and the factors that turn x into its gradient.

    The squares of a patch are put into its cell of the image's grid before they are added up. A norm then does not
    depend on the order of the patches or on other images, and no sum needs atomics.

    Args:
        x: (T, C, height, width), the elements of each patch.
        image, cell: (T,) int64, the image of each patch and its index in the image's grid.
        shape: (B, number of patches in a grid).

    Returns:
        A scalar, and (T, 1, 1, 1), 0 where the norm of the patch's image is 0.
    """
    squares = x.square().flatten(1).sum(1)  # (T,)
    norms = x.new_zeros(shape).index_put_((image, cell), squares).sum(1).sqrt()  # (B,)
    scales = torch.where(norms == 0, 0, weight / norms)
    return weight * norms.sum(), scales[image, None, None, None]


def variation_of_tiles(
    tiles: Tensor, kept: Tensor, weight: float, weighted_norm: Callable = norm_of_batch
) -> tuple[Tensor, Tensor]:
    """Compute weight * the total variation of all tiles, and its gradient in their inner pixels.

    Tiles overlap by a pixel, so that every neighbour of an inner pixel is in its own tile. A pair counts once, in the
    tile where the upper pixel of the pair is an inner one (for a pair in one row, the left pixel).

    Args:
        tiles: (T, C, ph + 2, pw + 2), kept patches with a pixel around them.
        kept: (T, 1, ph + 2, pw + 2) bool, which pixels are kept. The values of other pixels do not matter.
        weighted_norm: maps differences (T, C, height, width) and the weight to a value and a factor, as
            `norm_of_batch` does.

    Returns:
        A scalar, and (T, C, ph, pw).
    """
    height, width = tiles.shape[2] - 2, tiles.shape[3] - 2
    value, grad = tiles.new_zeros(()), torch.zeros_like(tiles)
    for dy, dx in NEIGHBOURS:
        first, second = pixel_pairs(tiles, dy, dx)
        difference = zero_unless(torch.logical_and(*pixel_pairs(kept, dy, dx)), first - second)
        left = 1 - max(0, -dx)  # the column of the first inner pixel, among the first pixels of the pairs
        norm_value, scale = weighted_norm(difference[..., 1 : 1 + height, left : left + width].contiguous(), weight)
        value = value + norm_value
        difference *= scale
        grad_first, grad_second = pixel_pairs(grad, dy, dx)
        grad_first += difference
        grad_second -= difference
    return value, grad[..., 1:-1, 1:-1]


def zero_unless(condition: Tensor, x: Tensor) -> Tensor:
    """Compute torch.where(condition, x, 0) on the bits of x, which on a CPU takes an eighth of the time."""
    if x.dtype not in BITS:
        return torch.where(condition, x, 0)
    bits = BITS[x.dtype]
    return x.view(bits).bitwise_and(-condition.to(bits)).view(x.dtype)


def pixel_pairs(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Return both ends of all pixel pairs that are (dy, dx) apart, as views of x (..., H, W)."""
    height, width = x.shape[-2:]
    first = x[..., : height - dy, max(0, -dx) : width - max(0, dx)]
    second = x[..., dy:, max(0, dx) : width - max(0, -dx)]
    return first, second


def viewed_gradient_reference(
    grad: Tensor, sites: Tensor, inverse: Tensor, view: Tensor, channels: int, ph: int, pw: int
) -> Tensor:
    """Map the gradient of patches that were seen through a view to the kept pixels: (T, C * ph * pw)."""
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
    return zero_unless(token[:, None] >= 0, pixels).flatten(1)


@jit
def _element(block, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BE: tl.constexpr):
    """Return the elements [1, BE] of a block of a patch in the order (C, PH, PW), a mask of the elements that lie
    within the patch, and the channel, row and column of each."""
    e = block * BE + tl.arange(0, BE)[None, :]  # [1, BE]
    return e, e < C * PH * PW, e // (PH * PW), e // PW % PH, e % PW


@jit
def _bits(y, x, dy: tl.constexpr, dx: tl.constexpr, there, PH: tl.constexpr, PW: tl.constexpr):
    """Return the bit [1, BE] of a site that says whether the pixel (y + dy, x + dx) is kept, 0 outside the patch."""
    r = tl.where(y + dy < 0, 0, tl.where(y + dy >= PH, 2, 1))
    c = tl.where(x + dx < 0, 0, tl.where(x + dx >= PW, 2, 1))
    return tl.where(there, 1 << (3 * r + c), 0)


@jit
def _site(sites, t, last):
    """Load the image, row, column and neighbours of patches [BT, 1]. From `last` on, no bit of the neighbours is set,
    not even the bit of the patch itself."""
    image = tl.load(sites + 4 * t, mask=t < last, other=0)
    row = tl.load(sites + 4 * t + 1, mask=t < last, other=0)
    column = tl.load(sites + 4 * t + 2, mask=t < last, other=0)
    return image, row, column, tl.load(sites + 4 * t + 3, mask=t < last, other=0)


@jit
def _patches_of_norm(sites, patches, halvings, IMAGE_NORM: tl.constexpr):
    """Return the range of patches whose pixels share their norms: all patches, or the patches of the image with this
    program's index. They are found by `halvings` = ceil(log2(patches + 1)) loads from the sites, sorted by image."""
    first, last = 0, patches
    if IMAGE_NORM:
        wanted = tl.program_id(0) + tl.arange(0, 2)  # [2], this image and the next: find each one's first patch
        low, high = tl.zeros([2], tl.int32), tl.full([2], patches, tl.int32)
        for _ in range(halvings):
            middle = (low + high) // 2
            before = (low < high) & (tl.load(sites + 4 * middle, mask=low < high, other=0) < wanted)
            low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
        first, last = tl.min(low, 0), tl.max(low, 0)
    return first, last


@jit
def _difference(pixels, source, kept, bit):
    """Compute pixels minus a neighbour [BT, BE], or 0 where the neighbour is not kept."""
    mask = (kept & bit) != 0
    return tl.where(mask, pixels - tl.load(source, mask=mask, other=0.0), 0.0)


@jit(do_not_specialize=["patches", "halvings", "counts", "scheduled"])
def _prior_sums_kernel(
    sums, corrections, step,
    images, sites, lrs,
    patches, halvings, counts, scheduled, lr, log_beta1: tl.float64, log_beta2: tl.float64,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    TV: tl.constexpr, IMAGE_NORM: tl.constexpr, SCHEDULE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """sums = sum over kept p of x[p]^2, and of (x[p] - x[p + d])^2 for each direction d in which p + d is kept as well;
    step = t + 1; corrections = lr / (1 - beta1^(t + 1)) and 1 / sqrt(1 - beta2^(t + 1)), where t is the old step. With
    a schedule, lr is multiplied by its element t.

    `prior_reference` defines them, after R_prior in Yin et al., CVPR 2020, and `pixel_step_reference`, after Kingma &
    Ba 2015, Algorithm 1. The grid is (images or 1, blocks of a patch, programs that share the patches). All programs
    together read each of the T C PH PW kept pixels once, besides four neighbours from the cache, and compute 14
    operations for each. Each program writes five partial sums of its own. The first program counts the steps.
    """
    W: tl.constexpr = COLUMNS * PW
    _, there, channel, y, x = _element(tl.program_id(1), C, PH, PW, BE)
    within = channel * (ROWS * PH * W) + y * W + x  # [1, BE]
    own = _bits(y, x, 0, 0, there, PH, PW)
    right, down = _bits(y, x, 0, 1, there, PH, PW), _bits(y, x, 1, 0, there, PH, PW)
    down_left, down_right = _bits(y, x, 1, -1, there, PH, PW), _bits(y, x, 1, 1, there, PH, PW)
    squares = tl.zeros([BT, BE], tl.float32)
    right_squares, down_squares, down_left_squares, down_right_squares = squares, squares, squares, squares
    start, last = _patches_of_norm(sites, patches, halvings, IMAGE_NORM)
    for first in range(start + tl.program_id(2) * BT, last, tl.num_programs(2) * BT):
        t = first + tl.arange(0, BT)[:, None]  # [BT, 1]
        image, row, column, kept = _site(sites, t, last)
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
    program = (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    if TV:
        tl.store(sums + program, tl.sum(right_squares))
        tl.store(sums + programs + program, tl.sum(down_squares))
        tl.store(sums + 2 * programs + program, tl.sum(down_left_squares))
        tl.store(sums + 3 * programs + program, tl.sum(down_right_squares))
    tl.store(sums + 4 * programs + program, tl.sum(squares))
    if program == 0:
        # The steps are counted here, because nobody reads them before the next launch.
        for first in range(0, 2 * counts, BT * BE):
            each = first + tl.arange(0, BT * BE)  # [BT * BE], two corrections of each count
            is_second, counted = each % 2 != 0, each < 2 * counts
            n = tl.load(step + each // 2, mask=counted, other=0) + 1
            tl.debug_barrier()  # all threads have loaded these steps before one stores the next
            tl.store(step + each // 2, n, mask=counted & is_second)
            # One exponential of float64, whose error is far below the rounding of 1 - beta^n to float32, takes fewer
            # products than repeated squaring, and no state beside the count.
            power = tl.exp(n.to(tl.float64) * tl.where(is_second, log_beta2, log_beta1))
            bias = (1.0 - power).to(tl.float32)
            rate = lr
            if SCHEDULE:
                place = tl.where(n > scheduled, scheduled, n) - 1
                rate = lr * tl.load(lrs + place, mask=counted, other=0.0)
            correction = tl.div_rn(tl.where(is_second, 1.0, rate), tl.where(is_second, tl.sqrt_rn(bias), bias))
            tl.store(corrections + each, correction, mask=counted)


@jit
def _norm(sums, parts, BP: tl.constexpr):
    """Compute a norm from its partial sums of squares, which are always added up in the same order."""
    p = tl.arange(0, BP)  # [BP]
    return tl.sqrt_rn(tl.sum(tl.load(sums + p, mask=p < parts, other=0.0), 0))


@jit
def _scale(weight, norm):
    """Return the factor that turns x into the gradient of weight * norm(x): weight / norm, or 0 if the norm is 0."""
    return tl.where(norm == 0, 0.0, tl.div_rn(weight, tl.where(norm == 0, 1.0, norm)))


@jit
def _shift(
    view, image, stride_image, y, x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Return by how many cells a view moves pixels (y, x) of a patch down and right, whether it mirrors them, and where
    within a patch of the viewed image they are seen."""
    dy, dx, flip = load_view(view, image, stride_image, ROWS * PH, COLUMNS * PW)
    y, x = y + dy % PH, x + dx % PW  # up to twice a patch
    down, right = dy // PH + (y >= PH).to(tl.int32), dx // PW + (x >= PW).to(tl.int32)
    x = wrap(x, PW)
    return down, right, flip, wrap(y, PH) * PW + tl.where(flip, PW - 1 - x, x)


@jit
def _seen_cell(row, column, down, right, flip, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the cell of the viewed image in which pixels of the patch at (row, column) are seen."""
    column = wrap(column + right, COLUMNS)
    return wrap(row + down, ROWS) * COLUMNS + tl.where(flip, COLUMNS - 1 - column, column)


@jit(do_not_specialize=["patches", "halvings", "parts", "sums_stride", "corrections_stride"])
def _pixel_step_kernel(
    prior, next_images, exp_avg, exp_avg_sq,
    images, grad, pixel_grad, sites, lowest, highest, inverse, view, sums, corrections,
    patches, halvings, parts, sums_stride, corrections_stride, view_stride_image,
    weight1, beta2, weight2, eps, tv_l2, l2,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    VIEW: tl.constexpr, SHARED_VIEW: tl.constexpr, PIXEL_GRAD: tl.constexpr,
    TV: tl.constexpr, L2: tl.constexpr, IMAGE_NORM: tl.constexpr,
    BP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Take a step of Adam on each kept pixel x with the gradient g of loss and prior, and clamp x to its range:
    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, x = x - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t))
    + eps).

    `pixel_step_reference` defines it, after Kingma & Ba 2015, Algorithm 1; the prior is R_prior in Yin et al., CVPR
    2020. The grid is (images or 1, blocks of a patch, programs that share the patches). All programs together read the
    value, gradient and moments of T C PH PW kept pixels once, besides eight neighbours from the cache, and write value
    and moments. For each pixel that is 24 bytes and the gradients, and about 50 operations.
    """
    W: tl.constexpr = COLUMNS * PW
    E: tl.constexpr = C * PH * PW
    start, last = _patches_of_norm(sites, patches, halvings, IMAGE_NORM)
    if IMAGE_NORM:
        sums += tl.program_id(0) * parts
    value = 0.0
    if TV:
        norm_right, norm_down = _norm(sums, parts, BP), _norm(sums + sums_stride, parts, BP)
        norm_down_left = _norm(sums + 2 * sums_stride, parts, BP)
        norm_down_right = _norm(sums + 3 * sums_stride, parts, BP)
        value += tv_l2 * (norm_right + norm_down + norm_down_left + norm_down_right)
        scale_right, scale_down = _scale(tv_l2, norm_right), _scale(tv_l2, norm_down)
        scale_down_left, scale_down_right = _scale(tv_l2, norm_down_left), _scale(tv_l2, norm_down_right)
    if L2:
        norm = _norm(sums + 4 * sums_stride, parts, BP)
        value += l2 * norm
        scale = _scale(l2, norm)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(prior + tl.program_id(0), value)
    # Values that depend only on a pixel's place in its patch are computed once for all patches.
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
    for first in range(start + tl.program_id(2) * BT, last, tl.num_programs(2) * BT):
        t = first + tl.arange(0, BT)[:, None]  # [BT, 1]
        image, row, column, kept = _site(sites, t, last)
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
            # In a tile that is not flat the compiler sees no order in the addresses, and threads exchange their values.
            cell = tl.reshape(image * (ROWS * COLUMNS) + cell, [BT * BE])
            token = tl.load(inverse + cell, mask=tl.reshape(mask, [BT * BE]), other=-1)
            seen_at = tl.reshape(tl.broadcast_to(seen_at, [BT, BE]), [BT * BE])
            g = tl.load(grad + token.to(tl.int64) * E + seen_at, mask=token >= 0, other=0.0)
            g = tl.reshape(g, [BT, BE]).to(tl.float32)
        else:
            g = tl.load(grad + n, mask=mask, other=0.0).to(tl.float32)
        if PIXEL_GRAD:
            g += tl.load(pixel_grad + n, mask=mask, other=0.0)
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
        step_size = tl.load(corrections + image * corrections_stride)  # [BT, 1]
        correction = tl.load(corrections + image * corrections_stride + 1)
        denominator = tl.sqrt_rn(second_moment) * correction + eps
        pixels -= step_size * tl.div_rn(first_moment, denominator)
        # tl.clamp would turn NaN into a number.
        pixels = tl.where(pixels < low, low, pixels)
        pixels = tl.where(pixels > high, high, pixels)
        tl.store(next_images + place, pixels, mask=mask)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU. Without a GPU, it is that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tiles(operation: str, device: torch.device, elements: int, groups: int) -> tuple[dict[str, int], int, int]:
    """Return a kernel's constants, the blocks of a patch, and the most programs that share a group of patches.

    A program takes BT patches at a time and BE elements of each. Each thread takes one element, because a pixel's
    neighbours to the left and right cannot be read in wider accesses. A multiprocessor runs PER_SM programs at the same
    time, and no more programs than run at once share a group.
    """
    _, tiles = choose(operation, device, elements)
    blocks = cdiv(elements, tiles["BE"])
    resident = tiles.pop("PER_SM") * _multiprocessors(device) // blocks
    return tiles, blocks, max(1, resident // groups)


def _scratch(images: Tensor, groups: int, parts: int, counts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the prior of each group of patches, the sums of each program, and the corrections of Adam's bias."""
    return images.new_empty(groups), images.new_empty(SUMS, groups, parts), images.new_empty(counts, 2)


def launch_pixel_step(
    next_images: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor,
    images: Tensor, grad: Tensor, sites: Tensor, lowest: Tensor, highest: Tensor,
    inverse: Tensor | None, view: Tensor | None,
    ph: int, pw: int,
    lr: float, beta1: float, beta2: float, eps: float, tv_l2: float, l2: float,
    pixel_grad: Tensor | None = None, norm: str = "batch", lrs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Do what `pixel_step_reference` does in two launches, and in a third one if priors of images are added up."""
    batch, channels, height, width = images.shape
    size, shape = channels * ph * pw, dict(C=channels, ROWS=height // ph, COLUMNS=width // pw, PH=ph, PW=pw)
    has_prior, has_tv = bool(tv_l2 or l2), tv_l2 != 0
    image_norm = norm == "image" and has_prior
    groups, halvings = max(1, batch) if image_norm else 1, len(sites).bit_length()
    # Without a prior, the first kernel only counts the steps.
    patches = len(sites) if has_prior else 0
    tiles, blocks, sharing = _tiles("prior_sums", images.device, size, groups)
    if image_norm:
        sharing = 1  # the order in which an image's squares are added up must not depend on the batch
    most_parts = blocks * sharing
    grid = groups, blocks, max(1, min(sharing, cdiv(patches, tiles["BT"])))
    parts = grid[1] * grid[2]
    prior, sums, corrections = _scratch(images, groups, parts, step.numel())
    launch(
        _prior_sums_kernel, grid,
        sums=sums, corrections=corrections, step=step, images=images, sites=sites, lrs=lrs,
        patches=patches, halvings=halvings, counts=step.numel(), scheduled=0 if lrs is None else len(lrs), lr=lr,
        log_beta1=math.log(beta1) if beta1 else -math.inf, log_beta2=math.log(beta2) if beta2 else -math.inf,
        **shape, TV=has_tv, IMAGE_NORM=image_norm, SCHEDULE=lrs is not None, **tiles,
    )  # fmt: skip
    tiles, blocks, sharing = _tiles("pixel_step", images.device, size, groups)
    grid = groups, blocks, max(1, min(sharing, cdiv(len(sites), tiles["BT"])))
    view, inverse, pixel_grad = (x if x is None else x.contiguous() for x in (view, inverse, pixel_grad))
    launch(
        _pixel_step_kernel, grid,
        prior=prior, next_images=next_images, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, images=images,
        grad=grad.contiguous(), pixel_grad=pixel_grad, sites=sites, lowest=lowest, highest=highest, inverse=inverse,
        view=view, sums=sums, corrections=corrections, patches=len(sites), halvings=halvings, parts=parts,
        sums_stride=sums.stride(0), corrections_stride=2 if step.numel() > 1 else 0,
        view_stride_image=view_stride(view),
        weight1=1 - beta1, beta2=beta2, weight2=1 - beta2, eps=eps, tv_l2=tv_l2, l2=l2,
        **shape, VIEW=view is not None, SHARED_VIEW=view is not None and view.dim() == 1,
        PIXEL_GRAD=pixel_grad is not None, TV=has_tv, L2=l2 != 0, IMAGE_NORM=image_norm,
        BP=next_power_of_2(most_parts), **tiles,
    )  # fmt: skip
    return prior.sum() if image_norm else prior.view(())


pixel_step_op = torch.library.custom_op(
    "smi_fast::pixel_step", launch_pixel_step, mutates_args=("next_images", "exp_avg", "exp_avg_sq", "step")
)
_pixel_step = operation(pixel_step_op, launch_pixel_step, mutated=4)


@pixel_step_op.register_fake
def _fake_pixel_step(next_images, exp_avg, exp_avg_sq, step, images, *_, **__):
    return images.new_empty(())
