"""The steps between two places of quantisation: matrix products with integer weights, norms and addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.kernels.linear import linear
from smi_fast.quantization.observers import Quantizer, Scaled


class IntegerLinear(nn.Module):
    """A Linear, or a convolution that embeds patches, with integer weights: symmetric, one scale per output channel.

    Until `freeze`, `weight` (out, in) holds float weights and `weight_scale` (out,) is 1. `bias` (out,) stays float.

    Args:
        weight: (out, in), floating point. It is copied.
        bias: (out,), or None for zero.
        gain: (out,), the factors of a LayerScale behind the layer. They become a part of the weights. Each output
            channel has a scale of its own, so this changes no integer weight, apart from its sign.
    """

    settings = ("inputs",)

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gain: Tensor | None = None):
        super().__init__()
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if gain is not None:
            weight, bias = weight * gain[:, None], bias * gain
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("weight_scale", torch.ones_like(bias))
        self.register_buffer("bias", bias.detach().clone())
        self.inputs = self.part = weight.shape[1]  # `part` inputs are summed in one product

    def freeze(self, bits: int) -> None:
        """Round the weights to integers of `bits` bits."""
        largest = 2 ** (bits - 1) - 1
        scale = self.weight.abs().amax(1) / largest
        self.weight_scale = torch.where(scale > 0, scale, 1)
        self.weight = (self.weight / self.weight_scale[:, None]).round_().clamp_(-largest, largest)

    def split(self, levels: int) -> None:
        """Split the sum over integer inputs, whose range includes zero and has `levels` steps, so that the dtype holds
        every partial sum exactly."""
        exact = 2 / torch.finfo(self.weight.dtype).eps  # float32 holds all integers up to 2^24
        signs = torch.stack((self.weight, -self.weight)).double().clamp_(min=0)  # [2, out, in]
        self.part = self.inputs
        while max(part.sum(-1).max() for part in signs.split(self.part, -1)) * levels > exact:
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


class Norm(nn.Module):
    """LayerNorm if it is `centred`, otherwise RMSNorm, and the place of quantisation behind it.

    It normalises each group of as many channels as it has weights. `weight` and `bias` (channels,) stay float. An
    RMSNorm has no bias.
    """

    settings = ("eps", "centred")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, bits: int):
        super().__init__()
        self.eps, self.centred, self.out = eps, bias is not None, Quantizer(bits)
        self.register_buffer("weight", weight.detach().clone())
        if bias is not None:
            self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Scaled) -> Scaled:
        """Normalise x. The unit of x cancels out; the weights include the unit of the place."""
        weight, eps = self.out.divide(self.weight), self.eps / x.scale**2
        groups, shape = x.values.unflatten(-1, (-1, len(weight))), weight.shape
        if self.centred:
            normed = F.layer_norm(groups, shape, weight, self.out.divide(self.bias), eps)
        else:
            normed = F.rms_norm(groups, shape, weight, eps)
        return self.out(Scaled(normed.flatten(-2), self.out.unit))


def add(x: Scaled, y: Scaled, to: Quantizer) -> Scaled:
    """Add x and y, and quantise the sum at `to`. The values of y are overwritten."""
    y = y.to(to.unit)
    y.values.add_(x.values, alpha=x.scale / to.unit)
    return to(y)
