"""linear() against torch's own and float64."""

import pytest
import torch
import torch.nn.functional as F
from smi_fast.kernels import linear as linear_module
from smi_fast.kernels.linear import PackedWeight, can_pack, linear
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("shape", [(1, 24), (15, 24), (16, 24), (3, 7, 24), (200, 192)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_at_most_twice_as_far_from_float64_as_torchs(seed, shape, bias):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(40, shape[-1])
    bias = torch.randn(40) if bias else None
    grad = torch.randn(*shape[:-1], 40)
    exact_x = x.detach().double().requires_grad_()
    exact = F.linear(exact_x, weight.double(), None if bias is None else bias.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double())
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    for got, reference, wanted in (
        (ours, theirs, exact),
        (torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(theirs, x, grad)[0], exact_grad),
    ):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 2 * (reference - wanted).abs().max() + 1e-6


def test_weights_that_train_get_their_gradients(seed):
    x, weight, bias = torch.randn(20, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    ours = torch.autograd.grad(linear(x, weight, bias).square().sum(), (weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_that_are_not_contiguous_are_right(seed):
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(6, 8)
    for grad in (torch.ones(1, 1).expand(20, 6), torch.randn(6, 20).t()):
        ours = torch.autograd.grad(linear(x, weight), x, grad)[0]
        torch.testing.assert_close(ours, grad @ weight)


@pytest.mark.skipif(not can_pack(torch.bfloat16, torch.device("cpu")), reason="bfloat16 is emulated on this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (3, 7, 24), (200, 192)], ids=str)
def test_packed_weights_give_the_numbers_of_bfloat16_products(seed, shape, dtype):
    x, weight, bias = torch.randn(shape, dtype=dtype), torch.randn(40, shape[-1]), torch.randn(40).bfloat16()
    x.requires_grad_()
    grad = torch.randn(*shape[:-1], 40).bfloat16().transpose(0, -1).contiguous().transpose(0, -1)
    found, expected = linear(x, PackedWeight(weight), bias), F.linear(x.bfloat16(), weight.bfloat16(), bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(out, x, grad)[0] for out in (found, expected))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=2e-2)


def test_autocast_is_obeyed(seed):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(20, 8), torch.randn(6, 8)).dtype == torch.bfloat16


@pytest.mark.skipif(not linear_module.HAS_ONEDNN, reason="this torch is built without oneDNN")
def test_onednn_serves_float32_products_without_weight_gradients_and_nothing_else(seed, monkeypatch):
    calls = []
    monkeypatch.setattr(linear_module, "_onednn", lambda *args: calls.append(args) or F.linear(*args))
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    linear(x, weight)
    assert len(calls) == 1
    linear(x.double(), weight.double())
    linear(x[:15], weight)
    trained = weight.clone().requires_grad_()
    linear(x, trained)
    assert len(calls) == 1
    with torch.no_grad():
        linear(x, trained)
    assert len(calls) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_flop_counter_mode_counts_both_ways_of_multiplying(frozen):
    x, weight = torch.randn(3, 20, 8, requires_grad=True), torch.randn(6, 8, requires_grad=not frozen)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(linear(x, weight).sum(), x)
    assert counter.get_total_flops() == 2 * (2 * 60 * 8 * 6)
