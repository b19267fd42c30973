"""Triton device functions that all attention kernels share: which sequence a program works on, and tiles of its rows.

A tile has BR rows of tokens and BD channels, where BD is the smallest power of two that holds the head dim D. Elements
past the end of the sequence or past channel D are zero, and are never stored.
"""

from __future__ import annotations

from .backend import jit, tl


@jit
def dot(a, b):
    """Compute the matrix product of two tiles, summed in float32 and never rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def locate(cu_seqlens, heads):
    """Return the first token (int64) and length (int32) of this program's sequence, and the program's head (int64)."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return start, tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32), head.to(tl.int64)


@jit
def load_rows(first, rows, length, stride, D: tl.constexpr, BD: tl.constexpr):
    """Load the rows [BR] of a sequence as a tile [BR, BD]. Row 0 begins at `first`, each further row `stride` later.

    For up to 4096 tokens, the offsets fit into 32 bits."""
    d = tl.arange(0, BD)  # [BD]
    offsets = rows[:, None] * stride + d[None, :]  # [BR, BD]
    mask = (rows[:, None] < length) & (d[None, :] < D)  # [BR, BD]
    return tl.load(first + offsets, mask=mask, other=0.0)


@jit
def store_rows(first, tile, rows, length, stride, D: tl.constexpr, BD: tl.constexpr):
    """Store a tile [BR, BD] where `load_rows` would load it from, rounded to the dtype in memory."""
    d = tl.arange(0, BD)  # [BD]
    offsets = rows[:, None] * stride + d[None, :]  # [BR, BD]
    mask = (rows[:, None] < length) & (d[None, :] < D)  # [BR, BD]
    tl.store(first + offsets, tile.to(first.dtype.element_ty), mask=mask)


@jit
def load_row(first, D: tl.constexpr, BD: tl.constexpr):
    """Load one row [BD] in float32."""
    d = tl.arange(0, BD)  # [BD]
    return tl.load(first + d, mask=d < D, other=0.0).to(tl.float32)


@jit
def store_row(first, row, D: tl.constexpr, BD: tl.constexpr):
    """Store one row [BD], rounded to the dtype in memory."""
    d = tl.arange(0, BD)  # [BD]
    tl.store(first + d, row.to(first.dtype.element_ty), mask=d < D)


@jit
def scores_of_tile(q, k, n, length, scale_log2):
    """Compute scores [BM, BN] of queries [BM, BD] and the keys n [BN, BD], times log2(e), -inf past the last key."""
    return tl.where(n[None, :] < length, dot(q, tl.trans(k)) * scale_log2, float("-inf"))


@jit
def scores_of_row(query, k, n, length, scale_log2):
    """Compute the scores [BN] of one query [BD] and the keys n [BN, BD], times log2(e), -inf past the last key."""
    return tl.where(n < length, tl.sum(query[None, :] * k, 1) * scale_log2, float("-inf"))
