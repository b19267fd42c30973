"""Products of integers are exact, and LayerNorm and addition are those of the real numbers."""

import pytest
import torch
from timm.layers import LayerScale
from torch import nn

from smi_fast.quantization.layers import IntegerLinear, Norm, add
from smi_fast.quantization.observers import Quantizer, Scaled


@pytest.mark.parametrize("inputs", [64, 520, 1536, 5000])
def test_product_is_exact_however_large_its_sum(seed, inputs):
    """Where a float32 sum would pass 2^24 it is split, and rounded once at the end."""
    layer = IntegerLinear(torch.zeros(6, inputs))
    layer.weight = torch.randint(-127, 128, (6, inputs)).float()
    layer.weight[0] = 127
    layer.weight[1, ::2], layer.weight[1, 1::2] = 127, -127
    layer.split(255)
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
    layer, largest = IntegerLinear(linear.weight, linear.bias), 2 ** (bits - 1) - 1
    layer.freeze(bits)
    for row, integers, scale in zip(linear.weight.tolist(), layer.weight.tolist(), layer.weight_scale, strict=True):
        assert scale == (max(map(abs, row)) / largest or 1)
        assert integers == [round(weight / scale.item()) for weight in row]


def test_layer_scale_becomes_a_part_of_the_weights_and_changes_no_integer(seed):
    linear, scale = nn.Linear(24, 5).double(), LayerScale(5).double()
    scale.gamma.data = torch.tensor([1e-5, -0.3, 2.0, 0.0, 1.0]).double()
    scaled, plain = (IntegerLinear(linear.weight, linear.bias, gain) for gain in (scale.gamma, None))
    x = torch.randint(0, 256, (7, 24)).double()
    torch.testing.assert_close(scaled(Scaled(x.clone())).to(1.0).values, scale(linear(x)))
    scaled.freeze(8)
    plain.freeze(8)
    assert torch.equal(scaled.weight, plain.weight * scale.gamma.sign()[:, None])
    torch.testing.assert_close(scaled(Scaled(x)).to(1.0).values, scale(plain(Scaled(x)).to(1.0).values))


def ready(place: Quantizer, low: float, high: float) -> Quantizer:
    """A place that has observed a range and rounds."""
    place(Scaled(torch.tensor([low, high])))
    place.freeze()
    return place


def numbers(scale: float, *shape: int) -> tuple[Scaled, torch.Tensor]:
    """Random integers, and the real numbers that they stand for."""
    scaled = Scaled(torch.randint(-99, 99, shape).double(), scale)
    return scaled, scaled.values * scale


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_norm_is_that_of_real_numbers(seed, centred, groups):
    """In float64, to half a step of the place behind."""
    weight, bias, (x, real) = torch.randn(16).double(), torch.randn(16).double(), numbers(0.037, 7, 16 * groups)
    norm = Norm(weight, bias if centred else None, 5.0, 8)
    ready(norm.out, -30, 30)
    normed = norm(x)
    for group, found in zip(real.split(16, -1), normed.values.split(16, -1), strict=True):
        if centred:
            group = group - group.mean(-1, keepdim=True)
        expected = group / (group.square().mean(-1, keepdim=True) + 5).sqrt() * weight + bias * centred
        assert (found * normed.scale - expected).abs().max() <= norm.out.unit / 2 + 1e-12


def test_addition_is_that_of_real_numbers(seed):
    (x, real_x), (y, real_y), to = numbers(0.037, 7, 16), numbers(0.11, 7, 16), ready(Quantizer(8), -30, 30)
    total = add(x, y, to)
    assert (total.values * total.scale - (real_x + real_y)).abs().max() <= to.unit / 2
    assert torch.equal(total.values, total.values.round())
