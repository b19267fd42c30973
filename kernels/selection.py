"""Class-token attention -> the patches that stay, and their tokens gathered into a packed batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, jit, launch, next_power_of_2, resolve_backend, tl
from .rows import gather_rows

MAX_CANDIDATES = 4096
LEAST_MASS = 2.0**-60  # of a total below 2^52 this is less than the least unit: any smaller share means the same


class Selection(NamedTuple):
    """The tokens that stay, packed: the fields of PackedTokens. `values` is None where none were given."""

    values: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def select_tokens(
    attention: Tensor,
    values: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    k: int | None = None,
    mass: float | None = None,
    num_prefix_tokens: int = 0,
    backend: str = "auto",
) -> Selection:
    """Keep the most important of N patches per image, and gather their tokens.

    Importance is the mean of `attention` over the heads, in float32. The highest stay; of equals the lower index stays;
    what stays is in ascending order of index. The pick is the same on every device and backend.

    Args:
        attention: (B, H, N) the class token's attention to each of up to 4096 candidates, or (B, N); float32, bfloat16
            or float16. No gradient flows to it.
        values: (B, P + N, C) tokens of any float dtype, prefix tokens first. Gradients flow to those that stay.
        positions: (B, N) index of each candidate in the patch grid; 0..N-1 by default.
        k: how many patches of each image stay, 1..N.
        mass: keep the fewest patches whose importance sums to at least this share, in (0, 1], of the image's total; one
            where that total is zero. Synchronises with the host once, to learn how many that is.
        num_prefix_tokens: P, tokens that always stay; token p of them gets position p - P.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: an argument outside of the above; on a CPU also an importance that is NaN (with `mass`: negative or
            infinite), which on a GPU is a device-side assertion.
    """
    if attention.dim() == 2:
        attention = attention.unsqueeze(1)
    _check_selection(attention, values, positions, k, mass, num_prefix_tokens)
    attention = attention.detach()
    if resolve_backend(backend, attention.device) == "torch":
        return select_reference(attention, values, positions, k, mass, num_prefix_tokens)
    cu_seqlens, max_seqlen = None, num_prefix_tokens + (k or 0)
    tokens = len(attention) * max_seqlen
    if mass is not None:
        counts, valid = count_mass_op(attention, mass, num_prefix_tokens)
        _assert_valid(valid, mass)
        cu_seqlens, tokens, max_seqlen = _pack(counts)
    packed, positions, cu_seqlens, _, valid = select_op(
        attention, values, positions, cu_seqlens, k or 0, mass or 0.0, num_prefix_tokens, tokens
    )
    if mass is None:
        _assert_valid(valid, mass)
    return Selection(None if values is None else packed, positions, cu_seqlens, max_seqlen)


def _check_selection(attention, values, positions, k, mass, num_prefix_tokens) -> None:
    if attention.dim() != 3 or attention.shape[1] == 0:
        raise ValueError(f"attention has shape {tuple(attention.shape)}, not (batch, [heads,] patches)")
    if attention.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"attention has dtype {attention.dtype}; float32, bfloat16 and float16 are possible")
    batch, _, candidates = attention.shape
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(f"attention has {candidates} patches, outside 1..{MAX_CANDIDATES}")
    if (k is None) == (mass is None):
        raise ValueError(f"exactly one of k and mass is needed, not k={k} and mass={mass}")
    if k is not None and not 1 <= k <= candidates:
        raise ValueError(f"k={k} is outside 1..{candidates}")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass={mass} is outside (0, 1]")
    if values is None and num_prefix_tokens != 0:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} without values that hold them")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} is negative")
    if values is not None:
        if values.dim() != 3 or values.shape[:2] != (batch, num_prefix_tokens + candidates):
            raise ValueError(
                f"values has shape {tuple(values.shape)}, not ({batch}, {num_prefix_tokens + candidates}, channels)"
            )
        if not values.is_floating_point():
            raise ValueError(f"values has dtype {values.dtype}, not a floating-point one")
    if positions is not None:
        if positions.shape != (batch, candidates):
            raise ValueError(f"positions has shape {tuple(positions.shape)}, not ({batch}, {candidates})")
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"positions has dtype {positions.dtype}, not torch.int32 or torch.int64")
    for name, tensor in (("values", values), ("positions", positions)):
        if tensor is not None and tensor.device != attention.device:
            raise ValueError(f"{name} is on {tensor.device}, attention on {attention.device}")


def select_reference(
    attention: Tensor,
    values: Tensor | None,
    positions: Tensor | None,
    k: int | None,
    mass: float | None,
    num_prefix_tokens: int,
) -> Selection:
    """What `select_tokens` means, in plain torch."""
    batch, _, candidates = attention.shape
    if positions is None:
        positions = torch.arange(candidates, device=attention.device).expand(batch, -1)
    importance = mean_over_heads(attention)
    valid = importance == importance if mass is None else (importance >= 0) & (importance < torch.inf)
    _assert_valid(valid.all(1), mass)
    kept = top_k(importance, k) if mass is None else top_mass(importance, mass)  # (B, N)
    kept = F.pad(kept, (num_prefix_tokens, 0), value=True)  # (B, P + N)
    if mass is None:
        tokens, max_seqlen = batch * (num_prefix_tokens + k), num_prefix_tokens + k
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=kept.device) * max_seqlen
    else:
        cu_seqlens, tokens, max_seqlen = _pack(kept.sum(1))
    # Row t of the packed batch is row rows[t] of (B * (P + N)); what does not stay goes to a place behind the last.
    kept = kept.flatten()
    slots = torch.where(kept, kept.cumsum(0) - 1, tokens)
    rows = slots.new_empty(tokens + 1).scatter_(0, slots, torch.arange(len(kept), device=kept.device))[:tokens]
    prefix = torch.arange(-num_prefix_tokens, 0, device=kept.device).expand(batch, -1)
    positions = torch.cat([prefix, positions], 1).flatten()[rows].to(torch.int32)
    values = None if values is None else gather_rows(values.flatten(0, 1), rows)
    return Selection(values, positions, cu_seqlens, max_seqlen)


def mean_over_heads(attention: Tensor) -> Tensor:
    """Importance: (B, H, N) -> (B, N) float32, summed over the heads in their order, without negative zeros.

    The product in float64 rounds to what a division in float32 would be, and does so alike on every device."""
    total = attention[:, 0].float()
    for head in range(1, attention.shape[1]):
        total = total + attention[:, head].float()
    importance = (total.double() * (1 / attention.shape[1])).float()
    return torch.where(importance == 0, 0.0, importance)


def top_k(importance: Tensor, k: int) -> Tensor:
    """Mask (B, N) of the k highest of each row, of equals the first."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :k], True)


def top_mass(importance: Tensor, mass: float) -> Tensor:
    """Mask (B, N) of the fewest entries whose sum is at least `mass` of the row's, the highest first, at least one."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    units = fixed_point(importance).gather(1, order)
    target = units.sum(1, keepdim=True).double() * max(mass, LEAST_MASS)
    kept = (units.cumsum(1) - units).double() < target
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)


def fixed_point(importance: Tensor) -> Tensor:
    """(B, N) int64 multiples of a power of two of each row's own, so that sums are exact and stay below 2^52."""
    exponent = importance.amax(1, keepdim=True).view(torch.int32).long() >> 23  # the maximum is < 2^(exponent - 126)
    shift = _fixed_point_bits(importance.shape[1]) + 126 - exponent
    return (importance.double() * (shift + 1023 << 52).view(torch.float64)).long()


def _fixed_point_bits(candidates: int) -> int:
    """Of each importance, so that the sum of all stays below 2^52."""
    return 52 - (candidates - 1).bit_length()


def _pack(counts: Tensor) -> tuple[Tensor, int, int]:
    """Cumulative lengths, the total and the longest of (B,) counts; synchronises with the host once."""
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0))
    if len(counts) == 0:
        return cu_seqlens.int(), 0, 0
    tokens, max_seqlen = torch.stack([cu_seqlens[-1], counts.max()]).tolist()
    return cu_seqlens.int(), tokens, max_seqlen


def _assert_valid(valid: Tensor, mass: float | None) -> None:
    """Raise unless all of (B,) images are valid: at once on a CPU, by an assertion on the device elsewhere."""
    needed = "must not be NaN" if mass is None else "must be neither NaN, negative nor infinite"
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(valid.all(), f"importance {needed}")
    elif not valid.all():
        raise ValueError(f"importance {needed}, and is so in row {int(valid.logical_not().nonzero()[0])}")


@jit
def _mean_over_heads(attention, stride_head, stride_patch, n, candidates, H: tl.constexpr, NONNEGATIVE: tl.constexpr):
    """Importance [BN] of candidates n, zero where it is not valid, and where it is; summed over the heads in order."""
    mask = (n >= 0) & (n < candidates)  # [BN]
    total = tl.zeros(n.shape, tl.float32)  # [BN]
    for _ in range(H):
        total += tl.load(attention + n.to(tl.int64) * stride_patch, mask=mask, other=0.0).to(tl.float32)
        attention += stride_head
    importance = (total.to(tl.float64) * (1 / H)).to(tl.float32)
    valid = importance == importance
    if NONNEGATIVE:
        valid = (importance >= 0.0) & (importance < float("inf"))
    return tl.where(valid & (importance != 0.0), importance, 0.0), valid


@jit
def _ordered(importance, n, candidates):
    """int32 keys [BN] in the order of the floats; below all of them where n is no candidate."""
    bits = importance.to(tl.int32, bitcast=True)
    return tl.where((n >= 0) & (n < candidates), bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@jit
def _threshold(importance, key, n, candidates, k, mass, MASS: tl.constexpr, BITS: tl.constexpr):
    """The key of the last candidate that stays, and how many of those equal to it stay.

    All candidates above the threshold stay, since together they hold less than the target: k, each counting as one, or
    with MASS the share of the sum in fixed point. Found by bisection: 32 sums over the tile, no sort."""
    if MASS:
        exponent = tl.max(importance, 0).to(tl.int32, bitcast=True) >> 23
        unit = ((BITS + 126 + 1023 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        units = (importance.to(tl.float64) * unit).to(tl.int64)  # [BN]
        total = tl.sum(units, 0)
        target = tl.maximum(tl.ceil(total.to(tl.float64) * mass).to(tl.int64), 1)
        units = tl.where((total == 0) & (n < candidates), 1, units)
    else:
        units = tl.full(n.shape, 1, tl.int32)  # [BN]
        target = k
    threshold = tl.where(tl.sum(tl.where(key >= 0, units, 0), 0) >= target, 0, -0x80000000)
    step = 1 << 30
    for _ in range(31):
        higher = threshold + step
        threshold = tl.where(tl.sum(tl.where(key >= higher, units, 0), 0) >= target, higher, threshold)
        step = step >> 1
    ties = target - tl.sum(tl.where(key > threshold, units, 0), 0)
    if MASS:
        each = tl.max(tl.where(key == threshold, units, 0), 0)
        ties = tl.sum((n * each < ties).to(tl.int32), 0)  # ties / each, rounded up
    return threshold, ties


@jit
def _count_kernel(
    counts,
    valid,
    attention,
    candidates,
    prefix,
    mass: tl.float64,
    stride_image,
    stride_head,
    stride_patch,
    H: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads attention once (B H N elements) and writes B counts of tokens; 32 sums over N an image."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)  # [BN]
    attention += image * stride_image
    importance, is_valid = _mean_over_heads(attention, stride_head, stride_patch, n, candidates, H, True)  # [BN]
    key = _ordered(importance, n, candidates)  # [BN]
    threshold, ties = _threshold(importance, key, n, candidates, 0, mass, True, BITS)
    tl.store(counts + image, prefix + tl.sum((key > threshold).to(tl.int32), 0) + ties)
    tl.store(valid + image, tl.min(is_valid.to(tl.int32), 0) != 0)


@jit
def _select_kernel(
    packed,
    packed_positions,
    cu_seqlens,
    slots,
    valid,
    attention,
    values,
    positions,
    starts,
    candidates,
    prefix,
    channels,
    k,
    mass: tl.float64,
    stride_image,
    stride_head,
    stride_patch,
    values_stride_image,
    values_stride_row,
    positions_stride_image,
    positions_stride_patch,
    H: tl.constexpr,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    POSITIONS: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Reads attention once a block of BR rows, and reads and writes the kept tokens once (2 T C elements); 32 sums over
    N a block. A row is one of an image's P + N tokens."""
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BR
    n = tl.arange(0, BN)  # [BN], all candidates
    attention += image * stride_image
    importance, is_valid = _mean_over_heads(attention, stride_head, stride_patch, n, candidates, H, MASS)  # [BN]
    if first == 0:
        tl.store(valid + image, tl.min(is_valid.to(tl.int32), 0) != 0)
    key = _ordered(importance, n, candidates)  # [BN]
    threshold, ties = _threshold(importance, key, n, candidates, k, mass, MASS, BITS)

    # What stays of the rows before this block.
    before = n < first - prefix  # [BN]
    ties_before = tl.sum((before & (key == threshold)).to(tl.int32), 0)
    kept_before = tl.sum((before & (key > threshold)).to(tl.int32), 0) + tl.minimum(ties_before, ties)
    kept_before += tl.minimum(first, prefix)

    # What stays of this block's rows, and where it goes.
    row = first + tl.arange(0, BR)  # [BR]
    candidate = row - prefix  # [BR], negative for a prefix token
    own, _ = _mean_over_heads(attention, stride_head, stride_patch, candidate, candidates, H, MASS)  # [BR]
    own_key = _ordered(own, candidate, candidates)  # [BR]
    tie = own_key == threshold  # [BR]
    tie_stays = tie & (ties_before + tl.cumsum(tie.to(tl.int32), 0) <= ties)
    kept = (row < prefix) | ((candidate >= 0) & (candidate < candidates) & ((own_key > threshold) | tie_stays))
    if MASS:
        start = tl.load(starts + image).to(tl.int64)
        end = tl.load(starts + image + 1).to(tl.int64)
    else:
        start = image * (prefix + k)
        end = start + prefix + k
    slot = start + kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1  # [BR]
    tl.store(slots + image * (prefix + candidates) + row, tl.where(kept, slot, -1), mask=candidate < candidates)
    position = candidate
    if POSITIONS:
        offsets = image * positions_stride_image + candidate.to(tl.int64) * positions_stride_patch  # [BR]
        given = tl.load(positions + offsets, mask=kept & (candidate >= 0), other=0).to(tl.int32)
        position = tl.where(candidate >= 0, given, candidate)
    tl.store(packed_positions + slot, position, mask=kept)
    if VALUES:
        values += image * values_stride_image
        for c in range(0, channels, BC):
            channel = c + tl.arange(0, BC)  # [BC]
            mask = kept[:, None] & (channel[None, :] < channels)  # [BR, BC]
            source = row.to(tl.int64)[:, None] * values_stride_row + channel[None, :]  # [BR, BC]
            tile = tl.load(values + source, mask=mask)  # [BR, BC]
            tl.store(packed + slot[:, None] * channels + channel[None, :], tile, mask=mask)
    if first == 0:
        tl.store(cu_seqlens + image + 1, end.to(tl.int32))
        if image == 0:
            tl.store(cu_seqlens, 0)


@jit
def _select_backward_kernel(
    grad,
    packed_grad,
    slots,
    rows,
    channels,
    grad_stride_token,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Reads the gradient of the kept tokens once (T C elements) and writes that of all (B (P + N) C) once."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)  # [BR]
    for c in range(0, channels, BC):
        channel = c + tl.arange(0, BC)  # [BC]
        in_row = channel[None, :] < channels  # [1, BC]
        source = slot[:, None] * grad_stride_token + channel[None, :]  # [BR, BC]
        tile = tl.load(packed_grad + source, mask=(slot >= 0)[:, None] & in_row, other=0.0)  # [BR, BC]
        tl.store(grad + row[:, None] * channels + channel[None, :], tile, mask=(row < rows)[:, None] & in_row)


def _selection_tiles(candidates: int) -> dict[str, int]:
    """One tile of all candidates, blocks of rows large enough to repay it, and 8 elements of a token tile a thread."""
    BN = max(16, next_power_of_2(candidates))
    BR = max(16, BN // 32)
    num_warps = 8 if BN > 1024 else 4
    return {"BN": BN, "BR": BR, "BC": 256 * num_warps // BR, "num_warps": num_warps}


def launch_count_mass(attention: Tensor, mass: float, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """How many tokens of each image stay (B,) int32, and whether its importance is valid (B,) bool."""
    batch, heads, candidates = attention.shape
    counts, valid = _fake_count_mass(attention, mass, num_prefix_tokens)
    tiles = _selection_tiles(candidates)
    if batch:
        launch(
            _count_kernel, (batch,),
            counts, valid, attention, candidates, num_prefix_tokens, max(mass, LEAST_MASS), *attention.stride(),
            H=heads, BITS=_fixed_point_bits(candidates), BN=tiles["BN"], num_warps=tiles["num_warps"],
        )  # fmt: skip
    return counts, valid


count_mass_op = torch.library.custom_op("smi_fast::count_mass", launch_count_mass, mutates_args=())


@count_mass_op.register_fake
def _fake_count_mass(attention, mass, num_prefix_tokens):
    batch = len(attention)
    return attention.new_empty(batch, dtype=torch.int32), attention.new_empty(batch, dtype=torch.bool)


def launch_select(
    attention: Tensor,
    values: Tensor | None,
    positions: Tensor | None,
    starts: Tensor | None,
    k: int,
    mass: float,
    num_prefix_tokens: int,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The packed values (T, C) and positions (T,), cu_seqlens (B + 1,), the packed row that each of the (B, P + N) went
    to or -1, and whether each image's importance is valid (B,). `starts` are cu_seqlens where `mass` decides, not k."""
    batch, heads, candidates = attention.shape
    outputs = _fake_select(attention, values, positions, starts, k, mass, num_prefix_tokens, tokens)
    if batch == 0:
        outputs[2].zero_()
        return outputs
    if values is not None and values.stride(-1) != 1:
        values = values.contiguous()
    channels = 0 if values is None else values.shape[-1]
    tiles = _selection_tiles(candidates)
    launch(
        _select_kernel, (batch, cdiv(num_prefix_tokens + candidates, tiles["BR"])),
        *outputs, attention, values, positions, starts, candidates, num_prefix_tokens, channels, k,
        max(mass, LEAST_MASS), *attention.stride(), *((0, 0) if values is None else values.stride()[:2]),
        *((0, 0) if positions is None else positions.stride()),
        H=heads, MASS=starts is not None, BITS=_fixed_point_bits(candidates), VALUES=values is not None,
        POSITIONS=positions is not None, **tiles,
    )  # fmt: skip
    return outputs


select_op = torch.library.custom_op("smi_fast::select", launch_select, mutates_args=())


@select_op.register_fake
def _fake_select(attention, values, positions, starts, k, mass, num_prefix_tokens, tokens):
    batch, _, candidates = attention.shape
    packed = attention.new_empty(0) if values is None else values.new_empty(tokens, values.shape[-1])
    packed_positions = attention.new_empty(tokens, dtype=torch.int32)
    cu_seqlens = attention.new_empty(batch + 1, dtype=torch.int32)
    slots = attention.new_empty(batch, num_prefix_tokens + candidates, dtype=torch.int32)
    return packed, packed_positions, cu_seqlens, slots, attention.new_empty(batch, dtype=torch.bool)


def launch_select_backward(grad: Tensor, slots: Tensor) -> Tensor:
    """The gradient (B, P + N, C) of the values: that of the packed (T, C) where one stayed, zero elsewhere."""
    out, rows, channels = _fake_select_backward(grad, slots), slots.numel(), grad.shape[-1]
    if rows and channels:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        launch(
            _select_backward_kernel, (cdiv(rows, 16),),
            out, grad, slots, rows, channels, grad.stride(0), BR=16, BC=128, num_warps=4,
        )  # fmt: skip
    return out


select_backward_op = torch.library.custom_op("smi_fast::select_backward", launch_select_backward, mutates_args=())


@select_backward_op.register_fake
def _fake_select_backward(grad, slots):
    return grad.new_empty(*slots.shape, grad.shape[-1])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    return None, select_backward_op(grad, *ctx.saved_tensors), None, None, None, None, None, None


select_op.register_autograd(_backward, setup_context=_save_for_backward)
