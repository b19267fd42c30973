"""A quantised block: stages of branches, each of which is an attention or an MLP whose output is added to the tokens.

Tokens are (B, N, C), or (T, C) packed as `ragged` if the sequences differ in length. `ragged` is None for (B, N, C).
All of timm's blocks have this form; `translation.py` brings them into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.packed import PackedTokens
from smi_fast.quantization.layers import IntegerLinear, Norm, add
from smi_fast.quantization.observers import Quantizer, Scaled

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class Branch(nn.Module):
    """What one attention or MLP adds to the tokens.

    Args:
        norm, inner, after: the norms in front of the first layer, in front of the last layer, and behind it.
        bits: the width of activations.
    """

    def __init__(self, norm: Norm | nn.Identity, inner: nn.Module, after: Norm | nn.Identity, bits: int):
        super().__init__()
        self.norm, self.inner, self.after, self.sum = norm, inner, after, Quantizer(bits)

    def forward(self, x: Scaled, ragged: PackedTokens | None = None, first: int | None = None) -> Scaled:
        """Compute what is added to tokens x. With `first`, only for each sequence's first tokens: (B, first, C)."""
        return self.after(self.update(self.norm(x), ragged, first))


class Attention(Branch):
    """Multi-head attention.

    Args:
        qkv, proj: the first and the last layer.
        q_norm, k_norm: norms of each head's queries and keys.
        heads: the number of heads.
        scale: the factor of the scores.
        others: the arguments of `Branch`.
    """

    settings = ("heads", "scale")

    def __init__(
        self,
        qkv: IntegerLinear,
        proj: IntegerLinear,
        q_norm: Norm | nn.Identity,
        k_norm: Norm | nn.Identity,
        heads: int,
        scale: float,
        bits: int,
        **others: nn.Module,
    ):
        super().__init__(bits=bits, **others)
        self.heads, self.scale = heads, scale
        self.qkv, self.qkv_out = qkv, Quantizer(bits)
        self.q_norm, self.k_norm, self.scores, self.attention = q_norm, k_norm, Quantizer(bits), Quantizer(bits)
        self.proj, self.proj_out = proj, Quantizer(bits)

    def update(self, x: Scaled, ragged: PackedTokens | None, first: int | None) -> Scaled:
        if first is None:
            (q, k, v), mask = self._project(x, ragged)
        else:
            width = len(self.qkv.weight) // 3
            (q,), _ = self._project(first_tokens(x, ragged, first), None, slice(width))
            (k, v), mask = self._project(x, ragged, slice(width, 3 * width))
        unit = self.qkv_out.unit
        weights = attend(self.q_norm(Scaled(q, unit)), self.k_norm(Scaled(k, unit)), self.scale, mask, self.scores)
        y = (self.mix(weights) @ v).transpose(1, 2).flatten(2)  # [B, N, C]
        y = self.attention(Scaled(y if ragged is None or first is not None else ragged.unpad(y), unit))
        return self.proj_out(self.proj(self.inner(y)))

    def mix(self, weights: Tensor) -> Tensor:
        """Turn the softmax of the scores (B, H, N, N) into the weights of the values."""
        return weights

    def _project(self, x: Scaled, ragged: PackedTokens | None, *channels: slice) -> tuple[Tensor, Tensor | None]:
        """Compute queries, keys and values (3, B, H, N, D), or only those in `channels`, and the mask of `padded`."""
        y, mask = padded(self.qkv_out(self.qkv(x, *channels)).values, ragged)
        head_dim = len(self.qkv.weight) // (3 * self.heads)
        return y.unflatten(-1, (-1, self.heads, head_dim)).permute(2, 0, 3, 1, 4).contiguous(), mask


class DifferentialAttention(Attention):
    """Differential attention (Ye et al., 2024, Eq. 1): the weights of every second head are subtracted from those of
    the head before it. Both halves of a value, which lie in these two heads, have the difference for their weights.

    Args:
        factor: a scalar tensor, the lambda of the equation.
        others: the arguments of `Attention`.
    """

    def __init__(self, factor: Tensor, **others: nn.Module | float):
        super().__init__(**others)
        self.register_buffer("factor", factor.detach().clone())

    def mix(self, weights: Tensor) -> Tensor:
        first, second = weights.unflatten(1, (-1, 2)).unbind(2)
        return (first - self.factor * second).repeat_interleave(2, 1)


class Mlp(Branch):
    """A perceptron with one hidden layer.

    Args:
        fc1, fc2: the two layers.
        activation: the name of the function between them, in ACTIVATIONS.
        gated: whether the function applies to the first half of the hidden channels, and the second half is multiplied
            by the result.
        others: the arguments of `Branch`.
    """

    settings = ("activation", "gated")

    def __init__(
        self, fc1: IntegerLinear, fc2: IntegerLinear, activation: str, gated: bool, bits: int, **others: nn.Module
    ):
        super().__init__(bits=bits, **others)
        self.activation, self.gated = activation, gated
        self.fc1, self.act, self.fc2, self.fc2_out = fc1, Quantizer(bits), fc2, Quantizer(bits)

    def update(self, x: Scaled, ragged: PackedTokens | None, first: int | None) -> Scaled:
        hidden, activation = self.fc1(first_tokens(x, ragged, first)).to(1.0).values, ACTIVATIONS[self.activation]
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        return self.fc2_out(self.fc2(self.inner(self.act(Scaled(hidden)))))


class Block(nn.Module):
    """Stages of branches. The branches of a stage start from the same tokens.

    Args:
        stages: for each stage the branches by their names. Only the first one has attentions.
    """

    settings = ("stages",)

    def __init__(self, *stages: Mapping[str, Branch]):
        super().__init__()
        self.stages = [list(stage) for stage in stages]
        for stage in stages:
            for name, branch in stage.items():
                self.add_module(name, branch)

    def forward(self, x: Scaled, ragged: PackedTokens | None, first: int | None = None) -> Scaled:
        """Compute the block's output for tokens x. With `first`, only that of each sequence's first tokens, from the
        keys and values of all tokens: (B, first, C)."""
        for stage in self.stages:
            branches = [self.get_submodule(name) for name in stage]
            updates = [branch(x, ragged, first) for branch in branches]
            x = first_tokens(x, ragged, first)
            for branch, update in zip(branches, updates, strict=True):
                x = add(x, update, branch.sum)
        return x


def attend(q: Scaled, k: Scaled, scale: float, mask: Tensor | None, place: Quantizer) -> Tensor:
    """Compute the softmax (B, H, N, M) of the scores of queries (B, H, N, D) and keys (B, H, M, D), which are quantised
    at `place`. The mask (B, M) is False where keys are padding."""
    scores = place(Scaled(q.values @ k.values.transpose(-2, -1), q.scale * k.scale * scale)).to(1.0).values
    if mask is not None:
        scores.masked_fill_(~mask[:, None, None], -math.inf)
    return scores.softmax(-1)


def padded(values: Tensor, ragged: PackedTokens | None) -> tuple[Tensor, Tensor | None]:
    """Return tokens as (B, N, C), and a mask (B, N) that is False where they are padding. It is None if none are."""
    return (values, None) if ragged is None else ragged.pad(values)


def first_tokens(x: Scaled, ragged: PackedTokens | None, count: int | None) -> Scaled:
    """Select the first tokens of each sequence, (B, count, C). If count is None, return x."""
    if count is None:
        return x
    if x.values.ndim == 3:
        return replace(x, values=x.values[:, :count])
    starts = ragged.cu_seqlens[:-1, None].long()
    return replace(x, values=x.values[starts + torch.arange(count, device=starts.device)])
