"""The entropy of patch similarities: against its formula in float64, on both backends."""

import sys
from itertools import product

import pytest
import torch
from kernel_cases import (
    DeviceWork,
    assert_within_twice,
    canaries,
    cu_seqlens_of,
    poisoned_memory,
    twice,
    with_errors_elsewhere,
)
from smi_fast.kernels import patch_entropy
from smi_fast.kernels.patch_entropy import (
    launch_patch_entropy,
    launch_patch_entropy_backward,
    patch_entropy_backward_op,
    patch_entropy_op,
    patch_entropy_reference,
)
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
MODULE = sys.modules[patch_entropy.__module__]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x, positions, lengths, bandwidth=0.01, points=10, diagonal=True):
    """Image by image, in the dtype of x."""
    batch = []
    for tokens, at in zip(x.split(lengths), positions.split(lengths), strict=True):
        a = (tokens.mean(1) if x.dim() == 3 else tokens)[at >= 0]
        norms = a.square().sum(1).sqrt()
        similarities = a @ a.T / (norms[:, None] * norms)
        off = ~torch.eye(len(a), dtype=torch.bool, device=x.device)
        batch.append(similarities.flatten() if diagonal else similarities[off])
    lowest, highest = (bound(torch.cat(batch)).detach() for bound in (torch.min, torch.max))
    entropies, step = [], (highest - lowest) / (points - 1)
    for similarities in batch:
        q = torch.stack(
            [Normal(lowest + k * step, bandwidth).log_prob(similarities).exp().mean() for k in range(points)]
        )
        f = -(q + 1e-4) * (q + 1e-4).log()
        entropies.append(step * (f.sum() - (f[0] + f[-1]) / 2))
    return torch.stack(entropies)


def inputs(lengths, shape, dtype, device, spread=0.5, prefix=1):
    """Tokens that have some similarity; the first of each sequence are prefix tokens."""
    x = spread * torch.randn(sum(lengths), *shape, device=device) + torch.randn(shape[-1], device=device)
    positions = torch.cat([torch.arange(-prefix, n - prefix) for n in lengths]).to(device, torch.int32)
    return x.to(dtype), positions, torch.linspace(1, 2, len(lengths), device=device)


def run(x, positions, lengths, grad, compute, **options):
    x = x.detach().requires_grad_()
    if compute is formula:
        out = formula(x, positions, lengths, **options)
    else:
        out = compute(x, positions, cu_seqlens_of(lengths, x.device), max(lengths), **options)
    return {"out": out.detach(), "grad": torch.autograd.grad(out, x, grad.to(out.dtype))[0]}


def definition(x, positions, cu_seqlens, max_seqlen, bandwidth=0.01, points=10, diagonal=True):
    return patch_entropy_reference(x, positions, cu_seqlens, max_seqlen, bandwidth, points, diagonal)


def check(lengths, shape, dtype, device, backend, draws=3, **options):
    """Assert that entropies and gradient obey the 2x rule, and return them."""

    def draw():
        x, positions, grad = inputs(lengths, shape, dtype, device)
        exact = run(x.double(), positions, lengths, grad, formula, **options)
        return x, positions, grad, exact, [run(x, positions, lengths, grad, definition, **options)]

    x, positions, grad, exact, plain = draw()
    with poisoned_memory():
        found = run(x, positions, lengths, grad, patch_entropy, backend=backend, **options)
    assert (found["out"].dtype, found["out"].shape, found["grad"].dtype) == (torch.float32, (len(lengths),), dtype)
    assert_within_twice(found, with_errors_elsewhere(plain, exact, draw, draws), exact)
    return found


def matrix():
    """Every dtype and number of channels, where there is no GPU only some of them."""
    for backend, dtype, channels in product(["torch", "triton"], DTYPES, [8, 32, 48, 64, 72, 80, 88, 96, 128]):
        few = (48, 128) if backend == "torch" or dtype != torch.float32 else (8, 48, 64, 128)
        yield pytest.param(backend, dtype, channels, marks=() if channels in few else pytest.mark.cuda)


@pytest.mark.parametrize(("backend", "dtype", "channels"), list(matrix()))
def test_entropies_and_gradient_obey_the_2x_rule(backend, dtype, channels, device, seed):
    check([33, 2, 34, 32], (2, channels), dtype, device, backend)


@BOTH
@pytest.mark.parametrize("options", [{"diagonal": False}, {"bandwidth": 0.1}, {"points": 2}, {"points": 17}], ids=str)
def test_options_and_other_shapes_obey_the_2x_rule_too(options, backend, device, seed):
    check([20, 40, 3], (3, 24), torch.float32, device, backend, 16, **options)
    check([35, 35], (24,), torch.float32, device, backend, 16, **options)


@pytest.mark.parametrize("tile", [1, 300, 1 << 15])
def test_tiles_of_any_size_give_the_same(tile, device, seed, monkeypatch):
    monkeypatch.setattr(MODULE, "TILE", tile)
    check([20, 9, 20], (2, 16), torch.float32, device, "torch")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[197] * 32, [47] * 128, [197, 1000, 2, 65]], ids=lambda lengths: str(len(lengths)))
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(lengths, dtype, device, seed):
    first, second = twice(lambda: check(lengths, (6, 64), dtype, device, "triton"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("diagonal", [True, False])
def test_derivatives_of_both_orders_pass_gradcheck(diagonal, seed):
    """Beside an image of opposite patches, whose similarities of -1 and 1 are the batch's bounds."""
    pair = torch.ones(1, 1, 4, dtype=torch.float64)
    fixed, positions = torch.cat((pair, -pair, pair)), torch.tensor([0, 1, 2, -1, 0, 1, 2]).int()
    x = torch.randn(4, 1, 4, dtype=torch.float64, requires_grad=True)
    assert (torch.cosine_similarity(x[1:, 0, None], x[None, 1:, 0], dim=-1) - torch.eye(3)).abs().max() < 0.99

    def entropies(x):
        x = torch.cat((fixed, x)).expand(-1, 2, -1)
        return patch_entropy(x, positions, cu_seqlens_of([3, 4]), 4, bandwidth=0.4, points=6, diagonal=diagonal)

    assert torch.autograd.gradcheck(entropies, x)
    assert torch.autograd.gradgradcheck(entropies, x)


@BOTH
def test_gradients_of_gradients_are_those_of_the_definition(backend, device, seed):
    x, positions, _ = inputs([9, 4], (2, 8), torch.float32, device)
    second = []
    for compute in (definition, lambda *args: patch_entropy(*args, backend=backend)):
        leaf = x.clone().requires_grad_()
        out = compute(leaf, positions, cu_seqlens_of([9, 4], device), 9).sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*second)


@BOTH
@pytest.mark.parametrize("lengths", [[12, 12], [12, 30]], ids=str)
def test_tokens_at_negative_positions_change_nothing_wherever_they_are(lengths, backend, device, seed):
    x, positions, grad = inputs(lengths, (2, 16), torch.float32, device)
    positions[[3, 15]] = -2
    patches = positions >= 0
    fewer = [int(part.sum()) for part in patches.split(lengths)]
    found = run(x, positions, lengths, grad, patch_entropy, backend=backend)
    alone = run(x[patches], positions[patches], fewer, grad, patch_entropy, backend=backend)
    torch.testing.assert_close(found["out"], alone["out"])
    scale = alone["grad"].abs().max().item()  # a narrow kernel's derivatives magnify rounding
    torch.testing.assert_close(found["grad"][patches], alone["grad"], rtol=1e-4, atol=1e-4 * scale)
    assert (found["grad"][~patches] == 0).all()


@BOTH
@pytest.mark.parametrize("shape", [(2, 1), (1, 7)], ids=["one patch", "equal patches"])
def test_similarities_that_are_all_equal_have_no_entropy(shape, backend, device, seed):
    images, patches = shape
    x = torch.randn(images, 1, 1, 16, device=device).expand(-1, patches, -1, -1).flatten(0, 1).clone()
    positions = torch.arange(patches, device=device).repeat(images).int()
    found = run(x, positions, [patches] * images, torch.ones(images, device=device), patch_entropy, backend=backend)
    torch.testing.assert_close(found["out"], torch.zeros(images, device=device), rtol=0, atol=1e-4)
    assert found["grad"].abs().max() < 1e-2


@BOTH
def test_without_the_diagonal_an_image_of_one_patch_has_density_0(backend, device, seed):
    x, positions, grad = inputs([5, 1], (8,), torch.float32, device, prefix=0)
    found = run(x, positions, [5, 1], grad, patch_entropy, diagonal=False, backend=backend)
    similarities = torch.cosine_similarity(x[:5, None], x[None, :5], dim=2)[~torch.eye(5, dtype=torch.bool)]
    width = similarities.max() - similarities.min()
    torch.testing.assert_close(found["out"][1], -width * 1e-4 * torch.tensor(1e-4).log(), rtol=1e-4, atol=0)
    assert (found["grad"][5] == 0).all()


@BOTH
def test_a_row_of_zeros_has_the_gradient_of_the_definition(backend, device, seed):
    x, positions, grad = inputs([6], (2, 8), torch.float32, device, prefix=0)
    x[2] = 0
    expected = run(x, positions, [6], grad, definition, bandwidth=0.3)
    found = run(x, positions, [6], grad, patch_entropy, bandwidth=0.3, backend=backend)
    assert expected["grad"][2].abs().max() > 1e3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@BOTH
def test_no_matrix_of_similarities_is_kept_for_the_backward_pass(backend, device, seed):
    n = 64
    x, positions, _ = inputs([n, n], (2, 8), torch.float32, device)
    kept = {}
    for name, compute in (("definition", definition), ("ours", lambda *args: patch_entropy(*args, backend=backend))):
        leaf, saved = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            compute(leaf, positions, cu_seqlens_of([n, n], device), n)
        kept[name] = sum(saved)
    assert kept["ours"] < 2 * x.numel() < 2 * n * n < kept["definition"]


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator has returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().size() // result.itemsize)
        return result


def test_plain_torch_holds_a_tile_at_a_time_in_both_passes(seed, monkeypatch):
    monkeypatch.setattr(MODULE, "TILE", 1000)
    x, positions, grad = inputs([200], (8,), torch.float32, "cpu")
    with Largest() as largest:
        run(x, positions, [200], grad, patch_entropy, backend="torch")
    assert 1000 <= largest.elements <= 10 * 1000


def test_operators_pass_opcheck_and_give_the_numbers_of_eager_code(device, seed):
    x, positions, grad = inputs([5, 3], (2, 8), torch.float32, device)
    cu_seqlens = cu_seqlens_of([5, 3], device)
    arguments = x.clone().requires_grad_(), positions, cu_seqlens, 5, 0.05, 4, True
    torch.library.opcheck(patch_entropy_op, arguments)
    _, *statistics = patch_entropy_op(x, *arguments[1:])
    torch.library.opcheck(patch_entropy_backward_op, (grad, x, positions, cu_seqlens, *statistics, 5, 0.05))
    options = {"bandwidth": 0.05, "points": 4}
    for backend in ("torch", "triton"):
        eager = run(x, positions, [5, 3], grad, patch_entropy, **options, backend=backend)
        compiled = torch.compile(patch_entropy, backend="aot_eager", fullgraph=True)
        found = run(x, positions, [5, 3], grad, compiled, **options, backend=backend)
        for name, t in eager.items():
            torch.testing.assert_close(found[name], t, rtol=0 if backend == "triton" else 1e-4, atol=1e-6)
    with DeviceWork(MODULE) as work:
        traced = run(x, positions, [5, 3], grad, patch_entropy, **options, backend="triton")
    assert (work.launches, work.operators) == (5, ["cumsum"])  # of the test
    for name, t in eager.items():
        assert torch.equal(traced[name], t)


def test_transforms_of_torch_func_compute_the_definition(device, seed):
    x, positions, _ = inputs([6, 6], (2, 8), torch.float32, device)
    cu_seqlens = cu_seqlens_of([6, 6], device)
    for backend in ("torch", "triton"):
        found = torch.func.grad(lambda x: patch_entropy(x, positions, cu_seqlens, 6, backend=backend).sum())(x)  # noqa: B023
        expected = run(x, positions, [6, 6], torch.ones(2, device=device), definition)["grad"]
        torch.testing.assert_close(found, expected)


def test_writes_stay_in_the_outputs(device, seed):
    x, positions, grad = inputs([5, 33, 3], (2, 24), torch.float32, device)
    cu_seqlens = cu_seqlens_of([5, 33, 3], device)
    with canaries(MODULE, "_fake_outputs"):
        _, *statistics = launch_patch_entropy(x, positions, cu_seqlens, 33, 0.01, 10, True)
    with canaries(MODULE, "_fake_patch_entropy_backward"):
        launch_patch_entropy_backward(grad, x, positions, cu_seqlens, *statistics, 33, 0.01)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3)}, r"x has shape \(3,\)"),
        ({"x": torch.zeros(0, 2, 4)}, r"x has shape \(0, 2, 4\)"),
        ({"x": torch.zeros(3, 4).int()}, "x has dtype torch.int32"),
        ({"positions": torch.zeros(3).long()}, "positions is .* torch.int64"),
        ({"positions": torch.zeros(2).int()}, r"positions is \(2,\)"),
        ({"positions": torch.zeros(3, device="meta").int()}, "positions is on meta"),
        ({"cu_seqlens": torch.zeros(1).int()}, r"cu_seqlens is \(1,\)"),
        ({"cu_seqlens": torch.zeros(2).long()}, "cu_seqlens is .* torch.int64"),
        ({"max_seqlen": 0}, "max_seqlen 0"),
        ({"max_seqlen": 2}, "3 tokens are more than 1 sequences of up to 2"),
        ({"bandwidth": 0.0}, "bandwidth must be positive and finite, got 0.0"),
        ({"bandwidth": float("nan")}, "bandwidth .* nan"),
        ({"points": 1}, "points must be from 2 to 64, got 1"),
        ({"points": 65}, "got 65"),
        ({"x": torch.zeros(3, 4).double(), "backend": "triton"}, "does not compute torch.float64"),
        ({"x": torch.zeros(3, 136), "backend": "triton"}, "136 channels"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changed, message):
    usual = {"x": torch.zeros(3, 2, 4), "positions": torch.arange(3).int(), "cu_seqlens": torch.tensor([0, 3]).int()}
    with pytest.raises(ValueError, match=message):
        patch_entropy(**{**usual, "max_seqlen": 3, **changed})


def test_more_channels_than_the_kernels_compute_have_an_entropy_too(seed):
    x, positions, grad = inputs([9, 4], (2, 136), torch.float64, "cpu")
    found = run(x.float(), positions, [9, 4], grad, patch_entropy)
    torch.testing.assert_close(
        found["out"].double(), run(x, positions, [9, 4], grad, formula)["out"], rtol=1e-3, atol=0
    )
