"""What a classifier may have beside linear layers. Each step has a place of quantisation behind it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from smi_fast.quantization.blocks import ACTIVATIONS
from smi_fast.quantization.observers import Quantizer, Scaled


class Activation(nn.Module):
    """A function of each number.

    Args:
        activation: the name of the function, in ACTIVATIONS.
        bits: the width of activations.
    """

    settings = ("activation",)

    def __init__(self, activation: str, bits: int):
        super().__init__()
        self.activation, self.out = activation, Quantizer(bits)

    def forward(self, x: Scaled) -> Scaled:
        """Compute the function. The values of x are overwritten."""
        return self.out(Scaled(ACTIVATIONS[self.activation](x.to(1.0).values)))


class UnitLength(nn.Module):
    """Vectors (..., C), divided by their lengths, so that the products behind it are cosines. The unit cancels out.

    A vector of zeros, which has no direction, stays as it is.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.out = Quantizer(bits)

    def forward(self, x: Scaled) -> Scaled:
        return self.out(Scaled(F.normalize(x.values, dim=-1)))
