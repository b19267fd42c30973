"""Rows of a matrix picked by distinct indices, with a gradient that stores instead of accumulating."""

from __future__ import annotations

import torch
from torch import Tensor


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
