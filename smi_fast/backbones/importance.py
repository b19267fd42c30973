"""The importance of patches: the attention that they receive in the block that measures it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.packed import PackedTokens


def received_attention(tokens: PackedTokens, q: Tensor, k: Tensor, scale: float, has_class_token: bool) -> Tensor:
    """Return the attention that each token receives, averaged over heads: queries and keys (T, H, D) -> (T,), in
    float32 or their own higher precision.

    It is the attention from the class token, or the mean attention from all tokens if there is no class token.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    q, mask = tokens.pad(q.to(exact))  # [B, N, H, D], [B, N]
    k, _ = tokens.pad(k.to(exact))
    asking = 1 if has_class_token else tokens.max_seqlen
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :asking], k) * scale
        attention = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        weights = mask[:, :asking].to(exact)
        weights = weights / weights.sum(1, keepdim=True)
        received = torch.einsum("bhqk,bq->bk", attention, weights) / q.shape[2]  # [B, N]
    return tokens.unpad(received)


def softmax_scale(attn: nn.Module) -> float:
    """Return the factor by which timm multiplies scores. Its fused attention ignores `attn.scale` and uses torch's
    default."""
    return attn.head_dim**-0.5 if attn.fused_attn else attn.scale


def pools_by_attention(model: VisionTransformer) -> bool:
    """Return whether importance is the attention of the pooling query, because the model pools by attention and has no
    class token."""
    return model.global_pool == "map" and not model.has_class_token


@torch.no_grad()
def pooling_attention(model: VisionTransformer, x: Tensor, tokens: PackedTokens) -> Tensor:
    """Return the pooling query's attention to each token x, (B, N, C) or (T, C), averaged over heads: (T,) float32."""
    pool: AttentionPoolLatent = model.attn_pool
    padded, mask = tokens.pad(x.flatten(0, -2))  # [B, N, C], [B, N]
    if not model.pool_include_prefix:
        mask = mask & (torch.arange(tokens.max_seqlen, device=x.device) >= model.num_prefix_tokens)
    q = pool.q_norm(pool.q(pool.latent).view(-1, pool.num_heads, pool.head_dim))  # [L, H, D]
    k = F.linear(padded, *(None if p is None else p.chunk(2)[0] for p in (pool.kv.weight, pool.kv.bias)))
    k = pool.k_norm(k.unflatten(-1, (pool.num_heads, pool.head_dim)))  # [B, N, H, D]
    scores = torch.einsum("lhd,bnhd->bhln", q.float(), k.float()) * softmax_scale(pool)
    attention = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    return tokens.unpad(attention.mean((1, 2)))
