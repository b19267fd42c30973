"""Dropping patches in the middle of a forward pass, and the token that takes their place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smi_fast.backbones.pruning import Drop, Mass, keep_highest
from smi_fast.kernels.gradients import untransformed
from smi_fast.kernels.rows import cumulative_lengths, gather_rows, sequence_of_tokens, uniform_lengths
from smi_fast.packed import PackedTokens


def drop_patches(
    tokens: PackedTokens,
    importance: Tensor,
    drop: Drop,
    *,
    number: int,
    num_prefix_tokens: int,
    sizes: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[PackedTokens, Tensor | None]:
    """Drop patches as `drop` says. Patches that stay keep their order.

    Args:
        tokens: the sequences, with values (T, C).
        importance: (heads, T) float32, the attention that decides if `drop` has no scores of its own.
        number: the block before which the patches go, for messages.
        sizes: (T,) float32, how many patches were merged into each token, or None if none were.
        weights: (T,), the weights a_i of a fused token, with their gradient.

    Returns:
        The tokens that stay and their sizes.

    Raises:
        ValueError: the scores have another shape or dtype, or hold NaN. On a GPU NaN is a device-side assertion.
    """
    if drop.scores is not None:
        importance = _scores(tokens, importance.mean(0), drop, number, num_prefix_tokens)
    rows = torch.arange(tokens.positions.shape[0], dtype=torch.int32, device=tokens.positions.device)
    kept = keep_highest(
        replace(tokens, positions=rows), importance, drop, num_prefix_tokens=num_prefix_tokens, backend=backend
    )
    rows = kept.positions.long()
    kept = replace(kept, positions=tokens.positions[rows])
    sizes = None if sizes is None else sizes[rows]
    if drop.fuse is None:
        return kept, sizes
    fused = _fuse(tokens, weights.index_fill(0, rows, 0), mean=drop.fuse == "mean")
    return _append(kept, sizes, fused, tokens, position=-num_prefix_tokens - 1)


def require(valid: Tensor, tokens: PackedTokens, needed: str) -> None:
    """Raise ValueError, which names the image, unless `valid` (T,) holds for all tokens. On a GPU and in a traced graph
    this is a device-side assertion."""
    if valid.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(valid.all(), needed)
        return
    valid = untransformed(valid)
    if not valid.all():
        row = f", which fails in row {int(tokens.owners()[~valid][0])}" if valid.ndim == 1 else ""  # else it is vmapped
        raise ValueError(f"{needed}{row}")


def _scores(tokens: PackedTokens, importance: Tensor, drop: Drop, number: int, num_prefix_tokens: int) -> Tensor:
    """Call the function of scores. Return its scores (T,) float32, with zeros for prefix tokens."""
    starts = tokens.cu_seqlens - uniform_lengths(tokens.batch_size, num_prefix_tokens, importance.device)
    count = importance.shape[0] - tokens.batch_size * num_prefix_tokens
    rows = torch.arange(count, device=importance.device)
    rows = rows + num_prefix_tokens * (sequence_of_tokens(starts, count) + 1)  # where the patches are among all tokens
    patches = PackedTokens(
        tokens.values.detach()[rows], tokens.positions[rows], starts, tokens.max_seqlen - num_prefix_tokens
    )
    with torch.no_grad():
        scores = drop.scores(patches, patches.positions, importance[rows])
    name = f"the function of scores before block {number}"
    if not isinstance(scores, Tensor) or scores.shape != (count,) or not scores.is_floating_point():
        found = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"{name} returned {found}, expected a floating-point score for each patch, ({count},)")
    if isinstance(drop.amount, Mass):
        require((scores >= 0) & scores.isfinite(), patches, f"{name} must return finite scores from 0 on for a Mass")
    require(~scores.isnan(), patches, f"{name} must not return NaN")
    return torch.zeros_like(importance).index_copy(0, rows, scores.float())


def _fuse(tokens: PackedTokens, weights: Tensor, *, mean: bool) -> Tensor:
    """Return the weighted sum or mean of each sequence's tokens, (B, C)."""
    x, _ = tokens.pad(tokens.values)  # [B, N, C]
    weights, _ = tokens.pad(weights)  # [B, N]
    if mean:
        total = weights.sum(1, keepdim=True)
        weights = weights / total.where(total > 0, 1)  # it is 0 where nothing was dropped
    return torch.einsum("bn,bnc->bc", weights, x.to(weights.dtype)).to(x.dtype)


def _append(
    tokens: PackedTokens, sizes: Tensor | None, fused: Tensor, before: PackedTokens, *, position: int
) -> tuple[PackedTokens, Tensor | None]:
    """Append its row of `fused` (B, C), of size 1, to each sequence that is shorter than it was `before`."""
    lengths = tokens.lengths()
    added = [old > new for old, new in zip(before.lengths(), lengths, strict=True)]
    count = sum(added)
    if count == 0:
        return tokens, sizes
    starts = cumulative_lengths(before.cu_seqlens.diff() > tokens.cu_seqlens.diff())  # of the added tokens
    images = sequence_of_tokens(starts, count)
    order = torch.cat((tokens.owners(), images)).argsort(stable=True)

    def appended(x: Tensor, last: Tensor) -> Tensor:
        return gather_rows(torch.cat((x, last)), order)

    packed = PackedTokens(
        values=appended(tokens.values, fused[images]),
        positions=appended(tokens.positions, tokens.positions.new_full((count,), position)),
        cu_seqlens=tokens.cu_seqlens + starts,
        max_seqlen=max(length + more for length, more in zip(lengths, added, strict=True)),
    )
    return packed, None if sizes is None else appended(sizes, sizes.new_ones(count))
