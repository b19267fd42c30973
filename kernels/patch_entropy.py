"""The differential entropy of the similarities between an image's patches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import LOG2_E, MAX_HEAD_DIM, MAX_SEQLEN
from .backend import cdiv, check_floats, contiguous_like, gives_way, jit, launch, next_power_of_2, tl
from .dispatch import choose, padded_head_dim
from .gradients import any_order, gradients, transformed
from .operators import differentiable, operation
from .rows import padding
from .tiles import dot, load_rows, locate, store_rows

LEAST_NORM = 1e-8  # as in torch.cosine_similarity
LEAST_DENSITY = 1e-4  # is added to a density, so that it has a logarithm
MAX_POINTS = 64
FAR = 1e4  # a similarity at which every kernel of the density is exactly 0
TILE = 1 << 15  # pairs of patches that plain torch computes at a time, so that they stay in a cache


def patch_entropy(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bandwidth: float = 0.01,
    points: int = 10,
    diagonal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Compute the entropy of the patch similarities of each of B images (Li et al. 2022, "Patch Similarity Aware
    Data-Free Quantization for Vision Transformers", equations 5 to 8, with the constants of its published code).

    The similarities are the cosines between all ordered pairs of an image's patches, after the mean over heads. A
    Gaussian kernel density p estimates how they are distributed. Its entropy, the integral of -q ln q with q = p +
    1e-4, is taken by the trapezoidal rule over equally spaced points from the least to the greatest similarity of the
    batch. These two carry no gradient. Neither pass keeps a matrix of similarities for the other one.

    Args:
        x: (T, H, D) or (T, D), one block's attention outputs of packed tokens: float32, bfloat16 or float16, and in
            plain torch also float64. The kernels compute up to 128 channels D.
        positions: (T,) int32. Tokens at negative positions, such as class tokens, are no patches: they are left out and
            get the gradient 0.
        cu_seqlens: (B + 1,) int32, cumulative lengths. Image b is `x[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: the length of the longest sequence, up to 4096.
        bandwidth: the standard deviation of the Gaussian kernel.
        points: how many points the density is computed at, from 2 to 64.
        diagonal: whether a patch and itself are a pair too, as in the published code. Without them, the density of an
            image of one patch is 0.
        backend: "auto", "triton" or "torch".

    Returns:
        (B,) float32, or float64 for float64 x.

    Raises:
        ValueError: a shape, dtype, device or number is not as described above.
    """
    _check(x, positions, cu_seqlens, max_seqlen, bandwidth, points)
    if backend == "auto" and x.shape[-1] > MAX_HEAD_DIM:
        backend = "torch"
    arguments = x, positions, cu_seqlens, max_seqlen, float(bandwidth), points, diagonal
    if not gives_way(backend, (x,), ()):
        if x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(f'x has {x.shape[-1]} channels, and backend "triton" computes up to {MAX_HEAD_DIM}')
        return _patch_entropy(*arguments)[0]
    if transformed() or torch.compiler.is_compiling():
        return patch_entropy_reference(*arguments)
    return _patch_entropy_in_tiles(*arguments)[0]


def _check(x, positions, cu_seqlens, max_seqlen, bandwidth, points) -> None:
    if x.dim() not in (2, 3) or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (tokens, heads, channels) or (tokens, channels)")
    check_floats("x", x, x.shape, x.device)
    if positions.shape != x.shape[:1] or positions.dtype != torch.int32:
        raise ValueError(f"positions is {tuple(positions.shape)} {positions.dtype}, not ({x.shape[0]},) torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (images + 1,) torch.int32")
    for name, tensor in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if not 1 <= max_seqlen <= MAX_SEQLEN:
        raise ValueError(f"max_seqlen {max_seqlen} is outside 1..{MAX_SEQLEN}")
    batch = cu_seqlens.shape[0] - 1
    if x.shape[0] > batch * max_seqlen:
        raise ValueError(f"{x.shape[0]} tokens are more than {batch} sequences of up to {max_seqlen} hold")
    check_density(bandwidth, points)


def check_density(bandwidth: float, points: int) -> None:
    """Refuse a bandwidth or a number of points that no density can be computed with.

    Raises:
        ValueError: which names the number.
    """
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    if not 2 <= points <= MAX_POINTS:
        raise ValueError(f"points must be from 2 to {MAX_POINTS}, got {points}")


def patch_entropy_reference(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bandwidth: float,
    points: int,
    diagonal: bool,
) -> Tensor:
    """Define `patch_entropy` in plain torch: (B,). Autograd keeps `points` matrices of similarities per image."""
    unit, patches = _padded(F.normalize(_mean_over_heads(x), dim=-1, eps=LEAST_NORM), positions, cu_seqlens, max_seqlen)
    similarities = unit @ unit.mT  # (B, N, N)
    pairs = patches[:, :, None] & patches[:, None]
    if not diagonal:
        pairs = pairs & ~torch.eye(max_seqlen, dtype=torch.bool, device=x.device)
    lowest = torch.where(pairs, similarities, torch.inf).amin().detach()
    highest = torch.where(pairs, similarities, -torch.inf).amax().detach()
    at = lowest + (highest - lowest) * torch.linspace(0, 1, points, dtype=unit.dtype, device=x.device)  # (points,)
    distances = (torch.where(pairs, similarities, FAR)[..., None] - at) / bandwidth  # (B, N, N, points)
    sums = (-distances.square() / 2).exp().sum((1, 2))
    count = pairs.sum((1, 2)).clamp(min=1).to(unit.dtype)[:, None]
    density = sums / (count * (bandwidth * math.sqrt(2 * math.pi)))
    density = density + LEAST_DENSITY
    return torch.trapezoid(-density * density.log(), at)


def _mean_over_heads(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.mean(1) if x.dim() == 3 else x


def _padded(unit: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Pad rows (T, D) to (B, N, D), and say which of the places hold a patch, (B, N) bool."""
    batch, patches = cu_seqlens.shape[0] - 1, positions >= 0
    if unit.shape[0] != batch * max_seqlen:
        slots, _ = padding(cu_seqlens, max_seqlen, unit.shape[0])
        unit = unit.new_zeros(batch * max_seqlen, unit.shape[1]).index_copy(0, slots, unit)
        patches = patches.new_zeros(batch * max_seqlen).index_copy(0, slots, patches)
    return unit.unflatten(0, (batch, max_seqlen)), patches.unflatten(0, (batch, max_seqlen))


def patch_entropy_in_tiles(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bandwidth: float,
    points: int,
    diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do what `launch_patch_entropy` does in plain torch, a tile of similarities at a time. Each unordered pair of
    patches is computed once."""
    mean = _mean_over_heads(x)
    norms = torch.linalg.vector_norm(mean, dim=-1).clamp_(min=LEAST_NORM)
    unit = mean / norms[:, None]
    rows, patches = _padded(unit, positions, cu_seqlens, max_seqlen)
    own = torch.where(patches, rows.square().sum(-1), FAR)  # (B, N), the similarity of each patch and itself
    lowest, highest = [], []
    for images, at, on in _tiles(*patches.shape):
        similarities, pairs = _similarities(rows, patches, images, at, on)
        lowest.append(torch.where(pairs, similarities, torch.inf).amin())
        highest.append(torch.where(pairs, similarities, -torch.inf).amax())
    if diagonal:
        lowest.append(own.amin())
        highest.append(torch.where(patches, own, -torch.inf).amax())
    lowest, highest = torch.stack(lowest).amin(), torch.stack(highest).amax()
    spaced = lowest + (highest - lowest) * torch.linspace(0, 1, points, dtype=unit.dtype, device=x.device)
    sums = rows.new_zeros(patches.shape[0], points)
    for images, at, on in _tiles(*patches.shape):
        similarities, pairs = _similarities(rows, patches, images, at, on)
        kernels, _ = _kernels(similarities.masked_fill_(~pairs, FAR), spaced, bandwidth)
        sums[images] += kernels.sum(-1)
    sums *= 2
    count = patches.sum(1)
    count = count * (count if diagonal else count - 1)
    if diagonal:
        sums += _kernels(own, spaced, bandwidth)[0].sum(-1)
    count = count.clamp(min=1).to(unit.dtype)[:, None]  # (B, 1)
    factor = 1 / (count * (bandwidth * math.sqrt(2 * math.pi)))
    density = sums * factor + LEAST_DENSITY
    weights = torch.full_like(spaced, 1.0)
    weights[0] = weights[-1] = 0.5
    weights *= (lowest - highest) / (points - 1)
    logarithms = density.log()
    entropies = (weights * density * logarithms).sum(1)
    return entropies, unit, norms.reciprocal(), spaced, weights * (logarithms + 1) * factor


def _tiles(batch: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield images, rows and columns of the tiles that cover the upper triangle of all similarity matrices."""
    height = max(1, min(cdiv(length, 4), TILE // length))
    depth = max(1, TILE // (height * length))
    for image in range(0, batch, depth):
        for row in range(0, length, height):
            yield slice(image, image + depth), slice(row, row + height), slice(row, length)


def _similarities(rows: Tensor, patches: Tensor, images: slice, at: slice, on: slice) -> tuple[Tensor, Tensor]:
    """Return a tile of similarities, and whether each of them is of a pair of two patches, the second behind the
    first: (b, m, n) each."""
    pairs = (patches[images, at, None] & patches[images, None, on]).triu(1)
    return rows[images, at] @ rows[images, on].mT, pairs


def _kernels(similarities: Tensor, spaced: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return exp(-(d / bandwidth)^2 / 2) of the distances d = s - t of similarities s (b, ...) from all points t, and
    the distances: (b, points, pairs) each. On a CPU, torch's exp takes ten times as long where it underflows as its
    exp2 does."""
    distances = similarities.flatten(1)[:, None] - spaced[:, None]
    return torch.square(distances).mul_(-(_sharpness(bandwidth) ** 2)).exp2_(), distances


def patch_entropy_backward_in_tiles(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    unit: Tensor,
    inverse: Tensor,
    spaced: Tensor,
    slopes: Tensor,
    max_seqlen: int,
    bandwidth: float,
) -> Tensor:
    """Do what `launch_patch_entropy_backward` does in plain torch, a tile of similarities at a time."""
    rows, patches = _padded(unit, positions, cu_seqlens, max_seqlen)
    factors = (slopes * (-2 / bandwidth**2))[:, None]  # (B, 1, points), of pairs that stand for two ordered ones
    of_rows = torch.zeros_like(rows)
    for images, at, on in _tiles(*patches.shape):
        similarities, pairs = _similarities(rows, patches, images, at, on)
        kernels, distances = _kernels(similarities.masked_fill_(~pairs, FAR), spaced, bandwidth)
        of_pairs = (factors[images] @ kernels.mul_(distances)).view(pairs.shape)
        of_rows[images, at] += of_pairs @ rows[images, on]
        of_rows[images, on] += of_pairs.mT @ rows[images, at]
    of_rows = (of_rows * grad[:, None, None]).view(-1, x.shape[-1])  # here, because grad may be a batch of gradients
    if of_rows.shape[0] != x.shape[0]:
        of_rows = of_rows[padding(cu_seqlens, max_seqlen, x.shape[0])[0]]
    along = (of_rows * unit).sum(-1, keepdim=True).masked_fill_((inverse >= 1 / LEAST_NORM)[:, None], 0)
    of_mean = (of_rows - unit * along) * inverse[:, None]
    if x.dim() == 3:
        return (of_mean / x.shape[1]).to(x.dtype)[:, None].expand(x.shape)
    return of_mean.to(x.dtype)


@jit
def _are_patches(positions, tokens, length):
    """Return which tokens [BN] of a sequence are patches."""
    return tl.load(positions + tokens, mask=tokens < length, other=-1) >= 0


@jit(do_not_specialize=["blocks"])
def _unit_kernel(unit, inverse, x, cu_seqlens, blocks, heads, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """n = a / max(|a|, 1e-8), where a is the mean of a token over heads. The cosine of two tokens is then n_i . n_j.

    All programs together read x, T H D elements, and write T (D + 1) float32.
    """
    start, length, block = locate(cu_seqlens, blocks)
    tokens = block.to(tl.int32) * BN + tl.arange(0, BN)  # [BN]
    total = tl.zeros([BN, BD], tl.float32)  # [BN, BD], heads times the mean, which has the same direction
    x += start * heads * D
    for head in range(heads):
        total += load_rows(x + head * D, tokens, length, heads * D, D, BD).to(tl.float32)
    norm = tl.sqrt(tl.sum(total * total, 1))  # [BN]
    least = 1e-8 * heads
    store_rows(unit + start * D, total / tl.maximum(norm, least)[:, None], tokens, length, D, D, BD)
    tl.store(inverse + start + tokens, tl.where(norm > least, heads / norm, 1e8), mask=tokens < length)


@jit(do_not_specialize=["blocks"])
def _range_kernel(
    ranges,
    unit,
    positions,
    cu_seqlens,
    blocks,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """The least and the greatest s_ij = n_i . n_j over the patches i of a block and the patches j from i on.

    With K patches an image, all programs together compute K^2 D operations for it, and read each row about K / (2 BN)
    times, from cache. They write two numbers for each block.
    """
    start, length, block = locate(cu_seqlens, blocks)
    unit += start * D
    positions += start
    m = block.to(tl.int32) * BN + tl.arange(0, BN)  # [BN]
    rows, of_rows = load_rows(unit, m, length, D, D, BD), _are_patches(positions, m, length)  # [BN, BD], [BN]
    lowest = tl.full([BN, BN], float("inf"), tl.float32)  # [BN, BN]
    highest = tl.full([BN, BN], float("-inf"), tl.float32)  # [BN, BN]
    for first in range(block.to(tl.int32) * BN, length, BN):
        n = first + tl.arange(0, BN)  # [BN]
        s = dot(rows, tl.trans(load_rows(unit, n, length, D, D, BD)))  # [BN, BN]
        pairs = of_rows[:, None] & _are_patches(positions, n, length)[None, :]  # [BN, BN]
        pairs &= (m[:, None] <= n[None, :]) if DIAGONAL else (m[:, None] < n[None, :])
        lowest = tl.minimum(lowest, tl.where(pairs, s, float("inf")))
        highest = tl.maximum(highest, tl.where(pairs, s, float("-inf")))
    program = tl.program_id(0).to(tl.int64)
    tl.store(ranges + 2 * program, tl.min(tl.min(lowest, 1), 0))
    tl.store(ranges + 2 * program + 1, tl.max(tl.max(highest, 1), 0))


@jit
def _whole_range(ranges, programs):
    """Return the least and the greatest similarity of the batch from those of all programs."""
    lowest = tl.full([256], float("inf"), tl.float32)  # [256]
    highest = tl.full([256], float("-inf"), tl.float32)  # [256]
    for first in range(0, programs, 256):
        program = first + tl.arange(0, 256)  # [256]
        within = program < programs
        lowest = tl.minimum(lowest, tl.load(ranges + 2 * program, mask=within, other=float("inf")))
        highest = tl.maximum(highest, tl.load(ranges + 2 * program + 1, mask=within, other=float("-inf")))
    return tl.min(lowest, 0), tl.max(highest, 0)


@jit(do_not_specialize=["blocks", "programs"])
def _sum_kernel(
    sums,
    ranges,
    unit,
    positions,
    cu_seqlens,
    sharpness,
    blocks,
    programs,
    POINTS: tl.constexpr,
    BP: tl.constexpr,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum_ij exp(-((s_ij - t_k) / bandwidth)^2 / 2) over the pairs of a block's patches i and all patches j, for each
    point t_k of the density (Li et al. 2022, equation 6). The similarities s_ij = s_ji are computed once for both, and
    sharpness^2 = log2(e) / 2 / bandwidth^2.

    With K patches an image, all programs together compute K^2 D operations and K^2 / 2 exponentials for each point, and
    read what `_range_kernel` does. They write BP numbers for each block.
    """
    start, length, block = locate(cu_seqlens, blocks)
    unit += start * D
    positions += start
    lowest, highest = _whole_range(ranges, programs)
    m = block.to(tl.int32) * BN + tl.arange(0, BN)  # [BN]
    rows, of_rows = load_rows(unit, m, length, D, D, BD), _are_patches(positions, m, length)  # [BN, BD], [BN]
    point = tl.arange(0, BP)  # [BP]
    found = tl.zeros([BP], tl.float32)  # [BP]
    for first in range(block.to(tl.int32) * BN, length, BN):
        n = first + tl.arange(0, BN)  # [BN]
        s = dot(rows, tl.trans(load_rows(unit, n, length, D, D, BD)))  # [BN, BN]
        pairs = of_rows[:, None] & _are_patches(positions, n, length)[None, :]  # [BN, BN]
        weight = tl.where(pairs & (m[:, None] < n[None, :]), 2.0, 0.0)  # [BN, BN]
        if DIAGONAL:
            weight = tl.where(pairs & (m[:, None] == n[None, :]), 1.0, weight)
        for k in tl.static_range(POINTS):
            distance = (s - (lowest + (highest - lowest) * (k / (POINTS - 1)))) * sharpness  # [BN, BN]
            total = tl.sum(tl.sum(weight * tl.exp2(-distance * distance), 1), 0)
            found = tl.where(point == k, found + total, found)
    tl.store(sums + tl.program_id(0).to(tl.int64) * BP + point, found)


@jit(do_not_specialize=["blocks", "programs"])
def _entropy_kernel(
    entropies,
    slopes,
    spaced,
    sums,
    ranges,
    positions,
    cu_seqlens,
    bandwidth,
    blocks,
    programs,
    POINTS: tl.constexpr,
    BP: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """-sum_k w_k q_k ln q_k of one image, with q_k = p_k + 1e-4, the density p_k = (sum of the kernels) / (M bandwidth
    sqrt(2 pi)) over M pairs, and the weights w_k of the trapezoidal rule (Li et al. 2022, equations 6 to 8).

    Also the slopes, the derivatives of this by the sums of the kernels, and the points t_k. A program reads the sums of
    its image's blocks, the ranges of all blocks and its positions.
    """
    image = tl.program_id(0).to(tl.int64)
    start, length, _ = locate(cu_seqlens, 1)
    lowest, highest = _whole_range(ranges, programs)
    step = (highest - lowest) / (POINTS - 1)
    point = tl.arange(0, BP)  # [BP]
    total = tl.zeros([BP], tl.float32)  # [BP]
    for block in range(blocks):
        total += tl.load(sums + (image * blocks + block) * BP + point)
    patches = tl.zeros([256], tl.int32)  # [256]
    for first in range(0, length, 256):
        patches += _are_patches(positions + start, first + tl.arange(0, 256), length).to(tl.int32)
    count = tl.sum(patches, 0)
    count = count * (count if DIAGONAL else count - 1)
    factor = 1 / (tl.maximum(count, 1).to(tl.float32) * bandwidth * 2.5066282746310002)  # the root of 2 pi
    q = total * factor + 1e-4  # [BP]
    weight = tl.where((point == 0) | (point == POINTS - 1), 0.5 * step, step)  # [BP]
    weight = tl.where(point < POINTS, weight, 0.0)
    logarithm = tl.log(q)  # [BP]
    tl.store(entropies + image, -tl.sum(weight * q * logarithm, 0))
    tl.store(slopes + image * POINTS + point, -weight * (logarithm + 1) * factor, mask=point < POINTS)
    if image == 0:
        share = tl.div_rn(point.to(tl.float32), 1.0 * (POINTS - 1))
        tl.store(spaced + point, lowest + (highest - lowest) * share, mask=point < POINTS)


@jit(do_not_specialize=["blocks"])
def _backward_kernel(
    grad_x,
    grad,
    unit,
    inverse,
    positions,
    spaced,
    slopes,
    cu_seqlens,
    sharpness,
    factor,
    blocks,
    heads,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """dn_i = 2 sum_j g_ij n_j with g_ij = d(entropy) / bandwidth^2 sum_k slope_k (t_k - s_ij) exp(-((s_ij - t_k) /
    bandwidth)^2 / 2), and da_i = (dn_i - n_i (n_i . dn_i)) / |a_i| for each head, divided by their number (the chain
    rule on `_entropy_kernel`, `_sum_kernel` and `_unit_kernel`). factor is 2 / bandwidth^2 / heads.

    With K patches an image, all programs together compute 4 K^2 D operations and K^2 exponentials for each point. They
    write the gradient of x once.
    """
    start, length, block = locate(cu_seqlens, blocks)
    image = tl.program_id(0).to(tl.int64) // blocks
    unit += start * D
    positions += start
    m = block.to(tl.int32) * BN + tl.arange(0, BN)  # [BN]
    rows, of_rows = load_rows(unit, m, length, D, D, BD), _are_patches(positions, m, length)  # [BN, BD], [BN]
    acc = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
    for first in range(0, length, BN):
        n = first + tl.arange(0, BN)  # [BN]
        columns = load_rows(unit, n, length, D, D, BD)  # [BN, BD]
        s = dot(rows, tl.trans(columns))  # [BN, BN]
        of_pairs = tl.zeros([BN, BN], tl.float32)  # [BN, BN]
        for k in tl.static_range(POINTS):
            distance = s - tl.load(spaced + k)  # [BN, BN]
            scaled = distance * sharpness
            of_pairs -= tl.load(slopes + image * POINTS + k) * distance * tl.exp2(-scaled * scaled)
        pairs = of_rows[:, None] & _are_patches(positions, n, length)[None, :] & (m[:, None] != n[None, :])
        acc += dot(tl.where(pairs, of_pairs, 0.0), columns)
    reciprocal = tl.load(inverse + start + m, mask=m < length, other=0.0)  # [BN]
    along = tl.where(reciprocal < 1e8, tl.sum(acc * rows, 1), 0.0)  # [BN], 0 where the norm is the least one
    acc = (acc - rows * along[:, None]) * (reciprocal * factor * tl.load(grad + image).to(tl.float32))[:, None]
    grad_x += start * heads * D
    for head in range(heads):
        store_rows(grad_x + head * D, acc, m, length, heads * D, D, BD)


def launch_patch_entropy(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bandwidth: float,
    points: int,
    diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass in Triton.

    Returns the entropies (B,), and what the backward pass reads, all float32: the mean over heads of each token as a
    unit vector (T, D) and 1 / its norm (T,), the points of the density (points,), and the derivative of each entropy by
    the sums of the kernels at the points, (B, points)."""
    entropies, unit, inverse, spaced, slopes = outputs = _fake_outputs(x, cu_seqlens, points)
    _, tiles = choose("patch_entropy", x.device, x.shape[-1])
    batch, blocks = cu_seqlens.shape[0] - 1, cdiv(max_seqlen, tiles["BN"])
    programs, BP = batch * blocks, max(2, next_power_of_2(points))
    ranges, sums = unit.new_empty(programs, 2), unit.new_empty(programs, BP)
    positions = positions.contiguous()
    packed = {"positions": positions, "cu_seqlens": cu_seqlens, "blocks": blocks}
    rows = {"D": x.shape[-1], "BD": padded_head_dim(x.shape[-1]), **tiles}
    launch(
        _unit_kernel, (programs,), unit=unit, inverse=inverse, x=x.contiguous(), cu_seqlens=cu_seqlens, blocks=blocks,
        heads=_heads(x), **rows,
    )  # fmt: skip
    launch(_range_kernel, (programs,), ranges=ranges, unit=unit, **packed, DIAGONAL=diagonal, **rows)
    launch(
        _sum_kernel, (programs,), sums=sums, ranges=ranges, unit=unit, **packed, sharpness=_sharpness(bandwidth),
        programs=programs, POINTS=points, BP=BP, DIAGONAL=diagonal, **rows,
    )  # fmt: skip
    launch(
        _entropy_kernel, (batch,), entropies=entropies, slopes=slopes, spaced=spaced, sums=sums, ranges=ranges,
        **packed, bandwidth=bandwidth, programs=programs, POINTS=points, BP=BP, DIAGONAL=diagonal, num_warps=1,
    )  # fmt: skip
    return outputs


def _heads(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def _sharpness(bandwidth: float) -> float:
    """Return the factor f of distances d with exp2(-(f d)^2) = exp(-(d / bandwidth)^2 / 2)."""
    return math.sqrt(LOG2_E / 2) / bandwidth


def _fake_outputs(x: Tensor, cu_seqlens: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (tokens, *_, channels) = cu_seqlens.shape[0] - 1, x.shape
    shapes = (batch,), (tokens, channels), (tokens,), (points,), (batch, points)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


patch_entropy_op = torch.library.custom_op("smi_fast::patch_entropy", launch_patch_entropy, mutates_args=())


@patch_entropy_op.register_fake
def _fake_patch_entropy(x, positions, cu_seqlens, max_seqlen, bandwidth, points, diagonal):
    return _fake_outputs(x, cu_seqlens, points)


def launch_patch_entropy_backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    unit: Tensor,
    inverse: Tensor,
    spaced: Tensor,
    slopes: Tensor,
    max_seqlen: int,
    bandwidth: float,
) -> Tensor:
    """Compute the gradient of x in Triton from that of the entropies, (B,). The tensors from `unit` to `slopes` are
    what `launch_patch_entropy` returned. Of x only shape and dtype are read."""
    grad_x = _fake_patch_entropy_backward(grad, x)
    _, tiles = choose("patch_entropy_backward", x.device, x.shape[-1])
    blocks = cdiv(max_seqlen, tiles["BN"])
    launch(
        _backward_kernel, ((cu_seqlens.shape[0] - 1) * blocks,), grad_x=grad_x, grad=grad.contiguous(), unit=unit,
        inverse=inverse, positions=positions.contiguous(), spaced=spaced, slopes=slopes, cu_seqlens=cu_seqlens,
        sharpness=_sharpness(bandwidth), factor=2 / bandwidth**2 / _heads(x), blocks=blocks, heads=_heads(x),
        POINTS=spaced.shape[0], D=x.shape[-1], BD=padded_head_dim(x.shape[-1]), **tiles,
    )  # fmt: skip
    return grad_x


patch_entropy_backward_op = torch.library.custom_op(
    "smi_fast::patch_entropy_backward", launch_patch_entropy_backward, mutates_args=()
)


@patch_entropy_backward_op.register_fake
def _fake_patch_entropy_backward(grad, x, *_):
    return contiguous_like(x)


def _save_for_backward(ctx, inputs, output) -> None:
    x, positions, cu_seqlens, ctx.max_seqlen, ctx.bandwidth, ctx.points, ctx.diagonal = inputs
    _, *statistics = output
    ctx.save_for_backward(x, positions, cu_seqlens, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _derivative(ctx, grad, *_):
    x, positions, cu_seqlens, *_ = ctx.saved_tensors
    settings = ctx.max_seqlen, ctx.bandwidth, ctx.points, ctx.diagonal

    def definition(x):
        return patch_entropy_reference(x, positions, cu_seqlens, *settings)

    return *gradients(definition, (x,), grad), *(None,) * 6


@any_order(_derivative)
def _backward(ctx, grad, *_):
    return _patch_entropy_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.bandwidth), *(None,) * 6


@any_order(_derivative)
def _backward_in_tiles(ctx, grad, *_):
    return patch_entropy_backward_in_tiles(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.bandwidth), *(None,) * 6


_patch_entropy_backward = operation(patch_entropy_backward_op, launch_patch_entropy_backward)
_patch_entropy = operation(patch_entropy_op, launch_patch_entropy, setup_context=_save_for_backward, backward=_backward)
_patch_entropy_in_tiles = differentiable(patch_entropy_in_tiles, _save_for_backward, _backward_in_tiles)
