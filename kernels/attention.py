"""Attention over packed sequences, with the class token's attention row as a by-product."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .backend import cdiv, contiguous_like, jit, launch, resolve_backend, tl
from .cpu import call_cpp, suits_cpp
from .dispatch import choose_attention, padded_head_dim
from .gradients import any_order, gradients, transformed
from .operators import apply_of, differentiable, operation, surely, traced, wants_gradient
from .rows import gather_rows, padding
from .tiles import dot, load_row, load_rows, locate, scores_of_row, scores_of_tile, store_rows

MAX_HEAD_DIM = 128
MAX_SEQLEN = 4096
LOG2_E = math.log2(math.e)
# C++ leaves longer sequences to torch.
MAX_CPP_LENGTH, MAX_CPP_LENGTH_BFLOAT16, MAX_CPP_LENGTH_WITH_AMX = 2048, 160, 64
HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
KEPT_ROW_BYTES = 512  # On a CPU, softmax rows of up to this many bytes are kept for the backward pass.


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_class_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T) v (Vaswani et al. 2017, equation 1) within each of B sequences laid end to end.

    Args:
        qkv: (T, 3, H, D), the output of the qkv projection, viewed. Its dtype is float32, bfloat16 or float16, and in
            plain torch it may be float64. D is a multiple of 8 up to 128. The gradient has the same layout.
        cu_seqlens: (B + 1,) int32, cumulative lengths. Sequence b is `qkv[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: the length of the longest sequence, up to 4096.
        scale: the factor of the scores; D ** -0.5 by default.
        return_class_attention: also return how much the first token of each sequence attends to every token.
        backend: "auto", "triton" or "torch".

    Returns:
        out (T, H, D), contiguous, of the dtype of qkv. With `return_class_attention` also class_attention (H, T)
        float32: each head's softmax row of the first token, which sums to 1 in each sequence and carries no gradient.

    Raises:
        ValueError: a shape, dtype, device or size is not as described above.
    """
    _check_attention(qkv, cu_seqlens, max_seqlen)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    if qkv.dtype == torch.float64 and backend == "auto":
        backend = "torch"
    plain = resolve_backend(backend, qkv.device) == "torch"
    if qkv.dtype == torch.float64 and not plain:
        raise ValueError('qkv has dtype torch.float64, which backend "triton" does not compute')
    if transformed():
        out = attention_reference(qkv, cu_seqlens, max_seqlen, scale, softmax_formula)
    elif not plain:
        # A traced graph serves many lengths, for some of which the backward pass may read the statistics.
        kept = traced(qkv) or (wants_gradient(qkv) and needs_statistics(qkv, max_seqlen))
        out, class_attention, _ = _attention(qkv, cu_seqlens, max_seqlen, scale, return_class_attention, kept)
        return (out, class_attention) if return_class_attention else out
    elif backend == "auto" and attention_suits_cpp(qkv, cu_seqlens.shape[0] - 1, max_seqlen):
        out, class_attention, _ = _attention_in_cpp(qkv, cu_seqlens, max_seqlen, scale, return_class_attention)
        return (out, class_attention) if return_class_attention else out
    elif _suits_kept_softmax(qkv, cu_seqlens.shape[0] - 1, max_seqlen):
        out = _kept_softmax(qkv, cu_seqlens.shape[0] - 1, scale)
    else:
        out = attention_reference(qkv, cu_seqlens, max_seqlen, scale)
    if return_class_attention:
        return out, class_attention_reference(qkv.detach(), cu_seqlens, max_seqlen, scale)
    return out


def believed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Compute `attention` in Triton of arguments that have been checked, where nothing traces it, as (T, H * D)."""
    if wants_gradient(qkv):
        return _recorded_attention(qkv, cu_seqlens, max_seqlen, scale)
    return _attention_without_class(qkv, None, cu_seqlens, max_seqlen, scale)


def _attention_without_class(qkv: Tensor, statistics: Tensor | None, cu_seqlens, max_seqlen, scale) -> Tensor:
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads * head_dim)
    kept = False, statistics is not None
    _launch_attention(out, None, statistics, qkv, cu_seqlens, max_seqlen, scale, *kept)
    return out


def _check_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, not (tokens, 3, heads, head_dim)")
    head_dim = qkv.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"qkv has dtype {qkv.dtype}, not float32, bfloat16, float16 or (plain torch) float64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (batch + 1,) torch.int32")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, qkv on {qkv.device}")
    if not 0 <= max_seqlen <= MAX_SEQLEN:
        raise ValueError(f"max_seqlen {max_seqlen} is outside 0..{MAX_SEQLEN}")
    if qkv.shape[0] > (cu_seqlens.shape[0] - 1) * max_seqlen:
        raise ValueError(
            f"{qkv.shape[0]} tokens are more than {cu_seqlens.shape[0] - 1} sequences of up to {max_seqlen} hold"
        )


def softmax_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T) v of (..., N, D) by ordinary operators, with scores and softmax in float32 at
    least. `mask` is False where a key is padding. If all keys of a sequence are, its output is finite but arbitrary."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask & mask.any(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute `softmax_formula` of (B, H, N, D) by torch's fused attention."""
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, scale=scale)
        if choice == SDPBackend.FLASH_ATTENTION.value:
            return _FusedOnCpu.apply(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


class _FusedOnCpu(torch.autograd.Function):
    """The operators that torch's scaled_dot_product_attention runs on a CPU. torch has no second-order gradients for
    them; here these are the formula's."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, mask, bias)
        ctx.scale = scale
        return out

    def _derivative(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, _, _, mask, _ = ctx.saved_tensors
        return *gradients(lambda q, k, v: softmax_formula(q, k, v, mask, ctx.scale), qkv, grad), None, None

    @staticmethod
    @any_order(_derivative)
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, _, bias = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *saved, 0.0, False, attn_mask=bias, scale=ctx.scale
        )
        return *grads, None, None


def attention_reference(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, attend: Callable = _fused
) -> Tensor:
    """Define `attention` in plain torch: (T, 3, H, D) -> (T, H, D). `attend` computes `softmax_formula`."""
    batch, tokens, mask = cu_seqlens.shape[0] - 1, qkv.shape[0], None
    if tokens == 0:
        return qkv[:, 0] * 1  # a new tensor, and a gradient of zeros
    ragged = tokens != batch * max_seqlen
    if ragged:
        slots, mask = padding(cu_seqlens, max_seqlen, tokens)
        mask = mask[:, None, None]  # (B, 1, 1, N), True where there is a key
        qkv = qkv.new_zeros(batch * max_seqlen, *qkv.shape[1:]).index_copy(0, slots, qkv)
    q, k, v = qkv.unflatten(0, (batch, max_seqlen)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    out = attend(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1)
    return gather_rows(out, slots) if ragged else out.contiguous()


def _suits_kept_softmax(qkv: Tensor, batch: int, max_seqlen: int) -> bool:
    """Return whether `_KeptSoftmax` saves enough time over torch's fused form to be worth the memory that it keeps."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and 0 < qkv.shape[0] == batch * max_seqlen
        and surely(max_seqlen * qkv.element_size() <= KEPT_ROW_BYTES)
    )


def _kept_softmax(qkv: Tensor, batch: int, scale: float) -> Tensor:
    """Compute attention of equally long, short sequences as batched products: (T, 3, H, D) -> (T, H, D).

    A CPU runs this faster than torch's fused form, in bfloat16 three times as fast. Scores and softmax are float32 in
    both."""
    tokens, _, heads, head_dim = qkv.shape
    length = tokens // batch
    packed = qkv.reshape(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    packed = packed.reshape(3, batch * heads, length, head_dim)
    out = _KeptSoftmax.apply(packed, scale)
    # This has to be contiguous before it is flattened: torch.compile (2.11) gives wrong gradients otherwise.
    return out.view(batch, heads, length, head_dim).transpose(1, 2).contiguous().view(tokens, heads, head_dim)


class _KeptSoftmax(torch.autograd.Function):
    """softmax(scale * q k^T) v of packed (q, k, v) (3, S, N, D), with the softmax kept for the backward pass."""

    @staticmethod
    def forward(ctx, packed: Tensor, scale: float) -> Tensor:
        q, k, v = packed  # (S, N, D) each
        scores = q.new_empty(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float32)
        scores = torch.baddbmm(scores, q.float(), k.float().mT, beta=0, alpha=scale)
        p = scores.softmax(-1).to(q.dtype)  # (S, N, N)
        ctx.save_for_backward(packed, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    def _derivative(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return *gradients(lambda x: softmax_formula(*x, None, ctx.scale), ctx.saved_tensors[:1], grad), None

    @staticmethod
    @any_order(_derivative)
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        packed, p = ctx.saved_tensors
        q, k, v = packed
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)  # sums in float32
        dq, dk, dv = torch.bmm(ds, k).mul_(ctx.scale), torch.bmm(ds.mT, q).mul_(ctx.scale), torch.bmm(p.mT, grad)
        return torch.stack((dq, dk, dv)), None


def attention_suits_cpp(qkv: Tensor, batch: int, max_seqlen: int) -> bool:
    """Return whether attention on a CPU is computed in C++, where that was measured to be faster.

    C++ multiplies in float32. In bfloat16, torch's products of some lengths are faster where the softmax is kept. On
    CPUs with AMX, which have not been measured, all but the shortest are expected to be.
    """
    if not suits_cpp(qkv) or max_seqlen > MAX_CPP_LENGTH:
        return False
    if qkv.dtype == torch.bfloat16 and (HAS_AMX or _suits_kept_softmax(qkv, batch, max_seqlen)):
        return max_seqlen <= (MAX_CPP_LENGTH_WITH_AMX if HAS_AMX else MAX_CPP_LENGTH_BFLOAT16)
    return True


def attention_in_cpp(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, with_class: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass in C++.

    Returns:
        out (T, H, D); the class attention, (H, T) float32 if `with_class` and (H, 0) otherwise; and the statistics of
        the softmax, (2, H, T) float32.
    """
    tokens, _, heads, head_dim = qkv.shape
    qkv, cu_seqlens = qkv.contiguous(), cu_seqlens.contiguous()
    out, statistics = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(2, heads, tokens, dtype=torch.float32)
    row = qkv.new_empty(heads, tokens if with_class else 0, dtype=torch.float32)
    call_cpp(
        "attention", out, row if with_class else None, statistics, qkv, cu_seqlens,
        cu_seqlens.shape[0] - 1, tokens, heads, head_dim, scale,
    )  # fmt: skip
    return out, row, statistics


def attention_backward_in_cpp(
    grad_out: Tensor, qkv: Tensor, statistics: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Compute the gradient (T, 3, H, D) of qkv in C++ from that of out and from what the forward pass returned."""
    tokens, _, heads, head_dim = qkv.shape
    qkv, grad = qkv.contiguous(), contiguous_like(qkv)
    call_cpp(
        "attention_backward", grad, grad_out.contiguous(), statistics, qkv, cu_seqlens.contiguous(),
        cu_seqlens.shape[0] - 1, tokens, heads, head_dim, scale,
    )  # fmt: skip
    return grad


def _save_for_backward_in_cpp(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, _ = inputs
    _, row, statistics = output
    ctx.save_for_backward(qkv, statistics, cu_seqlens)
    ctx.mark_non_differentiable(row, statistics)
    ctx.set_materialize_grads(False)


@torch.no_grad()
def class_attention_reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Define the class attention in plain torch: (T, 3, H, D) -> (H, T) float32."""
    batch, tokens = cu_seqlens.shape[0] - 1, qkv.shape[0]
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
def _softmax_statistics(highests, shares, row, inside):
    """Load the highest score and 1 / sum of the softmax rows `row` [BM]. Both are 0 where `inside` [BM] is False."""
    return tl.load(highests + row, mask=inside, other=0.0), tl.load(shares + row, mask=inside, other=0.0)


@jit
def _probabilities(q, k, n, length, highest, share, scale_log2):
    """Recompute the softmax [BM, BN] of queries [BM, BD] over the keys n [BN, BD] from the statistics [BM] of its rows.

    Past the last key, k and the score are 0, which can be so far above the highest score that p would be infinite.
    """
    scores = dot(q, tl.trans(k)) * scale_log2  # [BM, BN]
    return tl.where(n[None, :] < length, tl.exp2(scores - highest[:, None]) * share[:, None], 0.0)


@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["shares"])
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
    """out = softmax(scale q k^T) v (Vaswani et al. 2017, equation 1) of one head and a sequence of up to BN tokens.

    All keys are in one tile, so the softmax needs no running maximum. For a sequence of N tokens, a program reads q, k
    and v once and writes out once, 4 N D elements in all, and with CLASS it writes N floats. It computes 4 N^2 D
    operations.
    """
    start, length, head = locate(cu_seqlens, heads)
    n = tl.arange(0, BN)  # [BN]
    if length > 0:
        width = heads * D
        qkv += start * 3 * width + head * D
        q = load_rows(qkv, n, length, 3 * width, D, BD)  # [BN, BD]
        k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
        v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
        scores = scores_of_tile(q, k, n, length, scale_log2)  # [BN, BN]
        highest = tl.max(scores, 1)  # [BN]
        p = tl.exp2(scores - highest[:, None])  # [BN, BN]
        share = 1 / tl.sum(p, 1)  # [BN]
        row = head * tokens + start + n  # [BN], index into the (H, T) statistics and class attention
        if STATISTICS:
            tl.store(highests + row, highest, mask=n < length)
            tl.store(shares + row, share, mask=n < length)
        if CLASS:
            # The tile stores its first row under a mask. Summing the row out would cost a reduction over all warps.
            class_row = class_attention + row[None, :] + tl.zeros([BN, 1], tl.int32)  # [BN, BN]
            tl.store(class_row, p * share[:, None], mask=(n[:, None] == 0) & (n[None, :] < length))
        acc = dot(p.to(v.dtype), v) * share[:, None]  # [BN, BD]
        store_rows(out + start * width + head * D, acc, n, length, width, D, BD)


@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["shares"])
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
    """out = softmax(scale q k^T) v of BM queries, with keys and values in blocks of BN under a running maximum
    (FlashAttention-2: Dao 2023, algorithm 1).

    All programs together read q and write out once, 2 T H D elements, and read k and v once for each block of queries.
    They compute 4 N^2 D operations for each head and sequence of N tokens. The statistics of a softmax row are its
    highest score, times log2(e), and 1 / its sum. FlashAttention keeps their logsumexp in one float, which would cost
    the backward pass a rounding error that plain torch does not make.
    """
    start, length, head = locate(cu_seqlens, heads)
    first_m = tl.program_id(1) * BM
    m = first_m + tl.arange(0, BM)  # [BM]
    if first_m < length:
        width = heads * D
        qkv += start * 3 * width + head * D
        q = load_rows(qkv, m, length, 3 * width, D, BD)  # [BM, BD]
        highest = tl.full([BM], float("-inf"), tl.float32)  # [BM]
        total = tl.zeros([BM], tl.float32)  # [BM]
        acc = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
            v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
            scores = scores_of_tile(q, k, n, length, scale_log2)  # [BM, BN]
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - new_highest[:, None])  # [BM, BN]
            shrink = tl.exp2(highest - new_highest)  # [BM]
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + dot(p.to(v.dtype), v)
            highest = new_highest
        share = 1 / total  # [BM]
        store_rows(out + start * width + head * D, acc * share[:, None], m, length, width, D, BD)
        row = head * tokens + start  # index of the sequence's first token in the (H, T) statistics and class attention
        if STATISTICS:
            tl.store(highests + row + m, highest, mask=m < length)
            tl.store(shares + row + m, share, mask=m < length)
        if CLASS and first_m == 0:
            _store_class_row(class_attention + row, qkv, length, width, scale_log2, D, BD, BN)


@jit
def _store_class_row(row, qkv, length, width, scale_log2, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Store the softmax row of a sequence's first token, which is as long as the sequence.

    The scores are summed in another order here than in the products of tiles, so large scores differ. The row is
    therefore normalised by its own maximum and total. Its scores are kept in the output until both are known.
    """
    query = load_row(qkv, D, BD)  # [BD]
    highest, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for first_n in range(0, length, BN):
        n = first_n + tl.arange(0, BN)  # [BN]
        k = load_rows(qkv + width, n, length, 3 * width, D, BD).to(tl.float32)  # [BN, BD]
        scores = scores_of_row(query, k, n, length, scale_log2)  # [BN]
        tl.store(row + n, scores, mask=n < length)
        highest = tl.maximum(highest, tl.max(scores, 0))
    tl.debug_barrier()  # No thread may load a score before all are stored.
    for first_n in range(0, length, BN):
        n = first_n + tl.arange(0, BN)  # [BN]
        scores = tl.load(row + n, mask=n < length, other=float("-inf"))  # [BN]
        total += tl.sum(tl.exp2(scores - highest), 0)
    share = 1 / total
    for first_n in range(0, length, BN):
        n = first_n + tl.arange(0, BN)  # [BN]
        scores = tl.load(row + n, mask=n < length, other=float("-inf"))  # [BN]
        tl.debug_barrier()  # No thread may overwrite a score before all have loaded theirs.
        tl.store(row + n, tl.exp2(scores - highest) * share, mask=n < length)


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
    """dv = p^T do, dq = ds k and dk = ds^T q of one head and a sequence of up to BN tokens, where
    p = softmax(scale q k^T), do = grad_out, dp = do v^T and ds = scale p (dp - rowsum(p dp))
    (FlashAttention: Dao et al. 2022, appendix B.2).

    Everything fits one tile, so p is recomputed, and the forward pass has to keep only its input. For a
    sequence of N tokens, a program reads q, k, v and grad_out once and writes dq, dk and dv once, 7 N D elements in
    all. It computes 10 N^2 D operations.
    """
    start, length, head = locate(cu_seqlens, heads)
    n = tl.arange(0, BN)  # [BN]
    if length > 0:
        width = heads * D
        qkv += start * 3 * width + head * D
        q = load_rows(qkv, n, length, 3 * width, D, BD)  # [BN, BD]
        k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
        v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
        do = load_rows(grad_out + start * width + head * D, n, length, width, D, BD)  # [BN, BD]
        scores = scores_of_tile(q, k, n, length, scale_log2)  # [BN, BN]
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])  # [BN, BN]
        p *= (1 / tl.sum(p, 1))[:, None]
        grad += start * 3 * width + head * D
        dv = dot(tl.trans(p.to(do.dtype)), do)  # [BN, BD]
        store_rows(grad + 2 * width, dv, n, length, 3 * width, D, BD)
        dp = dot(do, tl.trans(v))  # [BN, BN]
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)  # [BN, BN]
        store_rows(grad, dot(ds, k), n, length, 3 * width, D, BD)
        store_rows(grad + width, dot(tl.trans(ds), q), n, length, 3 * width, D, BD)


@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["shares"])
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
    """The gradients of `_tile_backward_kernel` for a sequence of up to BM tokens, computed with rowsum(out do), which
    equals rowsum(p dp) (FlashAttention: Dao et al. 2022, algorithm 4, with all queries at once).

    The queries stay in registers while the loop runs over blocks of BN keys. Each step completes dk and dv of a block,
    and the loop completes dq, so neither atomics nor a second kernel are needed. For a sequence of N tokens, a
    program reads q, k, v, out and grad_out once and writes dq, dk and dv once, 8 N D elements in all. It computes
    10 N^2 D operations.
    """
    start, length, head = locate(cu_seqlens, heads)
    m = tl.arange(0, BM)  # [BM], all queries
    if length > 0:
        width = heads * D
        qkv += start * 3 * width + head * D
        grad += start * 3 * width + head * D
        q = load_rows(qkv, m, length, 3 * width, D, BD)  # [BM, BD]
        do = load_rows(grad_out + start * width + head * D, m, length, width, D, BD)  # [BM, BD]
        o = load_rows(out + start * width + head * D, m, length, width, D, BD)  # [BM, BD]
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        row = head * tokens + start + m  # [BM], index into the (H, T) statistics
        highest, share = _softmax_statistics(highests, shares, row, m < length)  # [BM] each
        dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
            v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
            p = _probabilities(q, k, n, length, highest, share, scale_log2)  # [BM, BN]
            dp = dot(do, tl.trans(v))  # [BM, BN]
            ds = (p * (dp - delta[:, None]) * scale).to(q.dtype)  # [BM, BN]
            dq += dot(ds, k)
            # Tensor cores of sm_90 need 64 rows or more. If a block has fewer keys, the channels become the rows.
            if CHANNELS_FIRST:
                dv = tl.trans(dot(tl.trans(do), p.to(do.dtype)))  # [BN, BD]
                dk = tl.trans(dot(tl.trans(q), ds))  # [BN, BD]
            else:
                dv = dot(tl.trans(p.to(do.dtype)), do)  # [BN, BD]
                dk = dot(tl.trans(ds), q)  # [BN, BD]
            store_rows(grad + 2 * width, dv, n, length, 3 * width, D, BD)
            store_rows(grad + width, dk, n, length, 3 * width, D, BD)
        store_rows(grad, dq, m, length, 3 * width, D, BD)


@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["shares"])
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
    """dq = scale (p (do v^T - delta)) k of BM queries, where p = softmax(scale q k^T), do = grad_out and
    delta = rowsum(out do), with keys and values in blocks of BN (FlashAttention-2: Dao 2023, algorithm 2, but dq in a
    kernel of its own, which needs no atomics).

    All programs together read q, out and grad_out and write dq once, 4 T H D elements, read k and v once for each block
    of queries, and leave delta (H, T) for `_blocks_dkv_kernel`. They compute 6 N^2 D operations for each head and
    sequence of N tokens.
    """
    start, length, head = locate(cu_seqlens, heads)
    first_m = tl.program_id(1) * BM
    m = first_m + tl.arange(0, BM)  # [BM]
    if first_m < length:
        width = heads * D
        qkv += start * 3 * width + head * D
        q = load_rows(qkv, m, length, 3 * width, D, BD)  # [BM, BD]
        do = load_rows(grad_out + start * width + head * D, m, length, width, D, BD)  # [BM, BD]
        o = load_rows(out + start * width + head * D, m, length, width, D, BD)  # [BM, BD]
        row = head * tokens + start + m  # [BM], index into the (H, T) statistics and delta
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        tl.store(delta + row, row_delta, mask=m < length)
        highest, share = _softmax_statistics(highests, shares, row, m < length)  # [BM] each
        dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
        for first_n in range(0, length, BN):
            n = first_n + tl.arange(0, BN)  # [BN]
            k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
            v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
            p = _probabilities(q, k, n, length, highest, share, scale_log2)  # [BM, BN]
            ds = p * (dot(do, tl.trans(v)) - row_delta[:, None])  # [BM, BN]
            dq += dot(ds.to(k.dtype), k)
        store_rows(grad + start * 3 * width + head * D, dq * scale, m, length, 3 * width, D, BD)


@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["shares"])
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
    """dv = p^T do and dk = scale (p (do v^T - delta))^T q of BN keys, where p = softmax(scale q k^T), do = grad_out and
    delta = rowsum(out do), with queries in blocks of BM (FlashAttention-2: Dao 2023, algorithm 2). A row of the score
    tiles is a key here.

    All programs together read k and v and write dk and dv once, 4 T H D elements, and read q and grad_out once for each
    block of keys. They compute 8 N^2 D operations for each head and sequence of N tokens.
    """
    start, length, head = locate(cu_seqlens, heads)
    first_n = tl.program_id(1) * BN
    n = first_n + tl.arange(0, BN)  # [BN]
    if first_n < length:
        width = heads * D
        qkv += start * 3 * width + head * D
        grad += start * 3 * width + head * D
        grad_out += start * width + head * D
        row = head * tokens + start  # index of the sequence's first token in the (H, T) statistics and delta
        k = load_rows(qkv + width, n, length, 3 * width, D, BD)  # [BN, BD]
        v = load_rows(qkv + 2 * width, n, length, 3 * width, D, BD)  # [BN, BD]
        dk = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        dv = tl.zeros([BN, BD], tl.float32)  # [BN, BD]
        for first_m in range(0, length, BM):
            m = first_m + tl.arange(0, BM)  # [BM]
            q = load_rows(qkv, m, length, 3 * width, D, BD)  # [BM, BD]
            do = load_rows(grad_out, m, length, width, D, BD)  # [BM, BD]
            # Past the end a share is 0, and so is p.
            highest, share = _softmax_statistics(highests + row, shares + row, m, m < length)  # [BM] each
            row_delta = tl.load(delta + row + m, mask=m < length, other=0.0)  # [BM]
            scores = dot(k, tl.trans(q)) * scale_log2  # [BN, BM]
            p = tl.exp2(scores - highest[None, :]) * share[None, :]  # [BN, BM]
            dv += dot(p.to(do.dtype), do)
            ds = p * (dot(v, tl.trans(do)) - row_delta[None, :])  # [BN, BM]
            dk += dot(ds.to(q.dtype), q)
        store_rows(grad + width, dk * scale, n, length, 3 * width, D, BD)
        store_rows(grad + 2 * width, dv, n, length, 3 * width, D, BD)


def launch_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, with_class: bool, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass in Triton.

    Returns:
        out (T, H, D); the class attention, (H, T) float32 if `with_class` and (H, 0) otherwise; and the statistics of
        the softmax, (2, H, T) float32 if `with_statistics` and (2, H, 0) otherwise. See `needs_statistics`.
    """
    out, row, statistics = _fake_attention(qkv, cu_seqlens, max_seqlen, scale, with_class, with_statistics)
    _launch_attention(out, row, statistics, qkv, cu_seqlens, max_seqlen, scale, with_class, with_statistics)
    return out, row, statistics


def _launch_attention(
    out, row: Tensor | None, statistics: Tensor | None, qkv, cu_seqlens, max_seqlen, scale, with_class, with_statistics
) -> None:
    """Write the outputs. The row and the statistics may be None where they are not wanted."""
    tokens, _, heads, head_dim = qkv.shape
    if tokens:
        form, tiles = choose_attention("attention_forward", qkv, max_seqlen)
        programs = (cu_seqlens.shape[0] - 1) * heads
        if form == "tile":
            kernel, grid = _tile_forward_kernel, (programs,)
        else:
            kernel, grid = _blocks_forward_kernel, (programs, cdiv(max_seqlen, tiles["BM"]))
        highests, shares = statistics.unbind() if with_statistics else (statistics, statistics)
        launch(
            kernel, grid, out=out, class_attention=row, highests=highests, shares=shares,
            qkv=qkv.contiguous(), cu_seqlens=cu_seqlens, scale_log2=scale * LOG2_E, tokens=tokens, heads=heads,
            D=head_dim, BD=padded_head_dim(head_dim), CLASS=with_class, STATISTICS=with_statistics, **tiles,
        )  # fmt: skip


attention_op = torch.library.custom_op("smi_fast::attention", launch_attention, mutates_args=())


@attention_op.register_fake
def _fake_attention(qkv, cu_seqlens, max_seqlen, scale, with_class, with_statistics):
    tokens, _, heads, head_dim = qkv.shape
    kept = tokens if with_statistics else 0
    row = qkv.new_empty(heads, tokens if with_class else 0, dtype=torch.float32)
    return qkv.new_empty(tokens, heads, head_dim), row, qkv.new_empty(2, heads, kept, dtype=torch.float32)


def needs_statistics(qkv: Tensor, max_seqlen: int) -> bool:
    """Return whether the backward pass reads `out` and the softmax's statistics. It does not if one tile is enough."""
    form, _ = choose_attention("attention_backward", qkv, max_seqlen)
    return form != "tile"


def launch_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    statistics: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Compute the gradient (T, 3, H, D) of qkv in Triton, writing each element once.

    Args:
        grad_out: (T, H, D), the gradient of out.
        out, statistics: what `launch_attention` returned, or None if the backward pass does not need them.
    """
    tokens, _, heads, head_dim = qkv.shape
    grad = _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale)
    if not tokens:
        return grad
    form, tiles = choose_attention("attention_backward", qkv, max_seqlen)
    programs = (cu_seqlens.shape[0] - 1) * heads
    shared = dict(
        grad=grad, grad_out=grad_out.contiguous(), qkv=qkv.contiguous(), cu_seqlens=cu_seqlens,
        scale=scale, scale_log2=scale * LOG2_E, heads=heads, D=head_dim, BD=padded_head_dim(head_dim),
    )  # fmt: skip
    if form == "tile":
        launch(_tile_backward_kernel, (programs,), **shared, **tiles)
        return grad
    shared |= dict(highests=statistics[0], shares=statistics[1], tokens=tokens)
    if form == "rows":
        launch(_rows_backward_kernel, (programs,), out=out, **shared, **tiles)
        return grad
    dq, dkv, delta = tiles["dq"], tiles["dkv"], torch.empty_like(statistics[0])
    launch(_blocks_dq_kernel, (programs, cdiv(max_seqlen, dq["BM"])), delta=delta, out=out, **shared, **dq)
    launch(_blocks_dkv_kernel, (programs, cdiv(max_seqlen, dkv["BN"])), delta=delta, **shared, **dkv)
    return grad


attention_backward_op = torch.library.custom_op(
    "smi_fast::attention_backward", launch_attention_backward, mutates_args=()
)
_attention_backward = operation(attention_backward_op, launch_attention_backward)


@attention_backward_op.register_fake
def _fake_attention_backward(grad_out, qkv, out, statistics, cu_seqlens, max_seqlen, scale):
    return contiguous_like(qkv)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, _, with_statistics = inputs
    out, row, statistics = output
    kept = (out, statistics) if with_statistics else (None, None)
    ctx.save_for_backward(qkv, *kept, cu_seqlens)
    ctx.mark_non_differentiable(row, statistics)
    ctx.set_materialize_grads(False)  # Otherwise zeros would be written for each of them.


def _derivative(ctx, grad_out, *_):
    qkv, *_, cu_seqlens = ctx.saved_tensors

    def definition(qkv):
        return attention_reference(qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, softmax_formula)

    return *gradients(definition, (qkv,), grad_out), None, None, None, None, None


@any_order(_derivative)
def _backward(ctx, grad_out, *_):
    grad = _attention_backward(grad_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale)
    return grad, None, None, None, None, None


@any_order(_derivative)
def _backward_in_cpp(ctx, grad_out, *_):
    if not suits_cpp(grad_out):
        return _derivative(ctx, grad_out)
    return attention_backward_in_cpp(grad_out, *ctx.saved_tensors, ctx.scale), None, None, None, None


_attention_in_cpp = differentiable(attention_in_cpp, _save_for_backward_in_cpp, _backward_in_cpp)
_attention = operation(attention_op, launch_attention, setup_context=_save_for_backward, backward=_backward)


class _RecordedAttention(torch.autograd.Function):
    """The same rule for `believed_attention`, which has one result."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
        (tokens, _, heads, _), kept = qkv.shape, needs_statistics(qkv, max_seqlen)
        statistics = qkv.new_empty(2, heads, tokens, dtype=torch.float32) if kept else None
        out = _attention_without_class(qkv, statistics, cu_seqlens, max_seqlen, scale)
        ctx.save_for_backward(qkv, out if kept else None, statistics, cu_seqlens)
        ctx.max_seqlen, ctx.scale, ctx.shape = max_seqlen, scale, (tokens, heads, qkv.shape[3])
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_out.reshape(ctx.shape))[:4]


_recorded_attention = apply_of(_RecordedAttention)
