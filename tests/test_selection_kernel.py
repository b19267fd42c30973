"""Selection of the most important patches: against sorting in plain Python, on both backends, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import poisoned_memory
from smi_fast.kernels import select_tokens
from smi_fast.kernels.selection import count_mass_op, select_backward_op, select_op

BACKENDS = ["torch", "triton"]


def importance_of(attention):
    """Mean over the heads in float32, summed in their order: (B, H, N) -> (B, N), in numpy."""
    total = np.zeros(attention[:, 0].shape, np.float32)
    for head in attention.float().cpu().numpy().swapaxes(0, 1):
        total = total + head
    return total / np.float32(attention.shape[1])


def picks(attention, k=None, mass=None):
    """The indices that stay of each image: sorted in Python, with sums that are exact in integers or fractions."""
    kept = []
    for row in importance_of(attention):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        if mass is not None:
            units = fixed_point(row)
            target = float(sum(units)) * mass  # both are float64, as specified
            k, held = 0, 0
            while k == 0 or held < target:
                held += units[order[k]]
                k += 1
        kept.append(sorted(order[:k]))
    return kept


def fixed_point(row):
    """Whole multiples of a power of two for which N times the row's maximum comes just below 2^52."""
    bits, bound = 52 - (len(row) - 1).bit_length(), Fraction(2) ** -126
    while bound <= Fraction(float(row.max())):
        bound *= 2
    return [int(Fraction(float(x)) / bound * 2**bits) for x in row]


def selected(attention, values=None, backend="torch", prefix=0, **how):
    with poisoned_memory():
        return select_tokens(attention, values, num_prefix_tokens=prefix, backend=backend, **how)


def assert_picks(attention, backend, prefix=0, **how):
    """Positions, lengths and tokens of the selection agree with the sorted pick."""
    batch, _, candidates = attention.shape
    device = attention.device
    values = torch.randn(batch, prefix + candidates, 3, device=device)
    result = selected(attention, values, backend, prefix, **how)
    kept = [[*range(-prefix, 0), *row] for row in picks(attention, **how)]
    assert result.positions.tolist() == [p for row in kept for p in row]
    assert result.cu_seqlens.tolist() == [0, *np.cumsum([len(row) for row in kept]).tolist()]
    assert result.max_seqlen == max(len(row) for row in kept)
    assert result.positions.dtype == result.cu_seqlens.dtype == torch.int32
    expected = torch.cat([values[b, torch.tensor(row, device=device) + prefix] for b, row in enumerate(kept)])
    assert torch.equal(result.values, expected)


@st.composite
def attentions(draw):
    """(B, H, N) of few distinct values (many ties), of any values, or of uniform noise."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    candidates = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 49, 100])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["ties", "equal", "noise", "spread", "zeros", "sparse"]))
    noise = torch.rand(batch, heads, candidates, generator=generator)
    attention = {
        "ties": (noise * 4).round() / 4,
        "equal": torch.ones_like(noise) * noise[:, :, :1],
        "noise": noise,
        "spread": torch.exp(noise * 120 - 60),
        "zeros": noise * 0,
        "sparse": noise * (noise > 0.8),
    }[kind]
    return attention.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))).clamp(max=60000)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(attention=attentions(), data=st.data())
def test_top_k_picks_what_sorting_picks(backend, attention, data):
    k = data.draw(st.integers(1, attention.shape[-1]))
    assert_picks(attention, backend, prefix=data.draw(st.integers(0, 2)), k=k)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(attention=attentions(), data=st.data())
def test_mass_picks_the_fewest_that_hold_it(backend, attention, data):
    mass = data.draw(st.one_of(st.sampled_from([1.0, 0.5, 0.25, 0.9, 1e-30]), st.floats(1e-6, 1)))
    assert_picks(attention, backend, prefix=data.draw(st.integers(0, 2)), mass=mass)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [1, 196, 4096])
def test_k_of_one_of_all_and_of_many_patches(backend, candidates, device, seed):
    attention = (torch.randn(1, 2, candidates, device=device) * 64).round()  # negative ones too, and many ties
    for k in {1, candidates, max(1, candidates // 3)}:
        assert_picks(attention, backend, prefix=1, k=k)
    assert_picks(attention.abs() + 1, backend, mass=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_zero_ties_with_zero_and_infinities_are_ordered(backend, device):
    row = torch.tensor([-0.0, 0.0, -torch.inf, -0.0, -1e-45, 1e-45, torch.inf, 0.0], device=device)
    for k, expected in enumerate(([6], [5, 6], [0, 5, 6], [0, 1, 5, 6], [0, 1, 3, 5, 6], [0, 1, 3, 5, 6, 7]), 1):
        assert selected(row[None], k=k, backend=backend).positions.tolist() == expected
    zeros = torch.full((1, 3, 5), -0.0, device=device)
    assert selected(zeros, mass=0.5, backend=backend).positions.tolist() == [0]


def test_backends_agree_bit_for_bit_where_rounding_decides(device, seed):
    """Sums over heads that differ in the last bit, or in nothing but the order of summation."""
    noise = torch.rand(2, 7, 100, device=device) * 1e-6 + 1
    attention = torch.cat([noise, noise.flip(1)], -1)
    for how in ({"k": 50}, {"k": 199}, {"mass": 0.3}, {"mass": 0.999}):
        ours, theirs = (selected(attention, backend=backend, **how) for backend in BACKENDS)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{"k": 5}, {"mass": 0.6}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_flow_to_the_tokens_that_stay_as_in_plain_indexing(backend, how, dtype, device, seed):
    attention = torch.rand(3, 2, 20, device=device, requires_grad=True)
    values = torch.randn(3, 21, 40, device=device).to(dtype).requires_grad_()
    result = select_tokens(attention, values, num_prefix_tokens=1, backend=backend, **how)
    weight = torch.randn(40, len(result.positions), device=device).to(dtype).mT  # its gradient is not contiguous
    with poisoned_memory():
        (grad,) = torch.autograd.grad(result.values, values, weight, retain_graph=True)
    image = torch.repeat_interleave(torch.arange(3, device=device), result.cu_seqlens.diff())
    (expected,) = torch.autograd.grad(values[image, result.positions + 1], values, weight)
    assert torch.equal(grad, expected)
    assert torch.autograd.grad(result.values.sum(), attention, allow_unused=True)[0] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_are_carried_along_whatever_the_strides(backend, device, seed):
    attention = torch.rand(12, 3, 2, device=device).permute(2, 1, 0)  # (2, 3, 12)
    values = torch.randn(8, 14, 2, device=device).permute(2, 1, 0)  # (2, 14, 8)
    grid = torch.stack([torch.randperm(50, device=device)[:12] for _ in range(2)])
    result = select_tokens(attention, values, grid, k=4, num_prefix_tokens=2, backend=backend)
    kept = picks(attention, k=4)
    for b, row in enumerate(kept):
        index = torch.tensor(row, device=device)
        assert result.positions[b * 6 : b * 6 + 6].tolist() == [-2, -1, *grid[b, index].tolist()]
        assert torch.equal(result.values[b * 6 + 2 : b * 6 + 6], values[b, index + 2])
    alone = select_tokens(attention[:, 0], positions=grid, k=4, backend=backend)  # (B, N) is one head
    kept = picks(attention[:, :1], k=4)
    assert alone.values is None
    assert alone.positions.tolist() == [p for b, row in enumerate(kept) for p in grid[b, row].tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{"k": 2}, {"mass": 0.5}], ids=str)
def test_an_empty_batch_gives_empty_results(backend, how, device):
    values = torch.zeros(0, 5, 3, device=device, requires_grad=True)
    result = select_tokens(torch.zeros(0, 2, 4, device=device), values, num_prefix_tokens=1, backend=backend, **how)
    assert result.values.shape == (0, 3)
    assert result.positions.shape == (0,)
    assert result.cu_seqlens.tolist() == [0]
    result.values.sum().backward()
    assert values.grad.shape == values.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bad", "how"),
    [(torch.nan, {"k": 1}), (torch.nan, {"mass": 0.5}), (-1.0, {"mass": 0.5}), (torch.inf, {"mass": 0.5})],
)
def test_invalid_importance_is_an_error_that_names_the_row(backend, bad, how):
    attention = torch.rand(4, 2, 6)
    attention[2, 1, 3] = bad
    with pytest.raises(ValueError, match="row 2"):
        select_tokens(attention, backend=backend, **how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0 is outside 1..6"),
        ({"k": 7}, "k=7 is outside 1..6"),
        ({"k": None, "mass": 0.0}, "mass=0.0"),
        ({"k": None, "mass": 1.5}, "mass=1.5"),
        ({"k": None, "mass": float("nan")}, "mass=nan"),
        ({"k": None}, "exactly one"),
        ({"mass": 0.5}, "exactly one"),
        ({"attention": torch.rand(2, 1, 4097)}, "4097"),
        ({"attention": torch.rand(2, 1, 6).double()}, "float64"),
        ({"attention": torch.rand(2)}, r"\(2,\)"),
        ({"values": torch.rand(2, 5, 3)}, r"\(2, 5, 3\)"),
        ({"values": torch.zeros(2, 6, 3, dtype=torch.int32)}, "int32"),
        ({"positions": torch.zeros(2, 5, dtype=torch.int32)}, r"\(2, 5\)"),
        ({"positions": torch.zeros(2, 6)}, "float32"),
        ({"num_prefix_tokens": 1}, "num_prefix_tokens=1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"attention": torch.rand(2, 1, 6), "k": 3, **changes}
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments)


def test_definition_passes_gradcheck_in_float64(seed):
    attention, values = torch.rand(2, 1, 4), torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    for how in ({"k": 2}, {"mass": 0.6}):
        assert torch.autograd.gradcheck(
            lambda v, how=how: select_tokens(attention, v, num_prefix_tokens=1, **how).values, (values,)
        )


def test_operators_pass_opcheck(device, seed):
    attention = torch.rand(2, 2, 5, device=device)
    values = torch.randn(2, 6, 3, device=device, requires_grad=True)
    positions = torch.arange(10, device=device).view(2, 5)
    torch.library.opcheck(select_op, (attention, values, positions, None, 2, 0.0, 1, 6))
    torch.library.opcheck(select_op, (attention, None, None, None, 2, 0.0, 0, 4))
    torch.library.opcheck(count_mass_op, (attention, 0.7, 1))
    starts = torch.nn.functional.pad(count_mass_op(attention, 0.7, 1)[0].cumsum(0), (1, 0)).int()
    torch.library.opcheck(select_op, (attention, values, None, starts, 0, 0.7, 1, int(starts[-1])))
    slots = select_op(attention, values, None, None, 2, 0.0, 1, 6)[3]
    torch.library.opcheck(select_backward_op, (torch.randn(6, 3, device=device), slots))


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_compiles_without_graph_breaks_to_the_same_numbers(backend, device, seed):
    attention = torch.rand(2, 2, 12, device=device)
    values = torch.randn(2, 13, 4, device=device, requires_grad=True)

    def function(a, v):
        result = select_tokens(a * 2, v * 2, k=5, num_prefix_tokens=1, backend=backend)
        return result.values * 3, result.positions

    out, positions = torch.compile(function, fullgraph=True, backend="aot_eager")(attention, values)
    expected, expected_positions = function(attention, values)
    assert torch.equal(out, expected)
    assert torch.equal(positions, expected_positions)
    grad, expected_grad = (torch.autograd.grad(x.square().sum(), values)[0] for x in (out, expected))
    assert torch.equal(grad, expected_grad)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("candidates", [1, 2, 15, 16, 17, 49, 196, 197, 576, 1024, 1025, 4096])
def test_gpu_picks_what_the_cpu_picks_and_repeats_bit_for_bit(candidates, dtype, device, seed):
    attention = torch.rand(16, 12, candidates, device=device).to(dtype)
    values = torch.randn(16, 2 + candidates, 200, device=device, requires_grad=True)
    for how in ({"k": 1}, {"k": candidates}, {"k": (candidates + 1) // 2}, {"mass": 0.9}, {"mass": 0.1}):
        first, second, theirs = (selected(attention, values, b, 2, **how) for b in ("triton", "triton", "torch"))
        cpu = selected(attention.cpu(), values.cpu(), "torch", 2, **how)
        for ours in (first, second, theirs):
            assert torch.equal(ours.positions.cpu(), cpu.positions)
            assert torch.equal(ours.cu_seqlens.cpu(), cpu.cu_seqlens)
            assert torch.equal(ours.values.cpu(), cpu.values)
            assert ours.max_seqlen == cpu.max_seqlen


@pytest.mark.cuda
def test_gpu_selects_top_k_without_synchronising(device, seed):
    attention = torch.rand(4, 6, 196, device=device)
    values = torch.randn(4, 197, 64, device=device, requires_grad=True)
    for backend in BACKENDS:
        select_tokens(attention, values, k=46, num_prefix_tokens=1, backend=backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_tokens(attention, values, k=46, num_prefix_tokens=1, backend=backend).values.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
