"""Attention on packed tokens, and what a batch takes along on its way through the blocks."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.backbones.dropping import drop_patches
from smi_fast.backbones.features import feature_name
from smi_fast.backbones.importance import received_attention
from smi_fast.backbones.merging import merge_patches, size_channels
from smi_fast.backbones.pruning import Drop, Merge
from smi_fast.kernels.rows import gather_rows
from smi_fast.packed import PackedTokens


def normalise_qk(attn: nn.Module, qkv: Tensor) -> Tensor:
    """Normalise the queries and keys of (T, 3, H, D) where the model does so."""
    parts = attn._modules
    if isinstance(parts["q_norm"], nn.Identity) and isinstance(parts["k_norm"], nn.Identity):
        return qkv
    q, k, v = qkv.unbind(1)
    return torch.stack((attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v), dim=1)


class Attend:
    """A batch on its way through the blocks: attention within each sequence, what is measured and recorded of it, and
    which tokens are left.

    Args:
        tokens: where the tokens of each sequence lie; their values are not read.
        has_class_token: whether the first token of a sequence is a class token.
        num_prefix_tokens: how many tokens at the start of each sequence are not patches.
        backend: the backend of the kernels.

    Attributes:
        tokens: where the tokens that are left lie, without values.
        sizes: (T,) float32, how many patches were merged into each token, or None if none were.
        found: maps the full name of each recorded feature to its tokens, one for each time that it was recorded.
        believed: the stream that the last straight line of `plain.py` has left, or None.
        operations: those of the straight line, or None if it does not serve the tokens.

    `enter` sets the following ones for each block:
        number: the number of the block.
        prune: what is still to be dropped or merged in this block, or None.
        wanted: the parts of the block whose tokens are recorded.
        measures: whether the block records its attention.
        measured: (heads or 1, T) float32, one tensor for each attention of the block, if it measures.
    """

    def __init__(self, tokens: PackedTokens, has_class_token: bool, num_prefix_tokens: int, backend: str):
        self.tokens, self.sizes = replace(tokens, values=None), None
        self.has_class_token, self.num_prefix_tokens, self.backend = has_class_token, num_prefix_tokens, backend
        self.found: dict[str, list[PackedTokens]] = {}
        self.believed = self.operations = None

    def enter(
        self, number: int, wanted: Collection[str] = (), *, prune: Drop | Merge | None = None, measures: bool = False
    ) -> None:
        """Begin block `number`."""
        self.number, self.wanted, self.prune = number, wanted, prune
        self.measures = measures or isinstance(prune, Drop)
        self.measured: list[Tensor] = []
        self._basis: Tensor | None = None  # the keys that decide a merging, or the weights of a fused token

    def as_entered(self) -> Attend:
        """Return the state in which the block was entered, from which it can run again."""
        again = copy.copy(self)
        again.found, again.measured = {}, []
        return again

    def record(self, part: str, x: Tensor) -> Tensor:
        """Keep x as a feature if it was asked for, and return it. x is (T, H, D) for "heads" and "keys", otherwise
        (B, N, C) or (T, C)."""
        if part in self.wanted:
            values = x if part in ("heads", "keys") else x.flatten(0, -2)
            self.found.setdefault(feature_name(self.number, part), []).append(replace(self.tokens, values=values))
        return x

    def rows(self) -> Tensor:
        """Return the measured attention, (heads, T) float32. Its mean over the heads is the importance."""
        return self.measured[0] if len(self.measured) == 1 else torch.cat(self.measured)

    def drop_or_merge(self, x: Tensor) -> Tensor:
        """Drop or merge patches of x, (B, N, C) or (T, C), unless this block has done so or has nothing to prune."""
        prune, self.prune = self.prune, None
        if prune is None:
            return x
        tokens = replace(self.tokens, values=x.flatten(0, -2))
        where = {"number": self.number + 1, "num_prefix_tokens": self.num_prefix_tokens}
        if isinstance(prune, Merge):
            tokens, self.sizes = merge_patches(tokens, self._basis, self.sizes, prune, **where)
        else:
            options = {"sizes": self.sizes, "weights": self._basis, "backend": self.backend}
            tokens, self.sizes = drop_patches(tokens, self.rows(), prune, **where, **options)
        self.tokens, self._basis = replace(tokens, values=None), None
        return tokens.batch_or_values()

    def __call__(self, qkv: Tensor, scale: float) -> Tensor:
        """Compute attention of queries, keys and values (T, 3, H, D) -> (T, H, D), and record what was asked for."""
        if "keys" in self.wanted:
            self.record("keys", qkv[:, 1])
        if isinstance(self.prune, Merge):
            self._basis = qkv[:, 1]
        head_dim = qkv.shape[-1]
        if self.sizes is not None:
            channels = size_channels(self.sizes, scale, qkv.dtype).expand(-1, -1, qkv.shape[2], -1)
            qkv = torch.cat((qkv, channels), dim=-1)
        if isinstance(self.prune, Drop) and self.prune.fuse:
            self._basis = received_attention(self.tokens, qkv[:, 0], qkv[:, 1], scale, self.has_class_token)
        if self.measures and self.has_class_token:
            out, rows = self.attention(qkv, scale, return_class_attention=True)
            self.measured.append(rows)
        else:
            out = self.attention(qkv, scale)
            if self.measures:
                self.measured.append(self.received(qkv[:, 0], qkv[:, 1], scale)[None])
        return self.record("heads", out if self.sizes is None else out[..., :head_dim].contiguous())

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
        self.record("keys", kv[:, 0])
        count, head_dim = q.shape[1], q.shape[-1]
        if self.sizes is not None:
            ones, channels = size_channels(self.sizes, scale, kv.dtype).split((1, 2), dim=1)
            ones = ones[: q.shape[0]].expand(-1, count, q.shape[2], -1)  # they are the same for all queries
            q = torch.cat((q, ones), dim=-1)
            kv = torch.cat((kv, channels.expand(-1, -1, kv.shape[2], -1)), dim=-1)
        if count == 1:
            out, rows = kernels.class_attention(
                q.squeeze(1),
                kv,
                self.tokens.cu_seqlens,
                self.tokens.max_seqlen,
                scale=scale,
                return_attention=True,
                backend=self.backend,
            )
            out = out.unsqueeze(1)
        else:  # all sequences are equally long
            k, v = kv.unflatten(0, (q.shape[0], -1)).unbind(2)  # [B, N, H, D] each
            exact = torch.promote_types(k.dtype, torch.float32)
            scores = torch.einsum("bqhd,bnhd->hbqn", q.to(exact), k.to(exact)) * scale
            attention = scores.softmax(-1)  # [H, B, count, N]
            out = torch.einsum("hbqn,bnhd->bqhd", attention.to(v.dtype), v)
            rows = attention[:, :, 0].detach().flatten(1).float()  # [H, T]
        if self.measures:
            self.measured.append(rows)
        return out if self.sizes is None else out[..., :head_dim]

    @torch.no_grad()
    def received(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Return `received_attention` in float32, without a gradient: queries and keys (T, H, D) -> (T,)."""
        return received_attention(self.tokens, q, k, scale, self.has_class_token).float()
