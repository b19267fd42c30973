"""The residual stream. What a branch adds to it waits for the next norm, so that one kernel computes both."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers import DropPath, LayerNorm, LayerScale
from torch import Tensor, nn

from smi_fast.backbones.attend import Attend
from smi_fast.backbones.casting import autocast_dtype
from smi_fast.backbones.support import obstacle, weight_and_bias
from smi_fast.kernels import residual_norm, residual_norm_of_first
from smi_fast.packed import PackedTokens

LAYER_NORMS = (nn.LayerNorm, LayerNorm)
SCALES, PATHS = (nn.Identity, LayerScale), (nn.Identity, DropPath)


class Stream(NamedTuple):
    """The tokens x + gamma * update, (B, N, C) or packed (T, C).

    Attributes:
        x: the tokens before the last branch.
        update: what that branch adds, or None if x is the sum already.
        gamma: (C,), the factors of the update, or None for 1.
    """

    x: Tensor
    update: Tensor | None = None
    gamma: Tensor | None = None

    def packed(self) -> Stream:
        """Return the stream with tokens (T, C)."""
        if self.x.ndim == 2:
            return self
        return Stream(self.x.flatten(0, -2), None if self.update is None else self.update.flatten(0, -2), self.gamma)

    def batch(self, tokens: PackedTokens) -> Stream:
        """Return the stream with tokens (B, N, C) if all sequences are equally long. `tokens` says where they lie."""
        if self.x.ndim != 2 or not tokens.is_uniform:
            return self
        shape = tokens.batch_size, tokens.max_seqlen, self.x.shape[-1]
        return Stream(self.x.view(shape), None if self.update is None else self.update.view(shape), self.gamma)

    def sum(self) -> Tensor:
        """Return the tokens."""
        if self.update is None:
            return self.x
        return self.x + (self.update if self.gamma is None else self.update * self.gamma)


def add(x: Tensor, update: Tensor, scale: nn.Module, drop_path: nn.Module) -> Stream:
    """Return x + drop_path(scale(update)), where `scale` and `drop_path` are the modules at the end of a branch."""
    if obstacle(scale, SCALES) is not None:
        update, gamma = scale(update), None
    else:
        gamma = scale.gamma if type(scale) is LayerScale else None
    is_path = type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob
    if is_path or obstacle(drop_path, PATHS) is not None:
        return Stream(x, drop_path(update if gamma is None else update * gamma))
    return Stream(x, update, gamma)


def normalise(stream: Stream, norm: nn.Module, backend: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of the stream and norm(tokens).

    Modifications: one kernel computes both, and the cast that autocast asks of the next product.
    """
    if _is_plain(norm):
        return residual_norm(**_arguments(stream, norm, backend))
    x = stream.sum()
    return x, norm(x)


def normalise_of_first(stream: Stream, norm: nn.Module, attend: Attend, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `count` tokens of each sequence of the stream, norm(tokens) of all tokens, and of the first.

    Modifications: as in `normalise`. If the sequences are equally long, the backward pass fills nothing with zeros.
    """
    if stream.x.ndim == 3 and _is_plain(norm):
        return residual_norm_of_first(first=count, **_arguments(stream, norm, attend.backend))
    x, normed = normalise(stream, norm, attend.backend)
    return attend.first(x, count), normed, attend.first(normed, count)


def _is_plain(norm: nn.Module) -> bool:
    return obstacle(norm, LAYER_NORMS) is None and not norm.__dict__.get("_fast_norm")


def _arguments(stream: Stream, norm: nn.Module, backend: str) -> dict[str, Any]:
    weight, bias = weight_and_bias(norm)
    return {
        "x": stream.x,
        "weight": weight,
        "bias": bias,
        "eps": norm.eps,
        "update": stream.update,
        "gamma": stream.gamma,
        "dtype": autocast_dtype(stream.x),
        "backend": backend,
    }
