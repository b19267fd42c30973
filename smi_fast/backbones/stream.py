"""The residual stream. What a branch adds to it waits for the next norm, so that one kernel computes both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerNorm, LayerScale
from torch import Tensor, nn

from smi_fast.backbones.support import obstacle, weight_and_bias
from smi_fast.kernels import residual_norm, resolve_backend

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

    Modifications: the Triton backend computes both, and the cast that autocast asks of the next product, in one kernel.
    """
    device = stream.x.device
    if (
        resolve_backend(backend, device) == "torch"
        or obstacle(norm, LAYER_NORMS) is not None
        or norm.__dict__.get("_fast_norm")
    ):
        x = stream.sum()
        return x, norm(x)
    autocast = torch.is_autocast_enabled(device.type)
    return residual_norm(
        stream.x,
        *weight_and_bias(norm),
        norm.eps,
        update=stream.update,
        gamma=stream.gamma,
        dtype=torch.get_autocast_dtype(device.type) if autocast else None,
        backend=backend,
    )
