"""Residual sum and LayerNorm: against their formula in float64, on both backends."""

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
from smi_fast.kernels.norm import (
    MAX_CHANNELS,
    launch_residual_norm,
    launch_residual_norm_backward,
    residual_norm,
    residual_norm_backward_op,
    residual_norm_of_first,
    residual_norm_op,
)

BOTH = pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
MODULE, EPS = sys.modules[residual_norm.__module__], 1e-6
SINGLE, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    (SINGLE, BF16),
    (SINGLE, HALF),
    (SINGLE, SINGLE),
    (BF16, BF16),
    (HALF, HALF),
    (BF16, HALF),
]  # of x, of the rest
WIDTHS = [192, 384, 768, 1024, 1280, 1408, 80, 1]


def formula(x, update, gamma, weight, bias, dtype):
    """In the dtypes that the inputs have, with mean and variance in float32 at least."""
    s = x
    if update is not None:
        s = x + (update if gamma is None else gamma * update)
    exact = s.to(torch.promote_types(s.dtype, torch.float32))
    n = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    n = n if weight is None else n * weight
    return s, (n if bias is None else n + bias).to(dtype)


def ours(x, update, gamma, weight, bias, dtype, backend):
    return residual_norm(x, weight, bias, EPS, update=update, gamma=gamma, dtype=dtype, backend=backend)


def run(inputs, grads, dtype, backend=None, compute=ours):
    """The stream, the rows, and the gradients of x and update."""
    x, update, *weights = inputs
    leaves = [t.detach().requires_grad_() for t in (x, update) if t is not None]
    arguments = leaves if update is not None else [*leaves, None]
    options = (dtype,) if backend is None else (dtype, backend)
    outputs = (formula if backend is None else compute)(*arguments, *weights, *options)
    found = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    names = ("stream", "normed", "grad_x", "grad_update")
    return {name: t.detach() for name, t in zip(names, (*outputs, *found), strict=False)}


def draw(shape, stream, dtype, device, with_update=True, with_gamma=True, affine=True, mean=0.0):
    """Inputs in the order of the launcher, and the gradients of what it returns."""
    x = (torch.randn(shape, device=device) + mean).to(stream)
    update = torch.randn(shape, device=device).to(dtype) if with_update else None
    gamma, weight, bias = (torch.randn(shape[-1], device=device).to(stream) for _ in range(3))
    gamma, (weight, bias) = gamma if with_gamma else None, (weight, bias) if affine else (None, None)
    return (x, update, gamma, weight, bias), (torch.randn(shape, device=device).to(stream), x.new_empty(0))


def check(shape, stream, dtype, device, backend="triton", **options):
    def case():
        inputs, (grad_stream, _) = draw(shape, stream, dtype, device, **options)
        grads = grad_stream, torch.randn(shape, device=device).to(dtype)
        exact = run([t if t is None else t.double() for t in inputs], grads, torch.float64)
        return inputs, grads, exact, [run(inputs, grads, dtype, backend) for backend in (None, "torch")]

    inputs, grads, exact, plain = case()
    with poisoned_memory():
        result = run(inputs, grads, dtype, backend)
    assert {name: t.dtype for name, t in result.items()} == {name: t.dtype for name, t in plain[1].items()}
    assert_within_twice(result, with_errors_elsewhere(plain, exact, case, 6), exact)
    return result


@pytest.mark.parametrize(("stream", "dtype"), [(SINGLE, BF16), (SINGLE, SINGLE), (BF16, BF16)])
@pytest.mark.parametrize("channels", WIDTHS)
def test_cpp_obeys_the_2x_rule(channels, stream, dtype, seed):
    check((5, channels), stream, dtype, "cpu", "auto")
    check((300, 2, channels), stream, dtype, "cpu", "auto", with_gamma=False, affine=False)
    check((1, channels), stream, dtype, "cpu", "auto", with_update=False, with_gamma=False)


def matrix():
    """Every width and pair of dtypes; those that compute like another one in three widths where there is no GPU."""
    for width, dtypes in product(WIDTHS, DTYPES):
        slow = dtypes not in (DTYPES[0], DTYPES[2]) and width not in (384, 80, 1)
        yield pytest.param(width, *dtypes, marks=pytest.mark.cuda if slow else ())


@pytest.mark.parametrize(("channels", "stream", "dtype"), list(matrix()))
def test_triton_obeys_the_2x_rule(channels, stream, dtype, device, seed):
    check((5, channels), stream, dtype, device)
    check((3, 1, channels), stream, dtype, device, with_gamma=False, affine=False)
    check((1, channels), stream, dtype, device, with_update=False, with_gamma=False)


def test_rows_far_from_zero_keep_their_variance(device, seed):
    """The mean square less the squared mean would leave none of it."""
    check((7, 192), SINGLE, SINGLE, device, mean=3000.0)


@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows_give_empty_results_and_gradients(shape, backend, device):
    inputs, _ = draw(shape, SINGLE, BF16, device)
    grads = torch.empty(shape, device=device), torch.empty(shape, device=device)
    result = run(inputs, grads, BF16, backend)
    assert all(t.shape == shape for t in result.values())


@BOTH
@pytest.mark.parametrize("used", ["stream", "normed"])
@pytest.mark.parametrize(("frozen", "with_update"), [("x", True), ("update", True), (None, True), (None, False)])
def test_gradients_of_what_is_used_reach_what_asks_for_them(frozen, used, with_update, backend, device, seed):
    inputs, (grad, _) = draw((3, 24), SINGLE, SINGLE, device, with_update=with_update, with_gamma=with_update)

    def gradients(compute, inputs):
        named = dict(zip(("x", "update"), inputs, strict=False))
        leaves = {name: t.clone().requires_grad_() for name, t in named.items() if t is not None and name != frozen}
        outputs = dict(zip(("stream", "normed"), compute({**named, **leaves}, *inputs[2:]), strict=True))
        return torch.autograd.grad(outputs[used], list(leaves.values()), grad.to(outputs[used].dtype))

    def found(tensors, *weights):
        return ours(tensors["x"], tensors["update"], *weights, SINGLE, backend)

    def exact(tensors, *weights):
        return formula(tensors["x"], tensors["update"], *weights, torch.float64)

    wanted = gradients(exact, [t if t is None else t.double() for t in inputs])
    for got, reference in zip(gradients(found, inputs), wanted, strict=True):
        torch.testing.assert_close(got.double(), reference, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 1), (1, 2), (2,), (0,)], ids=str)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_first_tokens_have_the_numbers_and_gradients_of_slices(first, used, backend, device, seed):
    """Whichever of the stream's first rows, all normalised rows and the first of them are used."""
    inputs, _ = draw((2, 3, 24), SINGLE, SINGLE, device)
    shapes = [(2, first, 24), (2, 3, 24), (2, first, 24)]
    grads = [torch.randn(shapes[number], device=device) for number in used]

    def computed(inputs, compute):
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        outputs = compute(*leaves, *inputs[2:])
        assert [tuple(y.shape) for y in outputs] == shapes
        used_ = [outputs[number] for number in used]
        return *outputs, *torch.autograd.grad(used_, leaves, [g.to(y.dtype) for g, y in zip(grads, used_, strict=True)])

    def exact(*inputs):
        stream, normed = formula(*inputs, torch.float64)
        return stream[:, :first], normed, normed[:, :first]

    def found(x, update, gamma, weight, bias):
        options = {"first": first, "update": update, "gamma": gamma, "backend": backend}
        return residual_norm_of_first(x, weight, bias, EPS, **options)

    wanted = computed([t.double() for t in inputs], exact)
    with poisoned_memory():
        eager = computed(inputs, found)
    with DeviceWork(MODULE):
        traced = computed(inputs, found)
    for got in (eager, traced):
        for t, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(t.double(), reference, rtol=1e-5, atol=1e-5)


def test_gradients_of_first_tokens_take_no_launch_and_no_operator_more(device, seed):
    inputs, _ = draw((2, 5, 24), SINGLE, BF16, device)
    x, update, gamma, weight, bias = inputs
    x, update = x.requires_grad_(), update.requires_grad_()
    outputs = residual_norm_of_first(x, weight, bias, EPS, first=1, update=update, gamma=gamma, backend="triton")
    grads = [torch.randn(y.shape, device=device).to(y.dtype) for y in outputs]
    with DeviceWork(MODULE) as work:
        torch.autograd.grad(outputs, (x, update), grads)
    assert (work.launches, work.operators) == (1, [])


@pytest.mark.parametrize("trained", ["gamma", "weight", "bias"])
def test_weights_that_ask_for_gradients_get_them_and_change_no_number(trained, device, seed):
    inputs, (grad, _) = draw((5, 24), SINGLE, BF16, device)
    grads = grad, torch.randn((5, 24), device=device).to(BF16)
    frozen = run(inputs, grads, BF16, "triton")
    names = ("gamma", "weight", "bias")
    weights = {name: t.requires_grad_(name == trained) for name, t in zip(names, inputs[2:], strict=True)}
    result = run(inputs, grads, BF16, "triton")
    for name, t in result.items():
        torch.testing.assert_close(t, frozen[name], rtol=8e-3, atol=1e-5)  # a unit in the last place of bfloat16
    x, update = inputs[:2]
    found, wanted = (
        torch.autograd.grad(
            sum((y * g.to(y.dtype)).sum() for y, g in zip(outputs, grads, strict=True)), weights[trained]
        )
        for outputs in (
            ours(x, update, *weights.values(), BF16, "triton"),
            formula(*(t.double() for t in (x, update, *weights.values())), torch.float64),
        )
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), DeviceWork(MODULE) as work:
        ours(x, update, *weights.values(), BF16, "triton")
    assert (work.launches, work.operators) == (1, [])  # nothing asks for a gradient where none is recorded


@BOTH
def test_rows_that_lie_apart_are_read_in_place(backend, device, seed):
    """As the class tokens of a batch do. Other layouts are copied."""
    inputs, (grad, _) = draw((3, 24), SINGLE, SINGLE, device)
    wanted = run(inputs, (grad, grad), SINGLE, backend)
    tokens = torch.randn(3, 5, 24, device=device)
    tokens[:, 0] = inputs[0]
    for x in (tokens[:, 0], inputs[0].T.contiguous().T):
        assert not x.is_contiguous()
        for name, t in run((x, *inputs[1:]), (grad, grad), SINGLE, backend).items():
            torch.testing.assert_close(t, wanted[name])


@pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter runs")
def test_rows_lie_further_apart_than_32_bits_hold(tmp_path, seed):
    inputs, (grad, _) = draw((3, 24), SINGLE, SINGLE, "cpu")
    wanted = run(inputs, (grad, grad), SINGLE, "triton")
    far = untouched((3, 2**30 + 7), SINGLE, tmp_path)[:, :24]
    far.copy_(inputs[0])
    for name, t in run((far, *inputs[1:]), (grad, grad), SINGLE, "triton").items():
        assert torch.equal(t, wanted[name]), name


def test_writes_stay_in_the_outputs_and_repeat_bit_for_bit(device, seed):
    inputs, (grad, _) = draw((7, 40), SINGLE, BF16, device)
    grad_normed, results = grad.to(BF16), []
    for _ in range(2):
        with canaries(MODULE, "_fake_residual_norm"):
            stream, normed, statistics = launch_residual_norm(*inputs, EPS, BF16)
        with canaries(MODULE, "_fake_residual_norm_backward"):
            args = grad, grad_normed, stream, statistics, inputs[2], inputs[3], SINGLE, BF16
            results.append((stream, normed, statistics, *launch_residual_norm_backward(*args)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_operators_pass_opcheck_and_give_the_numbers_of_eager_code(device, seed):
    inputs, (grad, _) = draw((2, 3, 24), SINGLE, BF16, device)
    grads = grad, torch.randn((2, 3, 24), device=device).to(BF16)
    for case in (inputs, (inputs[0], None, None, *inputs[3:])):
        leaves = tuple(t if t is None else t.clone().requires_grad_() for t in case[:2])
        torch.library.opcheck(residual_norm_op, (*leaves, *case[2:], EPS, BF16))
        stream, _, statistics = residual_norm_op(*case, EPS, BF16)
        stream = case[0] if case[1] is None else stream
        for wanted in ((SINGLE, BF16), (None, BF16), (SINGLE, None)):
            args = *grads, stream, statistics, case[2], case[3], *wanted
            torch.library.opcheck(residual_norm_backward_op, args)
        eager = run(case, grads, BF16, "triton")
        for name, t in zip(eager, ours(*case, BF16, "triton"), strict=False):  # where nothing asks for a gradient
            assert torch.equal(t, eager[name])
            assert not t.requires_grad
        with DeviceWork(MODULE):
            traced = run(case, grads, BF16, "triton")
        compiled = run(case, grads, BF16, "triton", torch.compile(ours, backend="aot_eager", fullgraph=True))
        for name, t in eager.items():
            torch.testing.assert_close(traced[name], t)
            torch.testing.assert_close(compiled[name], t)


@pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter runs")
def test_elements_beyond_two_to_the_31_are_addressed(tmp_path, seed):
    """Only the last rows are computed, of a batch that is that large."""
    channels, rows = 4096, 2**31 // 4096 + 3
    inputs, (grad, _) = draw((1, channels), SINGLE, BF16, "cpu")
    x, update, grad_stream = (untouched((rows, channels), t, tmp_path) for t in (SINGLE, BF16, SINGLE))
    for whole, last in ((x, inputs[0]), (update, inputs[1]), (grad_stream, grad)):
        whole[-1] = last
    fakes = "_fake_residual_norm", "_fake_residual_norm_backward"
    with only_the_last_program(MODULE), lazily_allocated(MODULE, tmp_path, *fakes):
        stream, normed, statistics = launch_residual_norm(x, update, *inputs[2:], EPS, BF16)
        args = grad_stream, update, stream, statistics, inputs[2], inputs[3], SINGLE, BF16
        grad_x, grad_update = launch_residual_norm_backward(*args)
    wanted = run(inputs, (grad, inputs[1]), BF16)
    found = {"stream": stream, "normed": normed, "grad_x": grad_x, "grad_update": grad_update}
    for name, t in found.items():
        torch.testing.assert_close(t[-1:], wanted[name], rtol=1e-2, atol=1e-4)


def test_wide_rows_are_computed_in_plain_torch_or_refused(device, seed):
    x = torch.randn(2, MAX_CHANNELS + 1, device=device)
    _, normed = residual_norm(x, None, None, EPS)
    torch.testing.assert_close(normed, formula(x, None, None, None, None, SINGLE)[1])
    with pytest.raises(ValueError, match=str(MAX_CHANNELS + 1)):
        residual_norm(x, None, None, EPS, backend="triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(())}, r"x has shape \(\)"),
        ({"x": torch.zeros(3, 0)}, r"x has shape \(3, 0\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), not \(4,\)"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta"),
        ({"update": torch.ones(4)}, r"update has shape \(4,\), not \(2, 4\)"),
        ({"gamma": torch.ones(4)}, "gamma is given without"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"x": torch.zeros(2, 4).double(), "backend": "triton"}, "does not compute torch.float64"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        residual_norm(**{"x": torch.zeros(2, 4), "weight": None, "bias": None, "eps": EPS, **arguments})


@pytest.mark.parametrize(("shape", "first"), [((4, 8), 1), ((2, 3, 8), 0), ((2, 3, 8), 4)], ids=str)
def test_a_number_of_first_tokens_that_there_are_not_is_named(shape, first):
    with pytest.raises(ValueError, match=f"first = {first}"):
        residual_norm_of_first(torch.zeros(shape), None, None, EPS, first=first)


@pytest.mark.cuda
@pytest.mark.parametrize(("stream", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("channels", [*WIDTHS, 3000, 4096])
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(channels, stream, dtype, device, seed):
    first, second = twice(lambda: check((376, channels), stream, dtype, device))
    for name in first:
        assert torch.equal(first[name], second[name]), name
