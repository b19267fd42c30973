"""Class-token attention -> the patches that stay, and their tokens gathered into a packed batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve_backend
from .rows import gather_rows

MAX_CANDIDATES = 4096


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
    if positions is None:
        positions = torch.arange(attention.shape[-1], device=attention.device).expand(len(attention), -1)
    return select_reference(attention, values, positions, k, mass, num_prefix_tokens)


def _check_selection(attention, values, positions, k, mass, num_prefix_tokens) -> None:
    if attention.dim() != 3 or attention.shape[1] == 0:
        raise ValueError(f"attention has shape {tuple(attention.shape)}, not (batch, heads, patches) or (batch, patches)")
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
    attention: Tensor, values: Tensor | None, positions: Tensor, k: int | None, mass: float | None, num_prefix_tokens: int
) -> Selection:
    """What `select_tokens` means, in plain torch."""
    batch, _, candidates = attention.shape
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
    """Importance: (B, H, N) -> (B, N) float32, summed over the heads in their order, without negative zeros."""
    total = attention[:, 0].float()
    for head in range(1, attention.shape[1]):
        total = total + attention[:, head].float()
    heads = torch.full((), attention.shape[1], dtype=torch.float32, device=total.device)  # a number would be inverted
    return torch.where(total == 0, 0.0, total / heads)


def top_k(importance: Tensor, k: int) -> Tensor:
    """Mask (B, N) of the k highest of each row, of equals the first."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :k], True)


def top_mass(importance: Tensor, mass: float) -> Tensor:
    """Mask (B, N) of the fewest entries whose sum is at least `mass` of the row's, the highest first, at least one."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    units = fixed_point(importance).gather(1, order)
    target = units.sum(1, keepdim=True).double() * mass
    kept = (units.cumsum(1) - units).double() < target
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)


def fixed_point(importance: Tensor) -> Tensor:
    """(B, N) int64 multiples of a power of two of each row's own, so that sums are exact and never pass 2^52."""
    exponent = (importance.amax(1, keepdim=True).view(torch.int32) >> 23).double()  # the maximum is < 2^(exponent - 126)
    bits = 52 - math.ceil(math.log2(importance.shape[1]))
    return (importance.double() * torch.exp2(bits + 126 - exponent)).long()


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
