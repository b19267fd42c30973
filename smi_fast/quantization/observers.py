"""Quantizer: a place where activations are observed and, once calibration has ended, rounded to integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scaled:
    """Real numbers, `values * scale + offset`, in the form in which a quantised model's layers hand them on.

    A matrix product keeps a scale and an offset for each channel until the next place rounds it. Scales, bias and the
    change to that place's unit then take one pass over the product.

    Args:
        values: (..., channels), floating point.
        scale: a number, or a tensor (channels,).
        offset: a tensor (channels,), or None for zero.
    """

    values: Tensor
    scale: float | Tensor = 1.0
    offset: Tensor | None = None

    def to(self, unit: float) -> Scaled:
        """Convert the numbers to multiples of `unit`. The values are overwritten."""
        scale = self.scale / unit
        if self.offset is not None:
            torch.addcmul(self.offset / unit, self.values, scale, out=self.values)
        elif scale != 1:
            self.values.mul_(scale)
        return Scaled(self.values, unit)


@dataclass(frozen=True)
class Rounding:
    """How a place rounds: to integers from `lowest` to `highest`, which stand for multiples of `scale`.

    In the paper's Eq. 5 the integers run from 0 to 2^bits - 1, and z stands for zero. Here z is subtracted, so `lowest`
    is -z.
    """

    scale: float
    lowest: int
    highest: int


class Quantizer(nn.Module):
    """A place in the model where activations are observed, and after `freeze` rounded with one scale for the tensor.

    Attributes:
        low, high: the smallest and the largest number that the place has observed. They include zero, so that zero is
            one of the integers.
        rounding: how the place rounds; None while it observes.
    """

    settings = ("levels",)
    low = high = 0.0
    rounding: Rounding | None = None

    def __init__(self, bits: int):
        super().__init__()
        self.levels = 2**bits - 1

    @property
    def unit(self) -> float:
        """The scale of the numbers that the place returns. It is 1.0 while the place observes."""
        return self.rounding.scale if self.rounding else 1.0

    def divide(self, parameter: Tensor) -> Tensor:
        """Convert a parameter to multiples of the unit, in new memory."""
        return parameter / self.unit

    def freeze(self) -> None:
        """Stop observing and start rounding, to integers that cover the observed range."""
        scale = (self.high - self.low) / self.levels or 1.0  # the range is empty if all numbers were zero
        self.round_with(scale, round(-self.low / scale))

    def round_with(self, scale: float, zero_point: int) -> None:
        """Start rounding with the scale s and the zero point z of the paper's Eq. 5."""
        self.rounding = Rounding(scale, -zero_point, self.levels - zero_point)

    def forward(self, x: Scaled) -> Scaled:
        """Round x to integers, held in floating point, or observe x and return it. The values are overwritten.

        Raises:
            ValueError: x is observed, and it is not finite.
        """
        x = x.to(self.unit)
        if self.rounding is not None:
            x.values.round_().clamp_(self.rounding.lowest, self.rounding.highest)
            return x
        low, high = (value.item() for value in torch.aminmax(x.values))
        if not math.isfinite(low + high):
            raise ValueError(f"calibration leads to activations from {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        return x
