"""The importance of patches: the attention that they receive in the block that measures it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.kernels.rows import gather_rows
from smi_fast.packed import PackedTokens


class Attend:
    """Attention within each sequence of a batch, which also records the attention in the block that measures it.

    Args:
        tokens: where the tokens of each sequence lie; their values are not read.
        has_class_token: whether the first token of a sequence is a class token.
        backend: the backend of the kernels.

    Attributes:
        measures: whether the block that runs now records its attention.
        measured: (heads or 1, T) float32, one tensor for each attention of the block that measures.
    """

    def __init__(self, tokens: PackedTokens, has_class_token: bool, backend: str):
        self.tokens = tokens
        self.has_class_token, self.backend = has_class_token, backend
        self.measures = False
        self.measured: list[Tensor] = []

    def rows(self) -> Tensor:
        """Return the measured attention, (heads, T) float32. Its mean over the heads is the importance."""
        return self.measured[0] if len(self.measured) == 1 else torch.cat(self.measured)

    def __call__(self, qkv: Tensor, scale: float) -> Tensor:
        """Compute attention of queries, keys and values (T, 3, H, D) -> (T, H, D), and record it if asked to."""
        if self.measures and self.has_class_token:
            out, rows = self.attention(qkv, scale, return_class_attention=True)
            self.measured.append(rows)
            return out
        if self.measures:
            self.measured.append(self.received(qkv[:, 0], qkv[:, 1], scale)[None])
        return self.attention(qkv, scale)

    def attention(self, qkv: Tensor, scale: float, **options) -> Tensor | tuple[Tensor, Tensor]:
        return kernels.attention(
            qkv, self.tokens.cu_seqlens, self.tokens.max_seqlen, scale=scale, backend=self.backend, **options
        )

    def first(self, x: Tensor, count: int) -> Tensor:
        """Return the first `count` tokens of each sequence, (B, count, C). The tokens x are (B, N, C), or packed (T, C)
        if the count is 1."""
        return x[:, :count] if x.ndim == 3 else gather_rows(x, self.tokens.cu_seqlens[:-1].long())[:, None]

    def of_first(self, q: Tensor, kv: Tensor, scale: float) -> Tensor:
        """Compute the attention of each sequence's first tokens to all its tokens: queries (B, count, H, D), keys and
        values (T, 2, H, D) -> (B, count, H, D)."""
        count = q.shape[1]
        if count == 1:
            out, rows = kernels.class_attention(
                q[:, 0],
                kv,
                self.tokens.cu_seqlens,
                self.tokens.max_seqlen,
                scale=scale,
                return_attention=True,
                backend=self.backend,
            )
            out = out[:, None]
        else:  # all sequences are equally long
            k, v = kv.unflatten(0, (len(q), -1)).unbind(2)  # [B, N, H, D] each
            exact = torch.promote_types(k.dtype, torch.float32)
            scores = torch.einsum("bqhd,bnhd->hbqn", q.to(exact), k.to(exact)) * scale
            attention = scores.softmax(-1)  # [H, B, count, N]
            out = torch.einsum("hbqn,bnhd->bqhd", attention.to(v.dtype), v)
            rows = attention[:, :, 0].detach().flatten(1).float()  # [H, T]
        if self.measures:
            self.measured.append(rows)
        return out

    @torch.no_grad()
    def received(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Return the attention that each token receives, averaged over heads: queries and keys (T, H, D) -> (T,)
        float32.

        It is the attention from the class token, or the mean attention from all tokens if there is no class token.
        """
        q, mask = self.tokens.pad(q.float())  # [B, N, H, D], [B, N]
        k, _ = self.tokens.pad(k.float())
        asking = 1 if self.has_class_token else self.tokens.max_seqlen
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :asking], k) * scale
        attention = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        weights = mask[:, :asking].float()
        weights = weights / weights.sum(1, keepdim=True)
        received = torch.einsum("bhqk,bq->bk", attention, weights) / q.shape[2]  # [B, N]
        return self.tokens.unpad(received)


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
