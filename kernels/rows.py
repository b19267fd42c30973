"""Rows of packed batches: cumulative lengths, padding, and rows picked by distinct indices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def cumulative_lengths(lengths: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """Cumulative lengths (B + 1,) int32, from 0 on.

    Args:
        lengths: of B sequences: integers, which are shipped to the device without waiting for it, or a tensor (B,).
        device: where the result is; that of the lengths where they are a tensor.
    """
    if isinstance(lengths, Tensor):
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return starts.to(device, non_blocking=True)


def uniform_lengths(batch: int, length: int, device: torch.device | str) -> Tensor:
    """Cumulative lengths (B + 1,) int32 of `batch` sequences of `length` tokens each."""
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
        # The same for single elements, where it takes a CPU half the time.
        return zeros.scatter_(0, rows, grad) if zeros.dim() == 1 else zeros.index_copy_(0, rows, grad), None


def gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """`values[rows]` for (M, ...) values and (T,) indices of which no two are equal.

    Plain indexing adds up the gradients of rows that were picked twice; with distinct rows the gradient is a copy.
    """
    return _GatherRows.apply(values, rows)


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64, the sequence that each packed token belongs to; no synchronisation."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=tokens)


def padding(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Where each of the T tokens lies in a padded batch (B * N, ...), and which of its places (B, N) are taken."""
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    slots = torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence] + sequence * max_seqlen
    taken = torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
    return slots, taken
