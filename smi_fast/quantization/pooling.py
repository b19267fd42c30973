"""From the tokens of an image to the one vector that its logits are computed from.

Each class takes tokens as `blocks.py` describes them, and returns (B, C).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from smi_fast.packed import PackedTokens
from smi_fast.quantization.blocks import Mlp, attend, padded
from smi_fast.quantization.layers import IntegerLinear, Norm, add
from smi_fast.quantization.observers import Quantizer, Scaled


class JoinedTokens(nn.Module):
    """The first tokens of each sequence, (B, count, C), as they are: (B, count * C)."""

    def forward(self, x: Scaled, ragged: PackedTokens | None) -> Scaled:
        return replace(x, values=x.values.flatten(1))


class AllTokens(nn.Module):
    """No pooling: all tokens, (B, N, C), whose logits are (B, N, classes)."""

    def forward(self, x: Scaled, ragged: PackedTokens | None) -> Scaled:
        if ragged is not None:
            raise ValueError("global_pool '' needs images that all keep the same number of patches")
        return x


class Pool(nn.Module):
    """The mean or the maximum of the tokens.

    Args:
        kind: "avg", "max", "avgmax" (the mean of the two), or "class+avg" (the class token beside the mean).
        skipped: how many of each sequence's first tokens do not count.
        bits: the width of activations.
    """

    settings = ("kind", "skipped")

    def __init__(self, kind: str, skipped: int, bits: int):
        super().__init__()
        self.kind, self.skipped, self.pooled = kind, skipped, Quantizer(bits)

    def forward(self, x: Scaled, ragged: PackedTokens | None) -> Scaled:
        values, mask = padded(x.values, ragged)
        patches = values[:, self.skipped :]
        if mask is None:
            mean, largest = patches.mean(1), patches.amax(1)
        else:  # padding is zero
            mask = mask[:, self.skipped :]
            mean = patches.sum(1) / mask.sum(1, keepdim=True)
            largest = patches.masked_fill(~mask[..., None], -torch.inf).amax(1)
        kinds = {
            "avg": mean,
            "max": largest,
            "avgmax": 0.5 * (largest + mean),
            "class+avg": torch.cat((values[:, 0], mean), 1),
        }
        return self.pooled(Scaled(kinds[self.kind], x.scale))


class AttentionPool(nn.Module):
    """Attention pooling: learned queries attend to the tokens, and an MLP follows.

    Args:
        query: (L, C), the queries after their projection and norm.
        kv: the layer that computes keys and values.
        k_norm: a norm of each head's keys.
        proj: the layer behind the attention.
        mlp: what is added to its output.
        kind: "token" returns the output of the first query, "avg" the mean of all.
        skipped: how many of each sequence's first tokens are not attended to.
        heads, scale, bits: as in `Attention`.
    """

    settings = ("kind", "skipped", "heads", "scale")

    def __init__(
        self,
        query: Tensor,
        kv: IntegerLinear,
        k_norm: Norm | nn.Identity,
        proj: IntegerLinear,
        mlp: Mlp,
        kind: str,
        skipped: int,
        heads: int,
        scale: float,
        bits: int,
    ):
        super().__init__()
        self.kind, self.skipped, self.heads, self.scale = kind, skipped, heads, scale
        self.register_buffer("query", query.detach().clone())
        self.query_out, self.kv, self.kv_out, self.k_norm = Quantizer(bits), kv, Quantizer(bits), k_norm
        self.scores, self.attention = Quantizer(bits), Quantizer(bits)
        self.proj, self.proj_out, self.mlp = proj, Quantizer(bits), mlp
        self.pooled = Quantizer(bits) if kind == "avg" else nn.Identity()

    def forward(self, x: Scaled, ragged: PackedTokens | None) -> Scaled:
        values, mask = padded(x.values, ragged)
        values, mask = values[:, self.skipped :].contiguous(), None if mask is None else mask[:, self.skipped :]
        k, v = self._heads(self.kv_out(self.kv(replace(x, values=values))).values, 2)
        unit, kv_unit = self.query_out.unit, self.kv_out.unit
        (q,) = self._heads(self.query_out(Scaled(self.query_out.divide(self.query), unit)).values[None], 1)
        weights = attend(Scaled(q, unit), self.k_norm(Scaled(k, kv_unit)), self.scale, mask, self.scores)
        y = self.attention(Scaled((weights @ v).transpose(1, 2).flatten(2), kv_unit))
        y = self.proj_out(self.proj(y))
        y = add(y, self.mlp(y), self.mlp.sum)  # [B, L, C]
        if self.kind == "token":
            return replace(y, values=y.values[:, 0])
        return self.pooled(replace(y, values=y.values.mean(1)))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Return the heads of x (B, N, parts * C) as (parts, B, H, N, D)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
