"""Attention with one query for each sequence, as the last block of a classifier needs it for its class token."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LOG2_E, MAX_HEAD_DIM, MAX_SEQLEN
from .backend import contiguous_like, jit, launch, resolve_backend, tl
from .dispatch import choose_attention, padded_head_dim
from .gradients import any_order, gradients, transformed
from .operators import operation
from .rows import gather_rows, padding
from .tiles import load_row, load_rows, locate, scores_of_row, store_row, store_rows


def class_attention(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T) v (Vaswani et al. 2017, equation 1) with one query for each of B sequences, whose
    keys and values are laid end to end.

    Args:
        q: (B, H, D), the queries. Their dtype is float32, bfloat16 or float16, and in plain torch it may be float64. D
            is a multiple of 8 up to 128.
        kv: (T, 2, H, D), the keys and values of all tokens, of the dtype of q. The gradient has the same layout.
        cu_seqlens: (B + 1,) int32, cumulative lengths. Sequence b is `kv[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: the length of the longest sequence, up to 4096.
        scale: the factor of the scores; D ** -0.5 by default.
        return_attention: also return how much each query attends to every token of its sequence.
        backend: "auto", "triton" or "torch".

    Returns:
        out (B, H, D), of the dtype of q and zero where a sequence is empty. With `return_attention` also attention
        (H, T) float32: each head's softmax row, which sums to 1 in each sequence and carries no gradient.

    Raises:
        ValueError: a shape, dtype, device or size is not as described above.
    """
    _check_class_attention(q, kv, cu_seqlens, max_seqlen)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.dtype == torch.float64 and backend == "auto":
        backend = "torch"
    plain = resolve_backend(backend, q.device) == "torch"
    if q.dtype == torch.float64 and not plain:
        raise ValueError('q has dtype torch.float64, which backend "triton" does not compute')
    if plain or transformed():
        out, attention = class_attention_reference(q, kv, cu_seqlens, max_seqlen, scale)
    else:
        out, attention, _ = _class_attention(q, kv, cu_seqlens, max_seqlen, scale)
    return (out, attention.detach()) if return_attention else out


def _check_class_attention(q: Tensor, kv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}, not (batch, heads, head_dim)")
    batch, heads, head_dim = q.shape
    if kv.dim() != 4 or kv.shape[1:] != (2, heads, head_dim):
        raise ValueError(f"kv has shape {tuple(kv.shape)}, not (tokens, 2, {heads}, {head_dim})")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"q has dtype {q.dtype}, not float32, bfloat16, float16 or (plain torch) float64")
    if kv.dtype != q.dtype:
        raise ValueError(f"kv has dtype {kv.dtype}, q has {q.dtype}")
    if cu_seqlens.shape != (batch + 1,) or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not ({batch + 1},) torch.int32")
    for name, tensor in (("kv", kv), ("cu_seqlens", cu_seqlens)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    if not 0 <= max_seqlen <= MAX_SEQLEN:
        raise ValueError(f"max_seqlen {max_seqlen} is outside 0..{MAX_SEQLEN}")
    if kv.shape[0] > batch * max_seqlen:
        raise ValueError(f"{kv.shape[0]} tokens are more than {batch} sequences of up to {max_seqlen} hold")


def class_attention_reference(
    q: Tensor, kv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Define `class_attention` in plain torch, with the softmax in float32: out (B, H, D) and attention (H, T)."""
    (batch, heads, _), tokens = q.shape, kv.shape[0]
    if tokens == 0:
        return q * 0, q.new_zeros(heads, 0, dtype=torch.float32)
    ragged = tokens != batch * max_seqlen
    if ragged:
        slots, mask = padding(cu_seqlens, max_seqlen, tokens)
        kv = kv.new_zeros(batch * max_seqlen, *kv.shape[1:]).index_copy(0, slots, kv)
    k, v = kv.unflatten(0, (batch, max_seqlen)).unbind(2)  # (B, N, H, D) each
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bhd,bnhd->hbn", q.to(exact), k.to(exact)) * scale
    if ragged:
        # The scores of an empty sequence must not all be -inf, or its softmax would be NaN. Its values are all zero.
        scores = scores.masked_fill(~mask & mask.any(1, keepdim=True), -torch.inf)
    attention = scores.softmax(-1)  # (H, B, N)
    out = torch.einsum("hbn,bnhd->bhd", attention.to(v.dtype), v)
    attention = attention.detach().flatten(1).float()
    return out, gather_rows(attention.T, slots).T if ragged else attention


@jit(do_not_specialize=["tokens"])
def _class_forward_kernel(
    out,
    attention,
    statistics,
    q,
    kv,
    cu_seqlens,
    scale_log2,
    tokens,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """out = softmax(scale q k^T) v of one query (Vaswani et al. 2017, equation 1), and the softmax row itself.

    All programs together read k and v once, 2 T H D elements, and write H T floats. With SEVERAL, a sequence has more
    than one block of BN tokens, and k is read twice, from cache the second time: first for the running maximum and
    total (FlashAttention: Dao et al. 2022, algorithm 1), then for the row. They compute 4 N D operations for each head
    and sequence of N tokens. The statistics of a softmax row are its highest score, times log2(e), and 1 / its sum.
    """
    start, length, head = locate(cu_seqlens, heads)
    program = tl.program_id(0).to(tl.int64)
    kv += (start * 2 * heads + head) * D
    row = attention + head * tokens + start
    query = load_row(q + program * D, D, BD)  # [BD]
    acc = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
    if SEVERAL:
        highest, total = tl.full([], -1e38, tl.float32), tl.full([], 0.0, tl.float32)
        for first in range(0, length, BN):
            n = first + tl.arange(0, BN)  # [BN]
            k = load_rows(kv, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
            scores = scores_of_row(query, k, n, length, scale_log2)  # [BN]
            new_highest = tl.maximum(highest, tl.max(scores, 0))
            total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(scores - new_highest), 0)
            highest = new_highest
        share = 1 / tl.maximum(total, 1e-30)
        for first in range(0, length, BN):
            n = first + tl.arange(0, BN)  # [BN]
            k = load_rows(kv, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
            v = load_rows(kv + heads * D, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
            p = tl.exp2(scores_of_row(query, k, n, length, scale_log2) - highest) * share  # [BN]
            tl.store(row + n, p, mask=n < length)
            acc += p[:, None] * v
    else:
        n = tl.arange(0, BN)  # [BN]
        k = load_rows(kv, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        v = load_rows(kv + heads * D, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        scores = scores_of_row(query, k, n, length, scale_log2)  # [BN]
        highest = tl.maximum(tl.max(scores, 0), -1e38)  # finite also for an empty sequence
        p = tl.exp2(scores - highest)  # [BN]
        share = 1 / tl.maximum(tl.sum(p, 0), 1e-30)
        p *= share
        tl.store(row + n, p, mask=n < length)
        acc += p[:, None] * v
    store_row(out + program * D, tl.sum(acc, 0), D, BD)
    tl.store(statistics + 2 * program, highest)
    tl.store(statistics + 2 * program + 1, share)


@jit
def _class_backward_kernel(
    grad_q,
    grad_kv,
    grad_out,
    q,
    kv,
    statistics,
    cu_seqlens,
    scale,
    scale_log2,
    heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """dv = p^T do, dq = ds k and dk = ds^T q of one query, where p = softmax(scale q k^T), do = grad_out, dp = do v^T
    and ds = scale p (dp - sum(p dp)) (FlashAttention: Dao et al. 2022, appendix B.2).

    All programs together read k and v twice, from cache the second time, and write dk and dv once: 4 T H D elements.
    They compute 14 N D operations for each head and sequence of N tokens. FlashAttention takes sum(p dp) from the
    rounded output; here it is summed in float32, because with one query the rounding would show in every gradient.
    """
    start, length, head = locate(cu_seqlens, heads)
    program = tl.program_id(0).to(tl.int64)
    kv += (start * 2 * heads + head) * D
    grad_kv += (start * 2 * heads + head) * D
    query = load_row(q + program * D, D, BD)  # [BD]
    do = load_row(grad_out + program * D, D, BD)  # [BD]
    highest, share = tl.load(statistics + 2 * program), tl.load(statistics + 2 * program + 1)
    weighted = tl.zeros([BN], tl.float32)  # [BN]
    for first in range(0, length, BN):
        n = first + tl.arange(0, BN)  # [BN]
        k = load_rows(kv, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        v = load_rows(kv + heads * D, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        p = tl.exp2(scores_of_row(query, k, n, length, scale_log2) - highest) * share  # [BN]
        weighted += p * tl.sum(do[None, :] * v, 1)
    delta = tl.sum(weighted, 0)
    acc = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
    for first in range(0, length, BN):
        n = first + tl.arange(0, BN)  # [BN]
        k = load_rows(kv, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        v = load_rows(kv + heads * D, n, length, 2 * heads * D, D, BD).to(tl.float32)  # [BN, BD]
        p = tl.exp2(scores_of_row(query, k, n, length, scale_log2) - highest) * share  # [BN]
        ds = p * (tl.sum(do[None, :] * v, 1) - delta) * scale  # [BN]
        acc += ds[:, None] * k
        store_rows(grad_kv, ds[:, None] * query[None, :], n, length, 2 * heads * D, D, BD)
        store_rows(grad_kv + heads * D, p[:, None] * do[None, :], n, length, 2 * heads * D, D, BD)
    store_row(grad_q + program * D, tl.sum(acc, 0), D, BD)


def launch_class_attention(
    q: Tensor, kv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass in Triton. Returns out (B, H, D), the attention (H, T) float32, and the statistics
    (B, H, 2) float32 of the softmax, which the backward pass reads."""
    (batch, heads, head_dim), tokens = q.shape, kv.shape[0]
    out, attention, statistics = _fake_class_attention(q, kv, cu_seqlens, max_seqlen, scale)
    if batch:
        _, tiles = choose_attention("class_attention_forward", q, max_seqlen)
        launch(
            _class_forward_kernel, (batch * heads,), out=out, attention=attention, statistics=statistics,
            q=q.contiguous(), kv=kv.contiguous(), cu_seqlens=cu_seqlens, scale_log2=scale * LOG2_E, tokens=tokens,
            heads=heads, D=head_dim, BD=padded_head_dim(head_dim), SEVERAL=max_seqlen > tiles["BN"], **tiles,
        )  # fmt: skip
    return out, attention, statistics


class_attention_op = torch.library.custom_op("smi_fast::class_attention", launch_class_attention, mutates_args=())


@class_attention_op.register_fake
def _fake_class_attention(q, kv, cu_seqlens, max_seqlen, scale):
    batch, heads, _ = q.shape
    attention = q.new_empty(heads, kv.shape[0], dtype=torch.float32)  # len() would tie a traced graph to this number
    return contiguous_like(q), attention, q.new_empty(batch, heads, 2, dtype=torch.float32)


def launch_class_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients (B, H, D) of q and (T, 2, H, D) of kv in Triton, writing each element once. `statistics`
    (B, H, 2) is what `launch_class_attention` returned."""
    batch, heads, head_dim = q.shape
    grad_q, grad_kv = _fake_class_attention_backward(grad_out, q, kv, statistics, cu_seqlens, max_seqlen, scale)
    if batch:
        _, tiles = choose_attention("class_attention_backward", q, max_seqlen)
        launch(
            _class_backward_kernel, (batch * heads,), grad_q=grad_q, grad_kv=grad_kv, grad_out=grad_out.contiguous(),
            q=q.contiguous(), kv=kv.contiguous(), statistics=statistics, cu_seqlens=cu_seqlens, scale=scale,
            scale_log2=scale * LOG2_E, heads=heads, D=head_dim, BD=padded_head_dim(head_dim), **tiles,
        )  # fmt: skip
    return grad_q, grad_kv


class_attention_backward_op = torch.library.custom_op(
    "smi_fast::class_attention_backward", launch_class_attention_backward, mutates_args=()
)
_class_attention_backward = operation(class_attention_backward_op, launch_class_attention_backward)


@class_attention_backward_op.register_fake
def _fake_class_attention_backward(grad_out, q, kv, statistics, cu_seqlens, max_seqlen, scale):
    return contiguous_like(q), contiguous_like(kv)


def _save_for_backward(ctx, inputs, output) -> None:
    q, kv, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    _, attention, statistics = output
    ctx.save_for_backward(q, kv, statistics, cu_seqlens)
    ctx.mark_non_differentiable(attention, statistics)
    ctx.set_materialize_grads(False)  # Otherwise zeros would be written for each of them.


def _derivative(ctx, grad_out, *_):
    q, kv, _, cu_seqlens = ctx.saved_tensors

    def definition(q, kv):
        return class_attention_reference(q, kv, cu_seqlens, ctx.max_seqlen, ctx.scale)[0]

    return *gradients(definition, (q, kv), grad_out), None, None, None


@any_order(_derivative)
def _backward(ctx, grad_out, *_):
    grads = _class_attention_backward(grad_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale)
    return *grads, None, None, None


_class_attention = operation(
    class_attention_op, launch_class_attention, setup_context=_save_for_backward, backward=_backward
)
