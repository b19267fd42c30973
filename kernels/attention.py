"""Attention over packed sequences, with the class token's attention row as a by-product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve_backend
from .rows import gather_rows, sequence_of_tokens

MAX_HEAD_DIM = 128
MAX_SEQLEN = 4096


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
    out = attention_reference(qkv, cu_seqlens, max_seqlen, scale)
    if not return_class_attention:
        return out
    return out, class_attention_reference(qkv, cu_seqlens, max_seqlen, scale)


def _check_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, not (tokens, 3, heads, head_dim)")
    head_dim = qkv.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"qkv has dtype {qkv.dtype}; float32, bfloat16, float16 and (plain torch) float64 are possible")
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
        slots, mask = _padding(cu_seqlens, max_seqlen, tokens)
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
        slots, mask = _padding(cu_seqlens, max_seqlen, tokens)
        k = k.new_zeros(batch * max_seqlen, *k.shape[1:]).index_copy(0, slots, k)
    q = q[cu_seqlens[:-1].clamp(max=tokens - 1)]
    scores = torch.einsum("bhd,bnhd->bhn", q * scale, k.unflatten(0, (batch, max_seqlen)))
    if ragged:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    row = scores.softmax(-1).mean(1).flatten().float()
    return row[slots] if ragged else row


def _padding(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Where each of the T tokens lies in a padded batch (B * N, ...), and which of its places (B, N) are taken."""
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    slots = torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence] + sequence * max_seqlen
    taken = torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
    return slots, taken
