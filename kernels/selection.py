"""Select the patches that stay by their importance, and gather their tokens into a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import INTERPRETED, cdiv, jit, launch, resolve_backend, tl
from .dispatch import choose
from .gradients import any_order, transformed, untransformed
from .operators import operation
from .rows import cumulative_lengths, gather_rows, padding, uniform_lengths

MAX_CANDIDATES = 4096
LEAST_MASS = 2.0**-60  # totals are below 2^52 units, so this share and all smaller ones are less than one unit
FIXED_POINT_BITS = 40  # bits of an importance: 4096 importances sum to at most 2^52, up to which float64 is exact


class Selection(NamedTuple):
    """The tokens that stay: a packed batch."""

    values: Tensor | None  # (T, C), None if no values were given
    positions: Tensor  # (T,) int32
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int  # the length of the longest sequence

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each image stay. The host waits for the device."""
        return self.cu_seqlens.diff().tolist()


def select_tokens(
    attention: Tensor,
    values: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    k: int | Sequence[int] | None = None,
    mass: float | None = None,
    num_prefix_tokens: int = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Selection:
    """Keep the most important candidates of each image, and gather their tokens.

    Importance is the mean of `attention` over the heads, in float32. The candidates with the highest importance stay.
    If two have the same importance, the lower index takes precedence. The result is in ascending order of index. It is
    the same on every device and backend, and for an image it does not depend on the rest of the batch.

    Args:
        attention: (B, H, N) or (B, N) in float32, bfloat16 or float16, the class token's attention to each of up to
            4096 candidates. No gradient flows to it.
        values: (B, P + N, C) tokens of any floating dtype, prefix tokens first. Gradients flow to the tokens that stay.
        positions: (B, N) int32 or int64, the index of each candidate in the patch grid; 0..N-1 by default.
        k: how many candidates of each image stay, 1..N: one number for all images, or B numbers.
        mass: keep the fewest candidates whose importance sums to at least this share, in (0, 1], of the image's total,
            or one candidate if the total is zero. This synchronises with the host once, to learn how many stay.
            Importance is rounded down to units of about 2^-40 of the image's greatest, so that sums are exact.
        num_prefix_tokens: P, the number of tokens in front that always stay. Prefix token p gets position p - P.
        cu_seqlens: (B + 1,) int32 for a packed input. Then attention is (H, T) or (T,), values (T, C) and positions
            (T,), for all tokens of all sequences. The attention to prefix tokens is ignored. Their positions, if
            given, are kept.
        max_seqlen: the length of the longest sequence of a packed input, at most P + 4096.
        backend: "auto", "triton" or "torch".

    Returns:
        A tuple (values, positions, cu_seqlens, max_seqlen) of the tokens that stay, as a packed batch has them.

    Raises:
        ValueError: if an argument has another shape, dtype, device or value. On a CPU, also if an importance is NaN
            (or, with `mass`, negative or infinite) or if a packed sequence has fewer than k candidates. On a GPU, these
            two checks are device-side assertions.
    """
    if attention.dim() == (2 if cu_seqlens is None else 1):
        attention = attention.unsqueeze(-2)
    attention = attention.detach()
    _check_selection(attention, values, positions, k, mass, num_prefix_tokens, cu_seqlens, max_seqlen)
    if cu_seqlens is None:
        max_seqlen = num_prefix_tokens + attention.shape[-1]
    max_seqlen = max(max_seqlen, num_prefix_tokens + 1)  # it is less only for a packed batch without images
    plain = resolve_backend(backend, attention.device) == "torch" or transformed()
    starts = limits = lengths = None
    if mass is None and not isinstance(k, int):
        lengths = [num_prefix_tokens + count for count in k]
        starts = cumulative_lengths(lengths, attention.device)
    if plain or INTERPRETED:
        _assert_valid(attention, cu_seqlens, starts, k, mass, num_prefix_tokens, max_seqlen)
    if mass is not None:
        count = count_mass_reference if plain else _count_mass
        counts, limits = count(attention, cu_seqlens, mass, num_prefix_tokens, max_seqlen)
        starts, lengths = cumulative_lengths(counts[1:]), counts.tolist()[1:]
    if lengths is None:
        batch, longest = len(attention) if cu_seqlens is None else len(cu_seqlens) - 1, num_prefix_tokens + k
        tokens = batch * longest
    else:
        k, tokens, longest = 0, sum(lengths), max(lengths, default=0)
    select = select_reference if plain else _select
    packed, positions, starts, *_ = select(
        attention, values, positions, cu_seqlens, starts, limits, k, num_prefix_tokens, max_seqlen, tokens
    )
    return Selection(None if values is None else packed, positions, starts, longest)


def _check_selection(attention, values, positions, k, mass, num_prefix_tokens, cu_seqlens, max_seqlen) -> None:
    dense = cu_seqlens is None
    if dense != (max_seqlen is None):
        raise ValueError(f"cu_seqlens and max_seqlen={max_seqlen} go together: both or neither")
    if attention.dim() != (3 if dense else 2) or attention.shape[-2] == 0:
        expected = "(batch, [heads,] patches)" if dense else "([heads,] tokens), as cu_seqlens need it"
        raise ValueError(f"attention has shape {tuple(attention.shape)}, not {expected}")
    if attention.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"attention has dtype {attention.dtype}; float32, bfloat16 and float16 are possible")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} is negative")
    if not dense and (cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32):
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (batch + 1,) torch.int32")
    batch = len(attention) if dense else len(cu_seqlens) - 1
    candidates = attention.shape[-1] if dense else max_seqlen - num_prefix_tokens
    if not 1 <= candidates <= MAX_CANDIDATES and (dense or batch):
        raise ValueError(f"attention has {candidates} patches, outside 1..{MAX_CANDIDATES}")
    if (k is None) == (mass is None):
        raise ValueError(f"exactly one of k and mass is needed, not k={k} and mass={mass}")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass={mass} is outside (0, 1]")
    if k is not None and not isinstance(k, int) and len(k) != batch:
        raise ValueError(f"k has {len(k)} counts for {batch} images")
    for count in [] if k is None else [k] if isinstance(k, int) else k:
        if not 1 <= count <= candidates:
            raise ValueError(f"k={count} is outside 1..{candidates}")
    if dense and values is None and num_prefix_tokens != 0:
        raise ValueError(f"num_prefix_tokens={num_prefix_tokens} without values that hold them")
    rows = (batch, num_prefix_tokens + candidates) if dense else (attention.shape[-1],)
    if values is not None:
        if values.shape[:-1] != rows:
            raise ValueError(f"values has shape {tuple(values.shape)}, not ({', '.join(map(str, rows))}, channels)")
        if not values.is_floating_point():
            raise ValueError(f"values has dtype {values.dtype}, not a floating-point one")
    if positions is not None:
        expected = (batch, candidates) if dense else rows
        if positions.shape != expected:
            raise ValueError(f"positions has shape {tuple(positions.shape)}, not {expected}")
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"positions has dtype {positions.dtype}, not torch.int32 or torch.int64")
    for name, tensor in (("values", values), ("positions", positions), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != attention.device:
            raise ValueError(f"{name} is on {tensor.device}, attention on {attention.device}")


def _assert_valid(attention, cu_seqlens, starts, k, mass, num_prefix_tokens, max_seqlen) -> None:
    """Check the conditions that compiled kernels assert on the device, for runs without a compiled kernel."""
    importance, present = candidates_of(attention, cu_seqlens, num_prefix_tokens, max_seqlen)
    needed = "importance must not be NaN" if mass is None else "importance must be neither NaN, negative nor infinite"
    valid = importance == importance if mass is None else (importance >= 0) & (importance < torch.inf)
    _assert_rows(valid.all(1), needed)
    if cu_seqlens is not None:
        least = starts.diff() - num_prefix_tokens if starts is not None else k or 1
        _assert_rows(present.sum(1) >= least, "an image must have at least one candidate, and at least as many as stay")


def _assert_rows(valid: Tensor, needed: str) -> None:
    """Raise an error unless `valid` (B,) holds for all images. On a GPU this is a device-side assertion."""
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(valid.all(), needed)
        return
    valid = untransformed(valid)
    if not valid.all():
        row = ", ".join(map(str, valid.logical_not().nonzero()[0].tolist()))
        raise ValueError(f"{needed}, which fails in row {row}")


def candidates_of(attention, cu_seqlens, num_prefix_tokens: int, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Return the importance (B, N) of each image's candidates, padded with 0, and the mask (B, N) of candidates."""
    importance = mean_over_heads(attention)
    if cu_seqlens is None:
        return importance, torch.ones_like(importance, dtype=torch.bool)
    slots, taken = padding(cu_seqlens, max_seqlen, len(importance))
    padded = importance.new_zeros(taken.numel()).index_copy(0, slots, importance).view(taken.shape)
    return padded[:, num_prefix_tokens:], taken[:, num_prefix_tokens:]


def count_mass_reference(
    attention: Tensor, cu_seqlens: Tensor | None, mass: float, num_prefix_tokens: int, max_seqlen: int
) -> tuple[Tensor, None]:
    """Count the tokens of each image that stay with this `mass`: (B + 1,) int32, a zero and then the counts."""
    importance, _ = candidates_of(attention, cu_seqlens, num_prefix_tokens, max_seqlen)
    units = fixed_point(importance).sort(dim=1, descending=True).values
    target = units.sum(1, keepdim=True).double() * max(mass, LEAST_MASS)
    kept = ((units.cumsum(1) - units).double() < target).sum(1).clamp(min=1)
    return F.pad(num_prefix_tokens + kept, (1, 0)).int(), None


def select_reference(
    attention: Tensor, values: Tensor | None, positions: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, limits: None,
    k: int, num_prefix_tokens: int, max_seqlen: int, tokens: int,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Define `select_tokens` in plain torch for known counts: packed values, positions and cu_seqlens.

    `starts` (B + 1,) int32 are the cumulative lengths of the `tokens` that stay, or None if k candidates of each image
    stay.
    """
    importance, present = candidates_of(attention, cu_seqlens, num_prefix_tokens, max_seqlen)
    batch, device = len(importance), attention.device
    if starts is None:
        starts = uniform_lengths(batch, num_prefix_tokens + k, device)
    # Places without a candidate come last, because a stable sort keeps equal elements in order.
    order = importance.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True)
    highest = torch.arange(order.shape[1], device=device) < starts.diff()[:, None] - num_prefix_tokens
    kept = torch.zeros_like(present).scatter(1, order, highest)  # (B, N)
    kept = F.pad(kept, (num_prefix_tokens, 0), value=True).flatten()  # (B * (P + N))
    if cu_seqlens is None:
        within = torch.arange(-num_prefix_tokens, importance.shape[1], device=device).expand(batch, -1)
        if positions is not None:
            within = torch.cat([within[:, :num_prefix_tokens], positions], 1)
        positions = within.flatten()
        values = None if values is None else values.flatten(0, 1)
    else:
        slots, _ = padding(cu_seqlens, max_seqlen, attention.shape[1])
        kept = kept[slots]
        positions = slots % max_seqlen - num_prefix_tokens if positions is None else positions
    # Row t of the packed batch is row rows[t] of the input. Rows that do not stay are sent to a place behind the last.
    slots = torch.where(kept, kept.cumsum(0) - 1, tokens)
    rows = slots.new_empty(tokens + 1).scatter(0, slots, torch.arange(len(kept), device=device))[:tokens]
    return None if values is None else gather_rows(values, rows), positions[rows].to(torch.int32), starts


def mean_over_heads(attention: Tensor) -> Tensor:
    """Compute importance, the mean over the heads: (..., H, N) to (..., N) float32, without negative zeros.

    Heads are added in order. The product in float64, rounded to float32, equals the exact quotient on every device.
    """
    first, *others = attention.unbind(-2)
    total = first.float()
    for head in others:
        total = total + head.float()
    importance = (total.double() * (1 / attention.shape[-2])).float()
    return torch.where(importance == 0, 0.0, importance)


def fixed_point(importance: Tensor) -> Tensor:
    """Round importance (B, N) down to multiples (B, N) int64 of a row's unit, so that sums are exact and below 2^52.

    The unit is 2^-40 times the least power of two above the row's maximum.
    """
    exponent = importance.amax(1, keepdim=True).view(torch.int32).long() >> 23  # the maximum is < 2^(exponent - 126)
    return (importance.double() * (FIXED_POINT_BITS + 126 - exponent + 1023 << 52).view(torch.float64)).long()


@jit
def _importance(attention, stride_head, stride_patch, n, candidates, H: tl.constexpr):
    """Compute the importance [BN] of the candidates n, as `mean_over_heads` defines it, or 0 without a candidate."""
    mask = (n >= 0) & (n < candidates)  # [BN]
    total = tl.zeros(n.shape, tl.float32)  # [BN]
    for _ in tl.range(H, loop_unroll_factor=2):  # the registers hold no more than two heads at a time
        total += tl.load(attention + n.to(tl.int64) * stride_patch, mask=mask, other=0.0).to(tl.float32)
        attention += stride_head
    importance = (total.to(tl.float64) * (1 / H)).to(tl.float32)
    return tl.where(importance == 0.0, 0.0, importance)


@jit
def _ordered(importance, is_candidate):
    """Return int32 keys [BN] that have the order of the floats. Without a candidate, the key is the least integer."""
    bits = importance.to(tl.int32, bitcast=True)
    return tl.where(is_candidate, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@jit
def _threshold(key, units, target):
    """Return the highest bound such that the keys at or above it hold at least `target` units, and how many units the
    keys that are equal to the bound have to contribute. The search ends early at a lower bound if the keys at or above
    it hold exactly `target` units.

    The search halves the range between the least and the greatest key, with one sum over the tile each time. It takes
    at most 32 halvings, and about log2 N + 1 if the keys are spread evenly.
    """
    low = tl.min(tl.where(key > -0x80000000, key, 0x7FFFFFFF), 0)
    high = tl.max(key, 0)
    held = tl.sum(tl.where(key >= low, units, 0), 0)
    while (low < high) & (held != target):
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, and no sum that could overflow
        above = tl.sum(tl.where(key >= middle, units, 0), 0)
        if above >= target:
            low, held = middle, above
        else:
            high = middle - 1
    missing = target - tl.sum(tl.where(key > low, units, 0), 0)
    return low, missing


@jit
def _origin(cu_seqlens, image, rows, PACKED: tl.constexpr):
    """Return where an image starts, counted in images (in tokens if the batch is packed), and how many rows it has."""
    origin = image
    if PACKED:
        origin = tl.load(cu_seqlens + image).to(tl.int64)
        rows = (tl.load(cu_seqlens + image + 1) - origin).to(tl.int32)
    return origin, rows


@jit(do_not_specialize=["rows", "prefix", "stride_image", "stride_head"])
def _count_kernel(
    counts, limits,
    attention, cu_seqlens,
    rows, prefix, mass: tl.float64,
    stride_image, stride_head, stride_patch,
    H: tl.constexpr, PACKED: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """counts[1 + b] = P + the least n >= 1 such that the n greatest importances of image b hold the mass.

    `count_mass_reference` defines them. limits[b] = (key of the least importance that stays, how many of the candidates
    with this importance stay), for `_select_kernel`. There is one program for each image. It reads attention once (H N
    elements), writes three integers, and computes about log2 N + 5 sums over N.
    """
    image = tl.program_id(0).to(tl.int64)
    origin, rows = _origin(cu_seqlens, image, rows, PACKED)
    candidates = rows - prefix
    n = tl.arange(0, BN)  # [BN]
    importance = _importance(attention + origin * stride_image, stride_head, stride_patch, n, candidates, H)  # [BN]
    valid = tl.min(((importance >= 0.0) & (importance < float("inf"))).to(tl.int32), 0)

    exponent = tl.max(importance, 0).to(tl.int32, bitcast=True) >> 23
    unit = ((BITS + 126 + 1023 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    units = (importance.to(tl.float64) * unit).to(tl.int64)  # [BN]
    total = tl.sum(units, 0)
    target = tl.maximum(tl.ceil(total.to(tl.float64) * mass).to(tl.int64), 1)
    # A candidate of zero units never stays, unless all candidates have zero units: then one candidate stays.
    units = tl.where((total == 0) & (n < candidates), 1, units)
    key = _ordered(importance, units > 0)  # [BN]
    threshold, missing = _threshold(key, units, target)
    each = tl.max(tl.where(key == threshold, units, 0), 0)
    ties = tl.sum((n * each < missing).to(tl.int32), 0)  # missing / each, rounded up
    tl.store(counts + image + 1, prefix + tl.sum((key > threshold).to(tl.int32), 0) + ties)
    tl.store(limits + 2 * image, threshold)
    tl.store(limits + 2 * image + 1, ties)
    if image == 0:
        tl.store(counts, 0)
    # The assertion comes last, so that no registers have to be saved for it.
    tl.device_assert((valid == 1) & (candidates >= 1), "importance is NaN, negative or infinite, or there is none")


@jit(
    do_not_specialize=[
        "rows", "prefix", "k", "stride_image", "stride_head",
        "values_stride_image", "positions_stride_image", "slots_stride_image",
    ]
)  # fmt: skip
def _select_kernel(
    packed, packed_positions, packed_starts, slots,
    attention, values, positions, cu_seqlens, starts, limits,
    rows, prefix, channels, k,
    stride_image, stride_head, stride_patch, values_stride_image, values_stride_row,
    positions_stride_image, positions_stride_row, slots_stride_image,
    H: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, LIMITS: tl.constexpr,
    VALUES: tl.constexpr, POSITIONS: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """packed[slots[n]] = values[n] for the prefix tokens and the k most important candidates n of each image, in order;
    slots[n] = -1 for the others. `select_reference` defines them.

    The grid is (images, blocks of BR rows). A row is one of an image's P + N tokens. Channels and the strides of values
    count accesses of UNIT elements. Each program reads its image's attention once and computes about log2 N + 5 sums
    over N. All programs together read and write the tokens that stay once (2 T C elements).
    """
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BR
    origin, rows = _origin(cu_seqlens, image, rows, PACKED)
    if (first > 0) & (first >= rows):  # every image has a first block, also an empty image
        return
    candidates = rows - prefix
    n = tl.arange(0, BN)  # [BN], all candidates
    row = first + tl.arange(0, BR)  # [BR], this block's
    candidate = row - prefix  # [BR], negative for a prefix token
    attention += origin * stride_image
    importance = _importance(attention, stride_head, stride_patch, n, candidates, H)  # [BN]
    own = _importance(attention, stride_head, stride_patch, candidate, candidates, H)  # [BR]
    position = candidate
    if POSITIONS:
        given = (row < rows) & (PACKED | (row >= prefix))
        offsets = origin * positions_stride_image + candidate.to(tl.int64) * positions_stride_row  # [BR]
        position = tl.where(given, tl.load(positions + offsets, mask=given, other=0).to(tl.int32), candidate)
    start, end = image * (prefix + k), (image + 1) * (prefix + k)
    if STARTS:
        start, end = tl.load(starts + image).to(tl.int64), tl.load(starts + image + 1).to(tl.int64)

    k = (end - start).to(tl.int32) - prefix
    valid = (tl.min((importance == importance).to(tl.int32), 0) == 1) & (k <= candidates)
    key = _ordered(importance, n < candidates)  # [BN]
    if LIMITS:
        threshold, ties = tl.load(limits + 2 * image), tl.load(limits + 2 * image + 1)
    else:
        threshold, ties = _threshold(key, tl.full(n.shape, 1, tl.int32), k)

    # How many of the rows before this block stay.
    before = n < first - prefix  # [BN]
    ties_before = tl.sum((before & (key == threshold)).to(tl.int32), 0)
    kept_before = tl.sum((before & (key > threshold)).to(tl.int32), 0) + tl.minimum(ties_before, ties)
    kept_before += tl.minimum(first, prefix)

    # Which rows of this block stay, and where they go.
    own_key = _ordered(own, (candidate >= 0) & (candidate < candidates))  # [BR]
    tie = own_key == threshold  # [BR]
    tie_stays = tie & (ties_before + tl.cumsum(tie.to(tl.int32), 0) <= ties)
    kept = (row < prefix) | (own_key > threshold) | tie_stays
    slot = start + kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1  # [BR]
    tl.store(slots + origin * slots_stride_image + row, tl.where(kept, slot, -1), mask=row < rows)
    tl.store(packed_positions + slot, position, mask=kept)
    if VALUES:
        values += origin * values_stride_image * UNIT
        for c in range(0, channels * UNIT, BC):
            channel = c + tl.arange(0, BC)  # [BC]
            mask = kept[:, None] & (channel < channels * UNIT)[None, :]  # [BR, BC]
            source = (row.to(tl.int64) * values_stride_row * UNIT)[:, None] + channel[None, :]  # [BR, BC]
            tile = tl.load(values + source, mask=mask)  # [BR, BC]
            tl.store(packed + (slot * channels * UNIT)[:, None] + channel[None, :], tile, mask=mask)
    if first == 0:
        tl.store(packed_starts + image + 1, end.to(tl.int32))
        if image == 0:
            tl.store(packed_starts, 0)
    # The assertion comes last, so that no registers have to be saved for it.
    tl.device_assert(valid, "importance is NaN, or an image has fewer candidates than are to stay")


@jit(do_not_specialize=["rows"])
def _select_backward_kernel(
    grad,
    packed_grad, slots,
    rows, channels, grad_stride_row,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad[n] = packed_grad[slots[n]], and 0 where slots[n] is -1: the gradient of `select_reference`.

    A program takes BR rows and BC channels. Channels and the stride count accesses of UNIT elements. All programs
    together read the gradient of the kept tokens once (T C elements) and write the gradient of all tokens once.
    """
    blocks = tl.cdiv(channels * UNIT, BC)  # blocks of a row
    row = (tl.program_id(0) // blocks).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)  # [BR]
    channel = tl.program_id(0) % blocks * BC + tl.arange(0, BC)  # [BC]
    in_row = (channel < channels * UNIT)[None, :]  # [1, BC]
    source = (slot * grad_stride_row * UNIT)[:, None] + channel[None, :]  # [BR, BC]
    tile = tl.load(packed_grad + source, mask=(slot >= 0)[:, None] & in_row, other=0.0)  # [BR, BC]
    target = (row * channels * UNIT)[:, None] + channel[None, :]  # [BR, BC]
    tl.store(grad + target, tile, mask=(row < rows)[:, None] & in_row)


def _tiles(operation: str, device: torch.device, size: int, unit: int) -> dict[str, int]:
    """Look up a kernel's constants in the dispatch table, which counts channels in accesses of `unit` elements."""
    _, tiles = choose(operation, device, size)
    return {**tiles, "BC": tiles["BC"] * unit}


# "debug" compiles the assertions of a kernel. It would also add checks for integer overflow, which are switched off.
ASSERT = {"debug": True, "sanitize_overflow": False}


def _unit(itemsize: int, *sizes: int) -> int:
    """Return the elements of one access: as many as 16 bytes hold, if all sizes are multiples of that, otherwise 1."""
    unit = 16 // itemsize
    return 1 if any(size % unit for size in sizes) else unit


def _candidates_and_strides(attention: Tensor, cu_seqlens: Tensor | None, num_prefix_tokens: int):
    """Return attention from the first candidate on, and its strides between images (tokens if the input is packed),
    heads and candidates."""
    strides = attention.stride()
    if cu_seqlens is not None:
        attention, strides = attention[:, num_prefix_tokens:], (strides[1], *strides)
    return attention, dict(zip(("stride_image", "stride_head", "stride_patch"), strides, strict=True))


def _batch_size(attention: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of images. It is read from the shape, because len() would tie a traced graph to one number."""
    return attention.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def launch_count_mass(
    attention: Tensor, cu_seqlens: Tensor | None, mass: float, num_prefix_tokens: int, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """Count the tokens of each image that stay: (B + 1,) int32, a zero and then the counts.

    Also returns the limits (B, 2) int32: the key of the least importance that stays, and how many candidates with
    exactly that importance stay.
    """
    counts, limits = _fake_count_mass(attention, cu_seqlens, mass, num_prefix_tokens, max_seqlen)
    if len(limits) == 0:
        return counts.zero_(), limits
    tiles = _tiles("select_tokens", attention.device, max_seqlen - num_prefix_tokens, 1)
    attention, strides = _candidates_and_strides(attention, cu_seqlens, num_prefix_tokens)
    launch(
        _count_kernel, (len(limits),),
        counts=counts, limits=limits, attention=attention, cu_seqlens=cu_seqlens,
        rows=max_seqlen, prefix=num_prefix_tokens, mass=max(mass, LEAST_MASS), **strides,
        H=attention.shape[-2], PACKED=cu_seqlens is not None, BITS=FIXED_POINT_BITS,
        BN=tiles["BN"], num_warps=tiles["num_warps"], **ASSERT,
    )  # fmt: skip
    return counts, limits


count_mass_op = torch.library.custom_op("smi_fast::count_mass", launch_count_mass, mutates_args=())
_count_mass = operation(count_mass_op, launch_count_mass)


@count_mass_op.register_fake
def _fake_count_mass(attention, cu_seqlens, mass, num_prefix_tokens, max_seqlen):
    batch = _batch_size(attention, cu_seqlens)
    return attention.new_empty(batch + 1, dtype=torch.int32), attention.new_empty(batch, 2, dtype=torch.int32)


def launch_select(
    attention: Tensor, values: Tensor | None, positions: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, limits: Tensor | None,
    k: int, num_prefix_tokens: int, max_seqlen: int, tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Do what `select_reference` does, with the `limits` of `launch_count_mass` if they are given.

    Also returns the slots, (B, P + N) or (T,) int32: the packed row that each token of the input went to, or -1.
    """
    packed, packed_positions, packed_starts, slots = _fake_select(
        attention, values, positions, cu_seqlens, starts, limits, k, num_prefix_tokens, max_seqlen, tokens
    )
    batch, is_packed = len(packed_starts) - 1, cu_seqlens is not None
    if batch == 0:
        return packed, packed_positions, packed_starts.zero_(), slots
    channels, value_strides, unit = 0, (0, 0), 1
    if values is not None:
        values = values if values.stride(-1) == 1 else values.contiguous()
        channels, value_strides = values.shape[-1], (values.stride(0), values.stride(-2))
        unit = _unit(values.itemsize, channels, *value_strides)
    position_strides = (0, 0)
    if positions is not None:
        position_strides = positions.stride(0), positions.stride(-1)
        positions = positions[num_prefix_tokens:] if is_packed else positions
    tiles = _tiles("select_tokens", attention.device, max_seqlen - num_prefix_tokens, unit)
    attention, strides = _candidates_and_strides(attention, cu_seqlens, num_prefix_tokens)
    launch(
        _select_kernel, (batch, cdiv(max_seqlen, tiles["BR"])),
        packed=packed, packed_positions=packed_positions, packed_starts=packed_starts, slots=slots,
        attention=attention, values=values, positions=positions, cu_seqlens=cu_seqlens, starts=starts, limits=limits,
        rows=max_seqlen, prefix=num_prefix_tokens, channels=channels // unit, k=k, **strides,
        values_stride_image=value_strides[0] // unit, values_stride_row=value_strides[1] // unit,
        positions_stride_image=position_strides[0], positions_stride_row=position_strides[1],
        slots_stride_image=slots.stride(0),
        H=attention.shape[-2], PACKED=is_packed, STARTS=starts is not None, LIMITS=limits is not None,
        VALUES=channels > 0, POSITIONS=positions is not None, UNIT=unit, **tiles, **ASSERT,
    )  # fmt: skip
    return packed, packed_positions, packed_starts, slots


select_op = torch.library.custom_op("smi_fast::select", launch_select, mutates_args=())


@select_op.register_fake
def _fake_select(attention, values, positions, cu_seqlens, starts, limits, k, num_prefix_tokens, max_seqlen, tokens):
    batch = _batch_size(attention, cu_seqlens)
    rows = (batch, max_seqlen) if cu_seqlens is None else (attention.shape[-1],)
    packed = attention.new_empty(0) if values is None else values.new_empty(tokens, values.shape[-1])
    packed_positions, packed_starts, slots = (
        attention.new_empty(shape, dtype=torch.int32) for shape in ((tokens,), (batch + 1,), rows)
    )
    return packed, packed_positions, packed_starts, slots


def launch_select_backward(grad: Tensor, slots: Tensor) -> Tensor:
    """Scatter the gradient of the packed rows to the values, (B, P + N, C) or (T, C), with zeros elsewhere."""
    out, rows, channels = _fake_select_backward(grad, slots), slots.numel(), grad.shape[-1]
    if rows and channels:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        unit = _unit(grad.itemsize, channels, grad.stride(0))
        tiles = _tiles("select_tokens_backward", grad.device, channels // unit, unit)
        launch(
            _select_backward_kernel, (cdiv(rows, tiles["BR"]) * cdiv(channels, tiles["BC"]),),
            grad=out, packed_grad=grad, slots=slots, rows=rows, channels=channels // unit,
            grad_stride_row=grad.stride(0) // unit, UNIT=unit, **tiles,
        )  # fmt: skip
    return out


select_backward_op = torch.library.custom_op("smi_fast::select_backward", launch_select_backward, mutates_args=())
_select_backward = operation(select_backward_op, launch_select_backward)


@select_backward_op.register_fake
def _fake_select_backward(grad, slots):
    return grad.new_empty(*slots.shape, grad.shape[-1])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros are written as the gradients of the integers


def _derivative(ctx, grad, *_):
    (slots,) = ctx.saved_tensors
    rows = grad[slots.clamp(min=0)]
    return None, torch.where((slots >= 0)[..., None], rows, 0), *(None for _ in range(8))


@any_order(_derivative)
def _backward(ctx, grad, *_):
    return None, _select_backward(grad, *ctx.saved_tensors), *(None for _ in range(8))


_select = operation(select_op, launch_select, setup_context=_save_for_backward, backward=_backward)
