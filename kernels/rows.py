"""Packed batches as rows: the one place that makes cumulative lengths, and what follows from them.

In a packed batch the T rows of B sequences lie end to end, and cu_seqlens (B + 1,) int32 says where each sequence
begins: sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1] - 1. Kernels and everything above them use the same
few functions for that: lengths to cumulative lengths, rows to sequences, rows to places in a padded batch, and picking
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .gradients import transformed


def cumulative_lengths(lengths: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """Return the cumulative lengths of B sequences: (B + 1,) int32, beginning with 0.

    Args:
        lengths: B integers, which are copied to the device without waiting for it, or a tensor (B,) of integers.
        device: the device of the result. A tensor's result stays on the tensor's device.
    """
    if isinstance(lengths, Tensor):
        return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return starts.to(device, non_blocking=True)


def uniform_lengths(batch: int, length: int, device: torch.device | str) -> Tensor:
    """Return the cumulative lengths (B + 1,) int32 of `batch` sequences of `length` tokens each."""
    if length == 0:
        return torch.zeros(batch + 1, dtype=torch.int32, device=device)  # arange takes no step of 0
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)[: batch + 1]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.shape)
        # Both calls copy rows. On a CPU, a scatter of single elements takes half the time.
        return zeros.scatter_(0, rows, grad) if zeros.dim() == 1 else zeros.index_copy_(0, rows, grad), None


def gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return `values[rows]` for values (M, ...) and indices (T,) int64, which must be distinct.

    The backward pass of plain indexing adds up the gradients of rows that were picked twice. With distinct rows the
    gradient is a copy, which is faster and does not depend on the order of a sum.
    """
    return values.index_select(0, rows) if transformed() else _GatherRows.apply(values, rows)


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the sequence that each of the T packed tokens belongs to, (T,) int64, without synchronising."""
    sequences = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=tokens)


def padding(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Compute where packed tokens lie in a batch that is padded to N = max_seqlen tokens per sequence.

    Returns:
        The place of each token among the B * N places of the padded batch, (T,) int64, and whether each place holds a
        token, (B, N) bool.
    """
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    slots = torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence] + sequence * max_seqlen
    taken = torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
    return slots, taken


def rows_behind_prefix(cu_seqlens: Tensor, tokens: int, count: int) -> Tensor:
    """Return where T packed tokens lie, (T,) int64, once `count` prefix tokens stand before each sequence."""
    return torch.arange(tokens, device=cu_seqlens.device) + count * (sequence_of_tokens(cu_seqlens, tokens) + 1)


def prepend(
    values: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put P prefix tokens, (P, C) or (B, P, C), before each of the packed sequences (T, C). Return the new values,
    positions, which are -P to -1 for prefix tokens, and cumulative lengths."""
    count, batch = prefix.shape[-2], cu_seqlens.shape[0] - 1
    if count == 0:
        return values, positions, cu_seqlens
    before = torch.arange(-count, 0, dtype=torch.int32, device=prefix.device)
    if positions.shape[0] == batch * max_seqlen:
        values = values.view(batch, max_seqlen, *values.shape[1:])
        values = torch.cat((prefix.expand(batch, -1, -1), values), dim=1).flatten(0, 1)
        positions = torch.cat((before.expand(batch, -1), positions.view(batch, max_seqlen)), dim=1).flatten()
        return values, positions, uniform_lengths(batch, max_seqlen + count, prefix.device)
    rows = rows_behind_prefix(cu_seqlens, values.shape[0], count)
    heads = (cu_seqlens[:-1, None] + count * torch.arange(batch, device=rows.device)[:, None]
             + torch.arange(count, device=rows.device)).flatten()  # fmt: skip
    total = values.shape[0] + batch * count
    dtype = torch.promote_types(values.dtype, prefix.dtype)  # as torch.cat does
    longer = values.new_zeros(total, values.shape[1], dtype=dtype).index_copy(0, rows, values.to(dtype))
    longer = longer.index_copy(0, heads, prefix.to(dtype).expand(batch, -1, -1).flatten(0, 1))
    all_positions = before.new_zeros(total).index_copy(0, rows, positions)
    all_positions = all_positions.index_copy(0, heads, before.repeat(batch))
    return longer, all_positions, cu_seqlens + uniform_lengths(batch, count, rows.device)
