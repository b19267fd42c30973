"""Attention over packed sequences, with the class token's attention row as a by-product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, jit, launch, resolve_backend, tl
from .dispatch import attention_has_form, choose_attention, padded_head_dim
from .gradients import first_order
from .rows import gather_rows, padding

MAX_HEAD_DIM = 128
MAX_SEQLEN = 4096
LOG2_E = math.log2(math.e)
KEPT_ROW_BYTES = 512  # of a softmax row: up to this long, a CPU keeps the softmax for the backward pass


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_class_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v within each of B sequences laid end to end.

    Args:
        qkv: (T, 3, H, D) float32, bfloat16 or float16 (plain torch: float64 too), D a multiple of 8 up to 128: the
            output of the qkv projection, viewed. Its gradient has the same layout.
        cu_seqlens: (B + 1,) int32 cumulative lengths: sequence b is `qkv[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: length of the longest sequence, up to 4096.
        scale: of the scores; D ** -0.5 by default.
        return_class_attention: also return how much the first token of each sequence attends to every token.
        backend: "auto", "triton" or "torch".

    Returns:
        out (T, H, D), contiguous; and on request class_attention (H, T) float32, each head's softmax row of the first
        token, which sums to 1 in each sequence and carries no gradient.

    Raises:
        ValueError: a shape, dtype, device or size outside of the above.
    """
    _check_attention(qkv, cu_seqlens, max_seqlen)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if qkv.dtype == torch.float64 and backend == "auto":
        backend = "torch"
    if resolve_backend(backend, qkv.device) == "torch":
        if _suits_kept_softmax(qkv, len(cu_seqlens) - 1, max_seqlen):
            out = _KeptSoftmax.apply(qkv, len(cu_seqlens) - 1, scale)
        else:
            out = attention_reference(qkv, cu_seqlens, max_seqlen, scale)
        if return_class_attention:
            return out, class_attention_reference(qkv, cu_seqlens, max_seqlen, scale)
        return out
    if qkv.dtype == torch.float64:
        raise ValueError('qkv has dtype torch.float64, which backend "triton" does not compute')
    out, class_attention, _ = attention_op(qkv, cu_seqlens, max_seqlen, scale, return_class_attention)
    return (out, class_attention) if return_class_attention else out


def _check_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, not (tokens, 3, heads, head_dim)")
    head_dim = qkv.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"qkv has dtype {qkv.dtype}, not float32, bfloat16, float16 or (plain torch) float64")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (batch + 1,) torch.int32")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, qkv on {qkv.device}")
    if not 0 <= max_seqlen <= MAX_SEQLEN:
        raise ValueError(f"max_seqlen {max_seqlen} is outside 0..{MAX_SEQLEN}")
    if len(qkv) > (len(cu_seqlens) - 1) * max_seqlen:
        raise ValueError(f"{len(qkv)} tokens are more than {len(cu_seqlens) - 1} sequences of up to {max_seqlen} hold")


def attention_reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """What `attention` means, in plain torch: (T, 3, H, D) -> (T, H, D)."""
    batch, tokens, mask = len(cu_seqlens) - 1, len(qkv), None
    if tokens == 0:
        return qkv[:, 0] * 1  # a new tensor, and a gradient of zeros
    ragged = tokens != batch * max_seqlen
    if ragged:
        slots, mask = padding(cu_seqlens, max_seqlen, tokens)
        mask = mask[:, None, None]  # (B, 1, 1, N), over the keys
        qkv = qkv.new_zeros(batch * max_seqlen, *qkv.shape[1:]).index_copy(0, slots, qkv)
    q, k, v = qkv.unflatten(0, (batch, max_seqlen)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(0, 1)
    return gather_rows(out, slots) if ragged else out.contiguous()


def _suits_kept_softmax(qkv: Tensor, batch: int, max_seqlen: int) -> bool:
    return (
        qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and 0 < len(qkv) == batch * max_seqlen
        and max_seqlen * qkv.element_size() <= KEPT_ROW_BYTES
    )


class _KeptSoftmax(torch.autograd.Function):
    """Attention of equally long, short sequences as batched products, which a CPU runs faster than torch's fused form
    (in bfloat16 three times). Scores and softmax are float32, as they are there."""

    @staticmethod
    def forward(ctx, qkv: Tensor, batch: int, scale: float) -> Tensor:
        length, heads = len(qkv) // batch, qkv.shape[2]
        packed = qkv.unflatten(0, (batch, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        q, k, v = packed  # (B * H, N, D) each
        scores = q.new_empty(batch * heads, length, length, dtype=torch.float32)
        scores = torch.baddbmm(scores, q.float(), k.float().mT, beta=0, alpha=scale)
        p = scores.softmax(-1).to(qkv.dtype)  # (B * H, N, N)
        ctx.save_for_backward(packed, p)
        ctx.batch, ctx.scale = batch, scale
        # Contiguous before it is flattened: torch.compile (2.11) gives wrong gradients the other way round.
        return torch.bmm(p, v).unflatten(0, (batch, heads)).transpose(1, 2).contiguous().flatten(0, 1)

    @staticmethod
    @first_order
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, None, None]:
        packed, p = ctx.saved_tensors
        q, k, v = packed
        do = grad_out.unflatten(0, (ctx.batch, -1)).transpose(1, 2).reshape(v.shape)  # (B * H, N, D)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)  # sums in float32
        dq, dk, dv = torch.bmm(ds, k).mul_(ctx.scale), torch.bmm(ds.mT, q).mul_(ctx.scale), torch.bmm(p.mT, do)
        grads = torch.stack((dq, dk, dv)).unflatten(1, (ctx.batch, -1)).permute(1, 3, 0, 2, 4)  # (B, N, 3, H, D)
        return grads.flatten(0, 1), None, None


@torch.no_grad()
def class_attention_reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """The class attention in plain torch: (T, 3, H, D) -> (H, T) float32."""
    batch, tokens = len(cu_seqlens) - 1, len(qkv)
    if tokens == 0:
        return qkv.new_zeros(qkv.shape[2], 0, dtype=torch.float32)
    q, k, _ = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(1)
    ragged = tokens != batch * max_seqlen
    if ragged:
        slots, mask = padding(cu_seqlens, max_seqlen, tokens)
        k = k.new_zeros(batch * max_seqlen, *k.shape[1:]).index_copy(0, slots, k)
    q = q[cu_seqlens[:-1].clamp(max=tokens - 1)]
    scores = torch.einsum("bhd,bnhd->hbn", q * scale, k.unflatten(0, (batch, max_seqlen)))
    if ragged:
        scores = scores.masked_fill(~mask, -torch.inf)
    rows = scores.softmax(-1).flatten(1).float()
    return rows[:, slots] if ragged else rows


@jit
def _dot(a, b):
    """a b, summed in float32 and never in TF32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def _locate(cu_seqlens, heads):
    """Where this program's sequence starts, how long it is, and the program's head."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return start, tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32), head.to(tl.int64)


@jit
def _tile(rows, length, stride, D: tl.constexpr, BD: tl.constexpr):
    """Offsets and mask [BR, BD] of rows [BR] of a sequence; an offset within 4096 tokens fits 32 bits."""
    d = tl.arange(0, BD)  # [BD]
    return rows[:, None] * stride + d[None, :], (rows[:, None] < length) & (d[None, :] < D)


@jit
def _tile_forward_kernel(
    out,
    class_attention,
    highests,
    shares,
    qkv,
    cu_seqlens,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    CLASS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BN: tl.constexpr,
):
    """A sequence of up to BN tokens: reads q, k and v once and writes out once (4 N D elements a head and sequence of N
    tokens) and, with CLASS, N floats; 4 N^2 D operations."""
    start, length, head = _locate(cu_seqlens, heads)
    n = tl.arange(0, BN)  # [BN]
    if length > 0:
        width = heads * D
        offsets, mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
        qkv += start * 3 * width + head * D
        q = tl.load(qkv + offsets, mask=mask, other=0.0)  # [BN, BD]
        k = tl.load(qkv + width + offsets, mask=mask, other=0.0)  # [BN, BD]
        v = tl.load(qkv + 2 * width + offsets, mask=mask, other=0.0)  # [BN, BD]
        scores = tl.where(n[None, :] < length, _dot(q, tl.trans(k)) * scale_log2, float("-inf"))  # [BN, BN]
        highest = tl.max(scores, 1)  # [BN]
        p = tl.exp2(scores - highest[:, None])  # [BN, BN]
        share = 1 / tl.sum(p, 1)  # [BN]
        row = head * tokens + start + n  # [BN], of what is (H, T)
        if STATISTICS:
            tl.store(highests + row, highest, mask=n < length)
            tl.store(shares + row, share, mask=n < length)
        if CLASS:
            # Stored from where it lies: to sum it out of the tile would cost a reduction over all warps.
            class_row = class_attention + row[None, :] + tl.zeros([BN, 1], tl.int32)  # [BN, BN]
            tl.store(class_row, p * share[:, None], mask=(n[:, None] == 0) & (n[None, :] < length))
        acc = _dot(p.to(v.dtype), v) * share[:, None]  # [BN, BD]
        offsets, mask = _tile(n, length, width, D, BD)
        tl.store(out + start * width + head * D + offsets, acc.to(out.dtype.element_ty), mask=mask)


@jit
def _blocks_forward_kernel(
    out,
    class_attention,
    highests,
    shares,
    qkv,
    cu_seqlens,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    CLASS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads q and writes out once (2 T H D elements), reads k and v once a block of BM queries; 4 N^2 D operations a
    head and sequence of N tokens. The statistics of a row are its highest score, times log2(e), and 1 / its sum: their
    logsumexp in one float would cost the backward pass a rounding error that plain torch does not make."""
    start, length, head = _locate(cu_seqlens, heads)
    first_m = tl.program_id(1) * BM
    m = first_m + tl.arange(0, BM)  # [BM]
    if first_m < length:
        width = heads * D
        qkv += start * 3 * width + head * D
        offsets, mask = _tile(m, length, 3 * width, D, BD)  # [BM, BD]
        q = tl.load(qkv + offsets, mask=mask, other=0.0)  # [BM, BD]
        highest = tl.full([BM], float("-inf"), tl.float32)  # [BM]
        total = tl.zeros([BM], tl.float32)  # [BM]
        acc = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            n_offsets, n_mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
            k = tl.load(qkv + width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            v = tl.load(qkv + 2 * width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            scores = tl.where(n[None, :] < length, _dot(q, tl.trans(k)) * scale_log2, float("-inf"))  # [BM, BN]
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - new_highest[:, None])  # [BM, BN]
            shrink = tl.exp2(highest - new_highest)  # [BM]
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            highest = new_highest
        share = 1 / total  # [BM]
        offsets, mask = _tile(m, length, width, D, BD)
        tl.store(out + start * width + head * D + offsets, (acc * share[:, None]).to(out.dtype.element_ty), mask=mask)
        row = head * tokens + start  # of what is (H, T)
        if STATISTICS:
            tl.store(highests + row + m, highest, mask=m < length)
            tl.store(shares + row + m, share, mask=m < length)
        if CLASS and first_m == 0:
            # Scores are summed here in another order than by the tile's products, and large ones differ: the row is
            # normalised by the maximum and the total of these, which wait in the output until both are known.
            d = tl.arange(0, BD)  # [BD]
            query = tl.load(qkv + d, mask=d < D, other=0.0).to(tl.float32)  # [BD]
            class_highest, class_total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
            for first_n in range(0, length, BN):
                n = first_n + tl.arange(0, BN)  # [BN]
                n_offsets, n_mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
                k = tl.load(qkv + width + n_offsets, mask=n_mask, other=0.0).to(tl.float32)  # [BN, BD]
                scores = tl.where(n < length, tl.sum(query[None, :] * k, 1) * scale_log2, float("-inf"))  # [BN]
                tl.store(class_attention + row + n, scores, mask=n < length)
                class_highest = tl.maximum(class_highest, tl.max(scores, 0))
            tl.debug_barrier()  # all scores are stored before a thread loads one
            for first_n in range(0, length, BN):
                n = first_n + tl.arange(0, BN)  # [BN]
                scores = tl.load(class_attention + row + n, mask=n < length, other=float("-inf"))  # [BN]
                class_total += tl.sum(tl.exp2(scores - class_highest), 0)
            class_share = 1 / class_total
            for first_n in range(0, length, BN):
                n = first_n + tl.arange(0, BN)  # [BN]
                scores = tl.load(class_attention + row + n, mask=n < length, other=float("-inf"))  # [BN]
                tl.debug_barrier()  # and loaded by all threads before one overwrites it
                tl.store(class_attention + row + n, tl.exp2(scores - class_highest) * class_share, mask=n < length)


@jit
def _tile_backward_kernel(
    grad,
    grad_out,
    qkv,
    cu_seqlens,
    scale,
    scale_log2,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """A sequence of up to BN tokens: reads q, k, v and grad_out once and writes dq, dk and dv once (7 N D elements a
    head and sequence of N tokens); 10 N^2 D operations. Nothing of the forward pass is needed but its input."""
    start, length, head = _locate(cu_seqlens, heads)
    n = tl.arange(0, BN)  # [BN]
    if length > 0:
        width = heads * D
        offsets, mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
        out_offsets, _ = _tile(n, length, width, D, BD)  # [BN, BD]
        base = start * 3 * width + head * D
        qkv += base
        q = tl.load(qkv + offsets, mask=mask, other=0.0)  # [BN, BD]
        k = tl.load(qkv + width + offsets, mask=mask, other=0.0)  # [BN, BD]
        v = tl.load(qkv + 2 * width + offsets, mask=mask, other=0.0)  # [BN, BD]
        do = tl.load(grad_out + start * width + head * D + out_offsets, mask=mask, other=0.0)  # [BN, BD]
        scores = tl.where(n[None, :] < length, _dot(q, tl.trans(k)) * scale_log2, float("-inf"))  # [BN, BN]
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])  # [BN, BN]
        p *= (1 / tl.sum(p, 1))[:, None]
        grad += base
        dv = _dot(tl.trans(p.to(do.dtype)), do)  # [BN, BD]
        tl.store(grad + 2 * width + offsets, dv.to(grad.dtype.element_ty), mask=mask)
        dp = _dot(do, tl.trans(v))  # [BN, BN]
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)  # [BN, BN]
        dq = _dot(ds, k)  # [BN, BD]
        tl.store(grad + offsets, dq.to(grad.dtype.element_ty), mask=mask)
        dk = _dot(tl.trans(ds), q)  # [BN, BD]
        tl.store(grad + width + offsets, dk.to(grad.dtype.element_ty), mask=mask)


@jit
def _rows_backward_kernel(
    grad,
    grad_out,
    qkv,
    out,
    highests,
    shares,
    cu_seqlens,
    scale,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):
    """A sequence of up to BM tokens, whose rows stay while its keys pass in blocks of BN: reads q, k, v, out and
    grad_out once and writes dq, dk and dv once (8 N D elements a head and sequence of N tokens); 10 N^2 D
    operations."""
    start, length, head = _locate(cu_seqlens, heads)
    m = tl.arange(0, BM)  # [BM], all rows
    if length > 0:
        width = heads * D
        base = start * 3 * width + head * D
        qkv += base
        grad += base
        offsets, mask = _tile(m, length, 3 * width, D, BD)  # [BM, BD]
        q = tl.load(qkv + offsets, mask=mask, other=0.0)  # [BM, BD]
        out_offsets, _ = _tile(m, length, width, D, BD)  # [BM, BD]
        out_base = start * width + head * D
        do = tl.load(grad_out + out_base + out_offsets, mask=mask, other=0.0)  # [BM, BD]
        o = tl.load(out + out_base + out_offsets, mask=mask, other=0.0)  # [BM, BD]
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        row = head * tokens + start + m  # [BM]
        highest = tl.load(highests + row, mask=m < length, other=0.0)  # [BM]
        share = tl.load(shares + row, mask=m < length, other=0.0)  # [BM]
        dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            n_offsets, n_mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
            k = tl.load(qkv + width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            v = tl.load(qkv + 2 * width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            scores = _dot(q, tl.trans(k)) * scale_log2  # [BM, BN]
            # Behind the end k is zero, but the score 0 can lie so far above the highest that p would be infinite.
            p = tl.where(n[None, :] < length, tl.exp2(scores - highest[:, None]) * share[:, None], 0.0)  # [BM, BN]
            dp = _dot(do, tl.trans(v))  # [BM, BN]
            ds = (p * (dp - delta[:, None]) * scale).to(q.dtype)  # [BM, BN]
            dq += _dot(ds, k)
            # Tensor cores of sm_90 want at least 64 rows: channels where keys are fewer.
            if CHANNELS_FIRST:
                dv = tl.trans(_dot(tl.trans(do), p.to(do.dtype)))  # [BN, BD]
                dk = tl.trans(_dot(tl.trans(q), ds))  # [BN, BD]
            else:
                dv = _dot(tl.trans(p.to(do.dtype)), do)  # [BN, BD]
                dk = _dot(tl.trans(ds), q)  # [BN, BD]
            tl.store(grad + 2 * width + n_offsets, dv.to(grad.dtype.element_ty), mask=n_mask)
            tl.store(grad + width + n_offsets, dk.to(grad.dtype.element_ty), mask=n_mask)
        offsets, mask = _tile(m, length, 3 * width, D, BD)
        tl.store(grad + offsets, dq.to(grad.dtype.element_ty), mask=mask)


@jit
def _blocks_dq_kernel(
    grad,
    delta,
    grad_out,
    qkv,
    out,
    highests,
    shares,
    cu_seqlens,
    scale,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads q, out and grad_out and writes dq once (4 T H D elements), reads k and v once a block of BM queries;
    6 N^2 D operations a head and sequence of N tokens. Leaves delta (H, T), the sum over D of out and its gradient."""
    start, length, head = _locate(cu_seqlens, heads)
    first_m = tl.program_id(1) * BM
    m = first_m + tl.arange(0, BM)  # [BM]
    if first_m < length:
        width = heads * D
        base = start * 3 * width + head * D
        qkv += base
        offsets, mask = _tile(m, length, 3 * width, D, BD)  # [BM, BD]
        q = tl.load(qkv + offsets, mask=mask, other=0.0)  # [BM, BD]
        out_offsets, _ = _tile(m, length, width, D, BD)  # [BM, BD]
        out_base = start * width + head * D
        do = tl.load(grad_out + out_base + out_offsets, mask=mask, other=0.0)  # [BM, BD]
        o = tl.load(out + out_base + out_offsets, mask=mask, other=0.0)  # [BM, BD]
        row = head * tokens + start + m  # [BM]
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        tl.store(delta + row, row_delta, mask=m < length)
        highest = tl.load(highests + row, mask=m < length, other=0.0)  # [BM]
        share = tl.load(shares + row, mask=m < length, other=0.0)  # [BM]
        dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            n_offsets, n_mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
            k = tl.load(qkv + width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            v = tl.load(qkv + 2 * width + n_offsets, mask=n_mask, other=0.0)  # [BN, BD]
            scores = _dot(q, tl.trans(k)) * scale_log2  # [BM, BN]
            # Behind the end k is zero, but the score 0 can lie so far above the highest that p would be infinite.
            p = tl.where(n[None, :] < length, tl.exp2(scores - highest[:, None]) * share[:, None], 0.0)  # [BM, BN]
            ds = p * (_dot(do, tl.trans(v)) - row_delta[:, None])  # [BM, BN]
            dq += _dot(ds.to(k.dtype), k)
        tl.store(grad + base + offsets, (dq * scale).to(grad.dtype.element_ty), mask=mask)


@jit
def _blocks_dkv_kernel(
    grad,
    delta,
    grad_out,
    qkv,
    highests,
    shares,
    cu_seqlens,
    scale,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads k and v and writes dk and dv once (4 T H D elements), reads q and grad_out once a block of BN keys; 8 N^2 D
    operations a head and sequence of N tokens."""
    start, length, head = _locate(cu_seqlens, heads)
    first_n = tl.program_id(1) * BN
    n = first_n + tl.arange(0, BN)  # [BN]
    if first_n < length:
        width = heads * D
        base = start * 3 * width + head * D
        qkv += base
        grad += base
        grad_out += start * width + head * D
        row = head * tokens + start  # of what is (H, T)
        offsets, mask = _tile(n, length, 3 * width, D, BD)  # [BN, BD]
        k = tl.load(qkv + width + offsets, mask=mask, other=0.0)  # [BN, BD]
        v = tl.load(qkv + 2 * width + offsets, mask=mask, other=0.0)  # [BN, BD]
        dk = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        dv = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        for first_m in range(0, length, BM):
            m = first_m + tl.arange(0, BM)  # [BM]
            m_offsets, m_mask = _tile(m, length, 3 * width, D, BD)  # [BM, BD]
            q = tl.load(qkv + m_offsets, mask=m_mask, other=0.0)  # [BM, BD]
            out_offsets, _ = _tile(m, length, width, D, BD)  # [BM, BD]
            do = tl.load(grad_out + out_offsets, mask=m_mask, other=0.0)  # [BM, BD]
            highest = tl.load(highests + row + m, mask=m < length, other=0.0)  # [BM]
            share = tl.load(shares + row + m, mask=m < length, other=0.0)  # [BM]; with 0, p is 0 behind the end
            row_delta = tl.load(delta + row + m, mask=m < length, other=0.0)  # [BM]
            scores = _dot(k, tl.trans(q)) * scale_log2  # [BN, BM]
            p = tl.exp2(scores - highest[None, :]) * share[None, :]  # [BN, BM]
            dv += _dot(p.to(do.dtype), do)
            ds = p * (_dot(v, tl.trans(do)) - row_delta[None, :])  # [BN, BM]
            dk += _dot(ds.to(q.dtype), q)
        tl.store(grad + width + offsets, (dk * scale).to(grad.dtype.element_ty), mask=mask)
        tl.store(grad + 2 * width + offsets, dv.to(grad.dtype.element_ty), mask=mask)


def launch_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, with_class: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass in Triton: out (T, H, D), the class attention (H, T) where it is asked for and (H, 0) elsewhere,
    and the statistics of the softmax, (2, H, T) where the backward pass needs them and (2, H, 0) elsewhere."""
    tokens, _, heads, head_dim = qkv.shape
    out, row, statistics = _fake_attention(qkv, cu_seqlens, max_seqlen, scale, with_class)
    if tokens:
        form, tiles = choose_attention("attention_forward", qkv, max_seqlen)
        tensors = out, row, *statistics, qkv.contiguous(), cu_seqlens
        constants = {"D": head_dim, "BD": padded_head_dim(head_dim), "CLASS": with_class}
        constants["STATISTICS"] = statistics.numel() > 0
        programs = (len(cu_seqlens) - 1) * heads
        if form == "tile":
            kernel, grid = _tile_forward_kernel, (programs,)
        else:
            kernel, grid = _blocks_forward_kernel, (programs, cdiv(max_seqlen, tiles["BM"]))
        launch(kernel, grid, *tensors, scale * LOG2_E, tokens, heads, **constants, **tiles)
    return out, row, statistics


attention_op = torch.library.custom_op("smi_fast::attention", launch_attention, mutates_args=())


@attention_op.register_fake
def _fake_attention(qkv, cu_seqlens, max_seqlen, scale, with_class):
    tokens, _, heads, head_dim = qkv.shape
    kept = tokens if needs_statistics(qkv, max_seqlen) else 0
    row = qkv.new_empty(heads, tokens if with_class else 0, dtype=torch.float32)
    return qkv.new_empty(tokens, heads, head_dim), row, qkv.new_empty(2, heads, kept, dtype=torch.float32)


def needs_statistics(qkv: Tensor, max_seqlen: int) -> bool:
    """Whether the backward pass wants the softmax's statistics, and out: not where one tile holds a sequence."""
    return not attention_has_form("tile", "attention_backward", qkv, max_seqlen)


def launch_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    statistics: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """The gradient (T, 3, H, D) of qkv: every element is written once, by one program. `out` and `statistics` are those
    of the forward pass, or None where they are not needed."""
    tokens, _, heads, head_dim = qkv.shape
    grad = _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale)
    if tokens:
        form, tiles = choose_attention("attention_backward", qkv, max_seqlen)
        qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
        constants = {"D": head_dim, "BD": padded_head_dim(head_dim)}
        scales, programs = (scale, scale * LOG2_E), (len(cu_seqlens) - 1) * heads
        if form == "tile":
            inputs = grad_out, qkv, cu_seqlens, *scales, heads
            launch(_tile_backward_kernel, (programs,), grad, *inputs, **constants, **tiles)
        elif form == "rows":
            inputs = grad_out, qkv, out, *statistics, cu_seqlens, *scales, tokens, heads
            launch(_rows_backward_kernel, (programs,), grad, *inputs, **constants, **tiles)
        else:
            delta = torch.empty_like(statistics[0])
            inputs = *statistics, cu_seqlens, *scales, tokens, heads
            grid = programs, cdiv(max_seqlen, tiles["dq"]["BM"])
            launch(_blocks_dq_kernel, grid, grad, delta, grad_out, qkv, out, *inputs, **constants, **tiles["dq"])
            grid = programs, cdiv(max_seqlen, tiles["dkv"]["BN"])
            launch(_blocks_dkv_kernel, grid, grad, delta, grad_out, qkv, *inputs, **constants, **tiles["dkv"])
    return grad


attention_backward_op = torch.library.custom_op(
    "smi_fast::attention_backward", launch_attention_backward, mutates_args=()
)


@attention_backward_op.register_fake
def _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale):
    return qkv.new_empty(qkv.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, _ = inputs
    out, row, statistics = output
    kept = (out, statistics) if needs_statistics(qkv, ctx.max_seqlen) else (None, None)
    ctx.save_for_backward(qkv, *kept, cu_seqlens)
    ctx.mark_non_differentiable(row, statistics)
    ctx.set_materialize_grads(False)  # or zeros are written for each of them


@first_order
def _backward(ctx, grad_out, *_):
    return attention_backward_op(grad_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save_for_backward)
