"""Attention over packed sequences, with the class token's attention row as a by-product."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, jit, launch, next_power_of_2, resolve_backend, tl
from .rows import gather_rows, padding

MAX_HEAD_DIM = 128
MAX_SEQLEN = 4096
LOG2_E = math.log2(math.e)


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
        out (T, H, D), contiguous; and on request class_attention (T,) float32, the first token's softmax row averaged
        over the heads, which sums to 1 in each sequence and carries no gradient.

    Raises:
        ValueError: a shape, dtype, device or size outside of the above.
    """
    _check_attention(qkv, cu_seqlens, max_seqlen)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if qkv.dtype == torch.float64 and backend == "auto":
        backend = "torch"
    if resolve_backend(backend, qkv.device) == "torch":
        out = attention_reference(qkv, cu_seqlens, max_seqlen, scale)
        if return_class_attention:
            return out, class_attention_reference(qkv, cu_seqlens, max_seqlen, scale)
        return out
    if qkv.dtype == torch.float64:
        raise ValueError('qkv has dtype torch.float64, which backend "triton" does not compute')
    out, statistics = attention_op(qkv, cu_seqlens, max_seqlen, scale)
    if return_class_attention:
        return out, class_attention_op(qkv.detach(), statistics.detach(), cu_seqlens, max_seqlen, scale)
    return out


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


@torch.no_grad()
def class_attention_reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """The class attention row in plain torch: (T, 3, H, D) -> (T,) float32."""
    batch, tokens = len(cu_seqlens) - 1, len(qkv)
    if tokens == 0:
        return qkv.new_zeros(0, dtype=torch.float32)
    q, k, _ = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(1)
    ragged = tokens != batch * max_seqlen
    if ragged:
        slots, mask = padding(cu_seqlens, max_seqlen, tokens)
        k = k.new_zeros(batch * max_seqlen, *k.shape[1:]).index_copy(0, slots, k)
    q = q[cu_seqlens[:-1].clamp(max=tokens - 1)]
    scores = torch.einsum("bhd,bnhd->bhn", q * scale, k.unflatten(0, (batch, max_seqlen)))
    if ragged:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    row = scores.softmax(-1).mean(1).flatten().float()
    return row[slots] if ragged else row


@jit
def _dot(a, b):
    """a b, summed in float32 and never in TF32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def _forward_kernel(
    out,
    statistics,
    q,
    k,
    v,
    cu_seqlens,
    scale_log2,
    tokens,
    heads,
    stride_token,
    stride_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads q and writes out once (2 T H D elements), reads k and v once a block of BM queries; 4 N^2 D operations a
    head and sequence of N tokens. The statistics of a row are its highest score, times log2(e), and 1 / its sum: their
    logsumexp in one float would cost the backward pass a rounding error that plain torch does not make."""
    sequence, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32)
    m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    d = tl.arange(0, BD)  # [BD]
    if tl.program_id(1) * BM < length:
        base = start * stride_token + head * stride_head
        m_mask = (m[:, None] < length) & (d[None, :] < D)  # [BM, BD]
        q_tile = tl.load(q + base + m[:, None] * stride_token + d[None, :], mask=m_mask, other=0.0)  # [BM, BD]
        highest = tl.full([BM], float("-inf"), tl.float32)  # [BM]
        total = tl.zeros([BM], tl.float32)  # [BM]
        acc = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first in range(0, length, BN):
            n = first + tl.arange(0, BN)  # [BN]
            n_mask = (n[:, None] < length) & (d[None, :] < D)  # [BN, BD]
            offsets = base + n[:, None] * stride_token + d[None, :]  # [BN, BD]
            k_tile = tl.load(k + offsets, mask=n_mask, other=0.0)  # [BN, BD]
            scores = _dot(q_tile, tl.trans(k_tile)) * scale_log2  # [BM, BN]
            scores = tl.where(n[None, :] < length, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - new_highest[:, None])  # [BM, BN]
            shrink = tl.exp2(highest - new_highest)  # [BM]
            total = total * shrink + tl.sum(p, 1)
            highest = new_highest
            v_tile = tl.load(v + offsets, mask=n_mask, other=0.0)  # [BN, BD]
            acc = acc * shrink[:, None] + _dot(p.to(v_tile.dtype), v_tile)
        out_offsets = ((start + m)[:, None] * heads + head) * D + d[None, :]  # [BM, BD]
        tl.store(out + out_offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=m_mask)
        statistic = head * tokens + start + m  # [BM]
        tl.store(statistics + statistic, highest, mask=m < length)
        tl.store(statistics + heads * tokens + statistic, 1 / total, mask=m < length)


@jit
def _class_kernel(
    class_attention,
    q,
    k,
    statistics,
    cu_seqlens,
    scale_log2,
    tokens,
    heads,
    stride_token,
    stride_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads k once (T H D elements) and writes T floats; 2 N H D operations a sequence of N tokens."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32)
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    d = tl.arange(0, BD)  # [BD]
    if tl.program_id(1) * BN < length:
        n_mask = (n[:, None] < length) & (d[None, :] < D)  # [BN, BD]
        acc = tl.zeros([BN], tl.float32)  # [BN]
        q_offsets = start * stride_token + d  # [BD], of the first head
        k_offsets = start * stride_token + n[:, None] * stride_token + d[None, :]  # [BN, BD]
        statistic = start
        for _ in range(heads):
            query = tl.load(q + q_offsets, mask=d < D, other=0.0).to(tl.float32)  # [BD]
            k_tile = tl.load(k + k_offsets, mask=n_mask, other=0.0).to(tl.float32)  # [BN, BD]
            scores = tl.sum(query[None, :] * k_tile, 1) * scale_log2  # [BN]
            highest, share = tl.load(statistics + statistic), tl.load(statistics + heads * tokens + statistic)
            acc += tl.exp2(scores - highest) * share
            q_offsets += stride_head
            k_offsets += stride_head
            statistic += tokens
        tl.store(class_attention + start + n, acc / heads, mask=n < length)


@jit
def _delta_kernel(
    delta,
    out,
    grad_out,
    tokens,
    heads,
    grad_stride_token,
    grad_stride_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Reads out and its gradient (2 T H D elements), writes T H floats: delta (H, T), their products summed over D."""
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)  # [BD]
    mask = (t[:, None] < tokens) & (d[None, :] < D)  # [BM, BD]
    o = tl.load(out + (t[:, None] * heads + head) * D + d[None, :], mask=mask, other=0.0)  # [BM, BD]
    grad_offsets = t[:, None] * grad_stride_token + head * grad_stride_head + d[None, :]
    do = tl.load(grad_out + grad_offsets, mask=mask, other=0.0)  # [BM, BD]
    tl.store(delta + head * tokens + t, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=t < tokens)


@jit
def _dq_kernel(
    dq,
    q,
    k,
    v,
    grad_out,
    statistics,
    delta,
    cu_seqlens,
    scale,
    scale_log2,
    tokens,
    heads,
    stride_token,
    stride_head,
    grad_stride_token,
    grad_stride_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads q and grad_out and writes dq once (3 T H D elements), reads k and v once a block of BM queries; 6 N^2 D
    operations a head and sequence of N tokens."""
    sequence, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32)
    m = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    d = tl.arange(0, BD)  # [BD]
    if tl.program_id(1) * BM < length:
        base = start * stride_token + head * stride_head
        grad_base = start * grad_stride_token + head * grad_stride_head
        m_mask = (m[:, None] < length) & (d[None, :] < D)  # [BM, BD]
        q_tile = tl.load(q + base + m[:, None] * stride_token + d[None, :], mask=m_mask, other=0.0)  # [BM, BD]
        grad_offsets = grad_base + m[:, None] * grad_stride_token + d[None, :]
        do_tile = tl.load(grad_out + grad_offsets, mask=m_mask, other=0.0)  # [BM, BD]
        row = head * tokens + start + m  # [BM]
        highest = tl.load(statistics + row, mask=m < length, other=0.0)  # [BM]
        share = tl.load(statistics + heads * tokens + row, mask=m < length, other=0.0)  # [BM]
        row_delta = tl.load(delta + row, mask=m < length, other=0.0)  # [BM]
        acc = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first in range(0, length, BN):
            n = first + tl.arange(0, BN)  # [BN]
            n_mask = (n[:, None] < length) & (d[None, :] < D)  # [BN, BD]
            offsets = base + n[:, None] * stride_token + d[None, :]  # [BN, BD]
            k_tile = tl.load(k + offsets, mask=n_mask, other=0.0)  # [BN, BD]
            v_tile = tl.load(v + offsets, mask=n_mask, other=0.0)  # [BN, BD]
            scores = _dot(q_tile, tl.trans(k_tile)) * scale_log2  # [BM, BN]
            # Behind the end k is zero, but the score 0 can lie so far above the highest that p would be infinite.
            p = tl.where(n[None, :] < length, tl.exp2(scores - highest[:, None]) * share[:, None], 0.0)  # [BM, BN]
            dp = _dot(do_tile, tl.trans(v_tile))  # [BM, BN]
            ds = p * (dp - row_delta[:, None])  # [BM, BN]
            acc += _dot(ds.to(k_tile.dtype), k_tile)
        dq_offsets = ((start + m)[:, None] * 3 * heads + head) * D + d[None, :]  # [BM, BD]
        tl.store(dq + dq_offsets, (acc * scale).to(dq.dtype.element_ty), mask=m_mask)


@jit
def _dkv_kernel(
    dk,
    dv,
    q,
    k,
    v,
    grad_out,
    statistics,
    delta,
    cu_seqlens,
    scale,
    scale_log2,
    tokens,
    heads,
    stride_token,
    stride_head,
    grad_stride_token,
    grad_stride_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Reads k and v and writes dk and dv once (4 T H D elements), reads q and grad_out once a block of BN keys; 8 N^2 D
    operations a head and sequence of N tokens."""
    sequence, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start.to(tl.int32)
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    d = tl.arange(0, BD)  # [BD]
    if tl.program_id(1) * BN < length:
        base = start * stride_token + head * stride_head
        grad_base = start * grad_stride_token + head * grad_stride_head
        n_mask = (n[:, None] < length) & (d[None, :] < D)  # [BN, BD]
        offsets = base + n[:, None] * stride_token + d[None, :]  # [BN, BD]
        k_tile = tl.load(k + offsets, mask=n_mask, other=0.0)  # [BN, BD]
        v_tile = tl.load(v + offsets, mask=n_mask, other=0.0)  # [BN, BD]
        dk_acc = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        dv_acc = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        for first in range(0, length, BM):
            m = first + tl.arange(0, BM)  # [BM]
            m_mask = (m[:, None] < length) & (d[None, :] < D)  # [BM, BD]
            q_tile = tl.load(q + base + m[:, None] * stride_token + d[None, :], mask=m_mask, other=0.0)  # [BM, BD]
            grad_offsets = grad_base + m[:, None] * grad_stride_token + d[None, :]
            do_tile = tl.load(grad_out + grad_offsets, mask=m_mask, other=0.0)  # [BM, BD]
            row = head * tokens + start + m  # [BM]
            highest = tl.load(statistics + row, mask=m < length, other=0.0)  # [BM]
            share = tl.load(
                statistics + heads * tokens + row, mask=m < length, other=0.0
            )  # [BM], p is 0 behind the end
            row_delta = tl.load(delta + row, mask=m < length, other=0.0)  # [BM]
            scores = _dot(k_tile, tl.trans(q_tile)) * scale_log2  # [BN, BM]
            p = tl.exp2(scores - highest[None, :]) * share[None, :]  # [BN, BM]
            dv_acc += _dot(p.to(do_tile.dtype), do_tile)
            dp = _dot(v_tile, tl.trans(do_tile))  # [BN, BM]
            ds = p * (dp - row_delta[None, :])  # [BN, BM]
            dk_acc += _dot(ds.to(q_tile.dtype), q_tile)
        out_offsets = ((start + n)[:, None] * 3 * heads + head) * D + d[None, :]  # [BN, BD]
        tl.store(dk + out_offsets, (dk_acc * scale).to(dk.dtype.element_ty), mask=n_mask)
        tl.store(dv + out_offsets, dv_acc.to(dv.dtype.element_ty), mask=n_mask)


class Tiles(NamedTuple):
    """Launch configuration of a kernel: BM queries and BN keys a tile."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int = 1


def tiles(kernel: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of "forward", "dq" or "dkv": none spills registers on sm_80 or sm_90, for any head_dim."""
    if dtype == torch.float32:
        return Tiles(16, 16, num_warps=8) if head_dim > 64 else Tiles(32, 32, num_warps=8 if head_dim > 16 else 4)
    if head_dim > 64:
        return Tiles(64, 64, num_warps=8)
    if head_dim > 32 and kernel != "forward":
        return Tiles(64, 32, num_warps=4) if kernel == "dq" else Tiles(32, 32, num_warps=4)
    return Tiles(64, 64, num_warps=4)


def _head_dims(head_dim: int) -> dict[str, int]:
    """The constants D and BD: a tile holds a power of two of at least 16 channels."""
    return {"D": head_dim, "BD": max(16, next_power_of_2(head_dim))}


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy, so that the channels are contiguous and offsets within a sequence fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(0) * MAX_SEQLEN < 2**31 else x.contiguous()


def launch_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """The forward pass in Triton: out (T, H, D) and the statistics (2, H, T) of the softmax."""
    tokens, _, heads, head_dim = qkv.shape
    out, statistics = _fake_attention(qkv, cu_seqlens, max_seqlen, scale)
    if tokens:
        qkv, tile = _addressable(qkv), tiles("forward", head_dim, qkv.dtype)
        grid = ((len(cu_seqlens) - 1) * heads, cdiv(max_seqlen, tile.BM))
        launch(
            _forward_kernel, grid,
            out, statistics, *qkv.unbind(1), cu_seqlens, scale * LOG2_E, tokens, heads, qkv.stride(0), qkv.stride(2),
            **_head_dims(head_dim), **tile._asdict(),
        )  # fmt: skip
    return out, statistics


attention_op = torch.library.custom_op("smi_fast::attention", launch_attention, mutates_args=())


@attention_op.register_fake
def _fake_attention(qkv, cu_seqlens, max_seqlen, scale):
    tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(2, heads, tokens, dtype=torch.float32)


def launch_class_attention(
    qkv: Tensor, statistics: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """The first token's softmax row (T,), averaged over the heads in their order."""
    tokens, _, heads, head_dim = qkv.shape
    row = _fake_class_attention(qkv, statistics, cu_seqlens, max_seqlen, scale)
    if tokens:
        qkv, block = _addressable(qkv), 32
        grid = (len(cu_seqlens) - 1, cdiv(max_seqlen, block))
        launch(
            _class_kernel, grid,
            row, qkv[:, 0], qkv[:, 1], statistics, cu_seqlens, scale * LOG2_E, tokens, heads,
            qkv.stride(0), qkv.stride(2), **_head_dims(head_dim), BN=block, num_warps=4,
        )  # fmt: skip
    return row


class_attention_op = torch.library.custom_op("smi_fast::class_attention", launch_class_attention, mutates_args=())


@class_attention_op.register_fake
def _fake_class_attention(qkv, statistics, cu_seqlens, max_seqlen, scale):
    return qkv.new_empty(len(qkv), dtype=torch.float32)


def launch_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, statistics: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """The gradient (T, 3, H, D) of qkv: every element is written once, by one program."""
    tokens, _, heads, head_dim = qkv.shape
    grad = _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale)
    if tokens:
        qkv, grad_out = _addressable(qkv), _addressable(grad_out)
        constants = _head_dims(head_dim)
        delta, block = torch.empty_like(statistics[0]), 32
        launch(
            _delta_kernel, (cdiv(tokens, block), heads),
            delta, out, grad_out, tokens, heads, grad_out.stride(0), grad_out.stride(1),
            **constants, BM=block, num_warps=4,
        )  # fmt: skip
        inputs = (
            *qkv.unbind(1), grad_out, statistics, delta, cu_seqlens, scale, scale * LOG2_E, tokens, heads,
            qkv.stride(0), qkv.stride(2), grad_out.stride(0), grad_out.stride(1),
        )  # fmt: skip
        dq, dk, dv = grad.unbind(1)
        programs = (len(cu_seqlens) - 1) * heads
        tile = tiles("dq", head_dim, qkv.dtype)
        launch(_dq_kernel, (programs, cdiv(max_seqlen, tile.BM)), dq, *inputs, **constants, **tile._asdict())
        tile = tiles("dkv", head_dim, qkv.dtype)
        launch(_dkv_kernel, (programs, cdiv(max_seqlen, tile.BN)), dk, dv, *inputs, **constants, **tile._asdict())
    return grad


attention_backward_op = torch.library.custom_op(
    "smi_fast::attention_backward", launch_attention_backward, mutates_args=()
)


@attention_backward_op.register_fake
def _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale):
    return qkv.new_empty(qkv.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    return attention_backward_op(grad_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None


attention_op.register_autograd(_backward, setup_context=_save_for_backward)
