"""The steps between two places of quantisation: matrix products with integer weights, LayerNorm and addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import nn

from smi_fast.kernels.linear import linear
from smi_fast.quantization.observers import Quantizer, Rounding, Scaled


class IntegerLinear(nn.Module):
    """A Linear, or a convolution that embeds patches, with integer weights: symmetric, one scale per output channel.

    Until `freeze`, `weight` (out, in) holds float weights and `weight_scale` (out,) is 1. `bias` (out,) stays float.

    Args:
        layer: timm's layer, which stays as it is.
        then: the LayerScale behind it, or an Identity. Its factors become a part of the weights. Each output channel
            has a scale of its own, so this changes no integer weight, apart from its sign.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, then: nn.Module | None = None):
        super().__init__()
        weight = layer.weight.detach().flatten(1).clone()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        if isinstance(then, LayerScale):
            gamma = then.gamma.detach()
            weight, bias = weight * gamma[:, None], bias * gamma
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.ones_like(bias))
        self.register_buffer("bias", bias)
        self.part = weight.shape[1]  # how many inputs are summed in one product

    def freeze(self, bits: int) -> None:
        """Round the weights to integers of `bits` bits."""
        largest = 2 ** (bits - 1) - 1
        scale = self.weight.abs().amax(1) / largest
        self.weight_scale = torch.where(scale > 0, scale, 1)
        self.weight = (self.weight / self.weight_scale[:, None]).round_().clamp_(-largest, largest)

    def split(self, inputs: Rounding) -> None:
        """Split the sum over inputs that were rounded in the given way, so that the dtype holds every partial sum of
        integers exactly."""
        exact = 2 / torch.finfo(self.weight.dtype).eps  # float32 holds all integers up to 2^24
        weight = self.weight.double()
        terms = torch.stack((weight * inputs.highest, weight * inputs.lowest))
        sums = torch.stack((terms.amax(0), -terms.amin(0)))  # [2, out, in]: what a term adds, or subtracts, at most
        self.part = self.weight.shape[1]
        while max(part.sum(-1).max() for part in sums.split(self.part, -1)) > exact:
            self.part = -(-self.part // 2)

    def forward(self, x: Scaled, channels: slice = slice(None)) -> Scaled:
        """Compute the layer's output (..., out), or only its `channels`, for x (..., in).

        The values of the output are sums of integers, which are exact and rounded once, to the dtype of x.
        """
        values, weight = x.values, self.weight[channels]
        if self.part == weight.shape[1]:
            product = linear(values, weight)
        else:
            parts = zip(values.split(self.part, -1), weight.split(self.part, 1), strict=True)
            product = sum(linear(a.contiguous(), b.contiguous()).double() for a, b in parts).to(values.dtype)
        return Scaled(product, self.weight_scale[channels] * x.scale, self.bias[channels])


def layer_norm(norm: nn.LayerNorm, x: Scaled, to: Quantizer) -> Scaled:
    """Normalise x, and quantise the result at `to`. The unit of x cancels out; the weights include the unit of `to`."""
    weight, bias = to.divide(norm.weight), to.divide(norm.bias)
    return to(Scaled(F.layer_norm(x.values, norm.normalized_shape, weight, bias, norm.eps / x.scale**2), to.unit))


def add(x: Scaled, y: Scaled, to: Quantizer) -> Scaled:
    """Add x and y, and quantise the sum at `to`. The values of y are overwritten."""
    y = y.to(to.unit)
    y.values.add_(x.values, alpha=x.scale / to.unit)
    return to(y)
