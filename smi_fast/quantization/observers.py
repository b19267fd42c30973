"""Quantizer: a place where activations are observed and, once calibration has ended, rounded to integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scaled:
    """The real numbers `values * scale + offset`: what the layers of a quantised model hand on.

    A matrix product keeps a scale and an offset for each channel until the next place rounds it, so that scales, bias
    and the change to that place's unit take one pass over the product.

    Args:
        values: (..., channels), floating point.
        scale: a number, or a tensor (channels,).
        offset: a tensor (channels,), or None for zero.
    """

    values: Tensor
    scale: float | Tensor = 1.0
    offset: Tensor | None = None

    def to(self, unit: float) -> Scaled:
        """The same numbers as multiples of `unit`. The values are overwritten."""
        scale = self.scale / unit
        if self.offset is not None:
            torch.addcmul(self.offset / unit, self.values, scale, out=self.values)
        elif scale != 1:
            self.values.mul_(scale)
        return Scaled(self.values, unit)


@dataclass(frozen=True)
class Rounding:
    """Rounding of real numbers to the integers from `lowest` to `highest`, each of which stands for a multiple of
    `scale`. With the zero point z of Eq. 5, which is subtracted here, `lowest` is -z and `highest` is 2^bits - 1 - z.
    """

    scale: float
    lowest: int
    highest: int


class Quantizer(nn.Module):
    """A place where activations are observed and later rounded: asymmetric, with one range for the tensor.

    Attributes:
        low, high: the smallest and the largest number observed; the range includes zero, so that zero is an integer.
        rounding: None while the place observes.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.levels = 2**bits - 1
        self.low = self.high = 0.0
        self.rounding: Rounding | None = None

    @property
    def unit(self) -> float:
        """The real number that 1 stands for in what this place returns; 1.0 while it observes."""
        return self.rounding.scale if self.rounding else 1.0

    def divide(self, parameter: Tensor) -> Tensor:
        """A parameter as multiples of the unit, in memory of its own."""
        return parameter / self.unit

    def freeze(self) -> None:
        """Stop observing and start rounding, with integers that cover the observed range."""
        scale = (self.high - self.low) / self.levels or 1.0  # the range is empty if all numbers were zero
        self.round_with(scale, round(-self.low / scale))

    def round_with(self, scale: float, zero_point: int) -> None:
        """Start rounding with the scale and the zero point of Eq. 5."""
        self.rounding = Rounding(scale, -zero_point, self.levels - zero_point)

    def forward(self, x: Scaled) -> Scaled:
        """x as integers, held in floating point; while the place observes, x itself. The values are overwritten.

        Raises:
            ValueError: an observed number is not finite.
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
