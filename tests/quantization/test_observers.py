"""Quantizer: what it observes, and how it rounds."""

import pytest
import torch

from smi_fast.quantization.observers import Quantizer, Scaled


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.5, 4.0), (0.5, 2.0), (-3.0, -1.0)])
def test_rounds_as_eq_5_with_a_range_that_includes_zero(seed, bits, low, high):
    place = Quantizer(bits)
    for observed in ([low, (low + high) / 2], [high]):
        place(Scaled(torch.tensor(observed).double()))
    assert (place.low, place.high) == (min(low, 0), max(high, 0))
    place.freeze()
    x = torch.linspace(-6, 6, 999).double()
    scale, levels = (max(high, 0) - min(low, 0)) / (2**bits - 1), 2**bits - 1
    zero_point = round(-min(low, 0) / scale)
    expected = torch.tensor([min(max(round(v / scale) + zero_point, 0), levels) - zero_point for v in x.tolist()])
    for given in (
        Scaled(x.clone()),
        Scaled(x / 0.25, 0.25),
        Scaled(x - 2, torch.ones(()), torch.full((), 2.0).double()),
    ):
        rounded = place(given)
        assert rounded.scale == scale
        assert (rounded.values - expected).abs().gt(0).float().mean() < 0.01  # ties, which the unit's rounding decides
        assert (rounded.values - expected).abs().max() <= 1
    assert place(Scaled(torch.zeros(1))).values.item() == 0


def test_a_place_that_saw_nothing_but_zeros():
    place = Quantizer(8)
    place(Scaled(torch.zeros(3)))
    place.freeze()
    assert place(Scaled(torch.tensor([0.0, 0.4, -0.4]))).values.tolist() == [0, 0, 0]


def test_numbers_that_are_not_finite():
    with pytest.raises(ValueError, match="calibration leads to activations from -inf to 1"):
        Quantizer(8)(Scaled(torch.tensor([1, -torch.inf])))
