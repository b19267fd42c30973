"""Bias and GELU in all of its forms: against their formulas in float64, on both backends."""

import math
import sys
from itertools import product

import pytest
import torch
from kernel_cases import (
    DeviceWork,
    assert_within_twice,
    canaries,
    lazily_allocated,
    only_the_last_program,
    poisoned_memory,
    twice,
    untouched,
    with_errors_elsewhere,
)
from smi_fast.kernels.backend import INTERPRETED
from smi_fast.kernels.mlp import (
    FORMS,
    bias_gelu,
    bias_gelu_backward_op,
    bias_gelu_op,
    launch_bias_gelu,
    launch_bias_gelu_backward,
)

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
FORM = pytest.mark.parametrize("form", FORMS)
MODULE = sys.modules[bias_gelu.__module__]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [192, 384, 768, 1024, 1280, 1408, 80, 1]


def formula(x, bias, form):
    z = x if bias is None else (x + bias).to(x.dtype)
    if form == "none":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    if form == "tanh":
        return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return z * torch.sigmoid(1.702 * z)


def run(x, bias, grad, form, compute=formula):
    x = x.detach().requires_grad_()
    out = compute(x, bias, form)
    return {"out": out.detach(), "grad": torch.autograd.grad(out, x, grad.to(out.dtype))[0]}


def on(backend):
    return lambda x, bias, form: bias_gelu(x, bias, approximate=form, backend=backend)


def check(shape, dtype, form, device, with_bias=True):
    def draw():
        x, grad = (3 * torch.randn(2, *shape, device=device)).to(dtype)
        bias = torch.randn(shape[-1], device=device).to(dtype) if with_bias else None
        exact = run(x.double(), None if bias is None else bias.double(), grad, form)
        return x, bias, grad, exact, [run(x, bias, grad, form, compute) for compute in (formula, on("torch"))]

    x, bias, grad, exact, plain = draw()
    with poisoned_memory():
        result = run(x, bias, grad, form, on("triton"))
    assert {t.dtype for t in result.values()} == {dtype}
    assert_within_twice(result, with_errors_elsewhere(plain, exact, draw, 3), exact)
    return result


def matrix():
    """Every form, dtype and width; the approximations and float16 in three widths where there is no GPU."""
    for form, dtype, width in product(FORMS, DTYPES, WIDTHS):
        slow = (form != "none" or dtype == torch.float16) and width not in (768, 80, 1)
        yield pytest.param(form, dtype, width, marks=pytest.mark.cuda if slow else ())


@pytest.mark.parametrize(("form", "dtype", "channels"), list(matrix()))
def test_triton_obeys_the_2x_rule(form, dtype, channels, device, seed):
    check((5, channels), dtype, form, device)
    check((1, 3, channels), dtype, form, device, with_bias=False)


@FORM
@BOTH
def test_large_inputs_overflow_nowhere(backend, form, device):
    x = torch.tensor([-1e4, -100.0, -20.0, -0.0, 20.0, 100.0, 1e4], device=device)
    result = run(x, None, torch.ones_like(x), form, on(backend))
    torch.testing.assert_close(result["out"], x.clamp(min=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(result["grad"], torch.where(x == 0, 0.5, (x > 0).float()), rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows_give_empty_results_and_gradients(shape, backend, device):
    x = torch.empty(shape, device=device)
    assert all(t.shape == shape for t in run(x, torch.ones(8, device=device), x, "none", on(backend)).values())


@FORM
def test_a_bias_that_asks_for_a_gradient_gets_it_and_changes_no_number(form, device, seed):
    x, grad = torch.randn(2, 5, 24, device=device)
    bias = torch.randn(24, device=device)
    frozen = run(x, bias, grad, form, on("triton"))
    bias.requires_grad_()
    for name, t in run(x, bias, grad, form, on("triton")).items():
        torch.testing.assert_close(t, frozen[name])
    outputs = on("triton")(x, bias, form), formula(x.double(), bias.double(), form)
    found, wanted = (torch.autograd.grad(out, bias, grad.to(out.dtype))[0] for out in outputs)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad(), DeviceWork(MODULE) as work:
        on("triton")(x, bias, form)
    assert (work.launches, work.operators) == (1, [])  # nothing asks for a gradient where none is recorded


def test_only_the_input_is_kept_for_the_backward_pass(device, seed):
    x, bias = torch.randn(5, 24, device=device, requires_grad=True), torch.randn(24, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        on("triton")(x, bias, "none")
    assert kept == [x.data_ptr(), bias.data_ptr()]


@FORM
@BOTH
def test_any_layout_gives_the_same_numbers(backend, form, device, seed):
    """Such as the columns that a joint projection leaves to the MLP, and gradients that are the same for all rows."""
    wide, bias = torch.randn(5, 40, device=device), torch.randn(24, 2, device=device)[:, 0]
    x, grad = wide[:, :24], torch.randn(24, device=device).expand(5, 24)
    wanted = run(x.contiguous(), bias.contiguous(), grad.contiguous(), form, on(backend))
    for name, t in run(x, bias, grad, form, on(backend)).items():
        torch.testing.assert_close(t, wanted[name])


@pytest.mark.parametrize("channels", [40, 33])
def test_writes_stay_in_the_outputs_and_repeat_bit_for_bit(channels, device, seed):
    x, grad = torch.randn(2, 51, channels, device=device)
    bias, results = torch.randn(channels, device=device), []
    for _ in range(2):
        with canaries(MODULE, "_fake_bias_gelu"):
            out = launch_bias_gelu(x, bias, "none")
        with canaries(MODULE, "_fake_bias_gelu_backward"):
            results.append((out, launch_bias_gelu_backward(grad, x, bias, "none")))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_operators_pass_opcheck_and_give_the_numbers_of_eager_code(device, seed):
    x, grad = torch.randn(2, 2, 3, 24, device=device)
    for bias in (torch.randn(24, device=device), None):
        torch.library.opcheck(bias_gelu_op, (x.clone().requires_grad_(), bias, "tanh"))
        torch.library.opcheck(bias_gelu_backward_op, (grad, x, bias, "tanh"))
        eager = run(x, bias, grad, "tanh", on("triton"))
        out = on("triton")(x, bias, "tanh")  # where nothing asks for a gradient
        assert torch.equal(out, eager["out"])
        assert not out.requires_grad
        with DeviceWork(MODULE):
            traced = run(x, bias, grad, "tanh", on("triton"))
        compiled = run(x, bias, grad, "tanh", torch.compile(on("triton"), backend="aot_eager", fullgraph=True))
        for name, t in eager.items():
            assert torch.equal(t, traced[name]), name
            assert torch.equal(t, compiled[name]), name


@pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter runs")
def test_elements_beyond_two_to_the_31_are_addressed(tmp_path, seed):
    """Only the last elements are computed, of a batch that is that large."""
    channels, rows = 3072, 2**31 // 3072 + 3
    x, grad = (untouched((rows, channels), torch.float32, tmp_path) for _ in range(2))
    x[-1], grad[-1] = torch.randn(2, channels)
    bias = torch.randn(channels)
    fakes = "_fake_bias_gelu", "_fake_bias_gelu_backward"
    with only_the_last_program(MODULE), lazily_allocated(MODULE, tmp_path, *fakes):
        out = launch_bias_gelu(x, bias, "none")
        found = launch_bias_gelu_backward(grad, x, bias, "none")
    last = x.numel() % 1024 or 1024
    wanted = run(x[-1:], bias, grad[-1:], "none")
    torch.testing.assert_close(out[-1, -last:], wanted["out"][0, -last:])
    torch.testing.assert_close(found[-1, -last:], wanted["grad"][0, -last:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"x": torch.zeros(3, 0)}, r"x has shape \(3, 0\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"bias": torch.ones(5)}, r"bias has shape \(5,\), not \(4,\)"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias has dtype torch.int64"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta"),
        ({"approximate": "erf"}, "approximate is 'erf'"),
        ({"x": torch.zeros(2, 4).double(), "backend": "triton"}, "does not compute torch.float64"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{"x": torch.zeros(2, 4), **arguments})


@pytest.mark.cuda
@FORM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [*WIDTHS, 3072, 6144])
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(channels, dtype, form, device, seed):
    first, second = twice(lambda: check((377, channels), dtype, form, device))
    for name in first:
        assert torch.equal(first[name], second[name]), name
