"""Products of integers are exact, and LayerNorm and addition are those of the real numbers."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import nn

from smi_fast.quantization.layers import IntegerLinear, add, layer_norm
from smi_fast.quantization.observers import Quantizer, Rounding, Scaled


@pytest.mark.parametrize("inputs", [64, 520, 1536, 5000])
def test_product_is_exact_however_large_its_sum(seed, inputs):
    """Where a float32 sum would pass 2^24 it is split, and rounded once at the end."""
    layer = IntegerLinear(nn.Linear(inputs, 6))
    layer.weight = torch.randint(-127, 128, (6, inputs)).float()
    layer.weight[0] = 127
    layer.weight[1, ::2], layer.weight[1, 1::2] = 127, -127
    layer.split(Rounding(1.0, 0, 255))
    x = torch.randint(0, 256, (40, inputs)).float()
    x[0] = 255
    x[1, ::2], x[1, 1::2] = 255, 0
    expected = (x.long() @ layer.weight.long().T).double().float()
    assert torch.equal(layer(Scaled(x)).values, expected)
    assert torch.equal(layer(Scaled(x[:, None]), slice(1, 3)).values, expected[:, None, 1:3])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_the_nearest_of_eq_5(seed, bits):
    linear = nn.Linear(24, 5).double()
    nn.init.zeros_(linear.weight[2])
    layer, largest = IntegerLinear(linear), 2 ** (bits - 1) - 1
    layer.freeze(bits)
    for row, integers, scale in zip(linear.weight.tolist(), layer.weight.tolist(), layer.weight_scale, strict=True):
        assert scale == (max(map(abs, row)) / largest or 1)
        assert integers == [round(weight / scale.item()) for weight in row]


def test_layer_scale_becomes_a_part_of_the_weights_and_changes_no_integer(seed):
    linear, scale = nn.Linear(24, 5).double(), LayerScale(5).double()
    scale.gamma.data = torch.tensor([1e-5, -0.3, 2.0, 0.0, 1.0]).double()
    scaled, plain, x = IntegerLinear(linear, scale), IntegerLinear(linear), torch.randint(0, 256, (7, 24)).double()
    torch.testing.assert_close(scaled(Scaled(x.clone())).to(1.0).values, scale(linear(x)))
    scaled.freeze(8)
    plain.freeze(8)
    assert torch.equal(scaled.weight, plain.weight * scale.gamma.sign()[:, None])
    torch.testing.assert_close(scaled(Scaled(x)).to(1.0).values, scale(plain(Scaled(x)).to(1.0).values))


def ready(low: float, high: float) -> Quantizer:
    """A place that has observed a range and rounds."""
    place = Quantizer(8)
    place(Scaled(torch.tensor([low, high])))
    place.freeze()
    return place


def test_layer_norm_and_addition_are_those_of_real_numbers(seed):
    """In float64, to half a step of the place behind."""
    norm, to = nn.LayerNorm(16, eps=5.0).double(), ready(-30, 30)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, y = (Scaled(torch.randint(-99, 99, (7, 16)).double(), scale) for scale in (0.037, 0.11))
    real_x, real_y = (number.values * number.scale for number in (x, y))
    normed = layer_norm(norm, x, to)
    expected = F.layer_norm(real_x, (16,), norm.weight, norm.bias, 5.0)
    assert (normed.values * normed.scale - expected).abs().max() <= to.unit / 2
    total = add(x, y, to)
    assert (total.values * total.scale - (real_x + real_y)).abs().max() <= to.unit / 2
    assert torch.equal(total.values, total.values.round())
