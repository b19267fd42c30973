"""Selection of the most important patches, compared with sorting in plain Python, on both backends, bit for bit."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DeviceWork, cu_seqlens_of, poisoned_memory
from smi_fast.kernels import select_tokens, selection
from smi_fast.kernels.selection import count_mass_op, select_backward_op, select_op

BACKENDS = ["torch", "triton"]


def importance_of(attention):
    """The mean over the heads in float32, added in their order, in numpy: (B, H, N) to (B, N)."""
    total = np.zeros(attention[:, 0].shape, np.float32)
    for head in attention.float().cpu().numpy().swapaxes(0, 1):
        total = total + head
    return total / np.float32(attention.shape[1])


def picks(attention, k=None, mass=None):
    """The indices that stay in each image, sorted in Python, with sums that are exact in integers or fractions.

    `k` is one number for all images, or a list with a number for each image.
    """
    counts = k if isinstance(k, list) else [k] * len(attention)
    kept = []
    for b, row in enumerate(importance_of(attention)):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        count = counts[b]
        if mass is not None:
            units = fixed_point(row)
            target = float(sum(units)) * mass  # both are float64, as specified
            count, held = 0, 0
            while count == 0 or held < target:
                held += units[order[count]]
                count += 1
        kept.append(sorted(order[:count]))
    return kept


def fixed_point(row):
    """Importance in units of 2^-40 times the power of two above the row's maximum, rounded down."""
    bound = Fraction(2) ** -126
    while bound <= Fraction(float(row.max())):
        bound *= 2
    return [int(Fraction(float(x)) / bound * 2**40) for x in row]


def selected(attention, values=None, backend="torch", prefix=0, **how):
    with poisoned_memory():
        return select_tokens(attention, values, num_prefix_tokens=prefix, backend=backend, **how)


def assert_picks(attention, backend, prefix=0, **how):
    """Positions, lengths and tokens of the selection agree with those that sorting picks."""
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
    """Attention (B, H, N) with few distinct values (many ties), with any values, or of uniform noise."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    candidates = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 49, 100])))
    return draw(importances((batch, heads, candidates)))


@st.composite
def importances(draw, shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["ties", "equal", "noise", "spread", "zeros", "sparse"]))
    noise = torch.rand(shape, generator=generator)
    attention = {
        "ties": (noise * 4).round() / 4,
        "equal": torch.ones_like(noise) * noise[..., :1],
        "noise": noise,
        "spread": torch.exp(noise * 120 - 60),
        "zeros": noise * 0,
        "sparse": noise * (noise > 0.8),
    }[kind]
    return attention.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))).clamp(max=60000)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(attention=attentions(), data=st.data())
def test_top_k_is_sorting(backend, attention, data):
    k = data.draw(st.integers(1, attention.shape[-1]))
    assert_picks(attention, backend, prefix=data.draw(st.integers(0, 2)), k=k)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(attention=attentions(), data=st.data())
def test_mass_keeps_the_fewest_that_hold_it(backend, attention, data):
    mass = data.draw(st.one_of(st.sampled_from([1.0, 0.5, 0.25, 0.9, 1e-30]), st.floats(1e-6, 1)))
    assert_picks(attention, backend, prefix=data.draw(st.integers(0, 2)), mass=mass)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(attention=attentions(), data=st.data())
def test_a_count_for_each_image(backend, attention, data):
    counts = data.draw(st.lists(st.integers(1, attention.shape[-1]), min_size=len(attention), max_size=len(attention)))
    assert_picks(attention, backend, prefix=data.draw(st.integers(0, 2)), k=counts)


def assert_picks_packed(attention, lengths, backend, prefix, channels=3, grid=None, **how):
    """Each packed sequence is selected as it would be alone: positions, lengths, tokens and gradient."""
    device, cu_seqlens = attention.device, cu_seqlens_of(lengths, attention.device)
    values = torch.randn(sum(lengths), channels, device=device, requires_grad=True)
    result = selected(
        attention, values, backend, prefix, positions=grid, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), **how
    )
    rows, kept_lengths, start = [], [], 0
    for b, part in enumerate(attention.split(lengths, 1)):
        of_image = {name: value[b : b + 1] if isinstance(value, list) else value for name, value in how.items()}
        (kept,) = picks(part[None, :, prefix:], **of_image)
        rows += [*range(start, start + prefix), *(start + prefix + i for i in kept)]
        kept_lengths.append(prefix + len(kept))
        start += lengths[b]
    rows = torch.tensor(rows, device=device)
    if grid is None:
        grid = torch.cat([torch.arange(length, device=device) - prefix for length in lengths])
    assert torch.equal(result.positions, grid[rows].int())
    assert torch.equal(result.cu_seqlens, cu_seqlens_of(kept_lengths, device))
    assert result.lengths == kept_lengths
    assert result.max_seqlen == max(kept_lengths)
    assert torch.equal(result.values, values[rows])
    weight = torch.randn_like(result.values)
    with poisoned_memory():
        (grad,) = torch.autograd.grad(result.values, values, weight)
    assert torch.equal(grad, torch.zeros_like(values).index_put((rows,), weight))


def draw_amount(data, candidates):
    """How much stays: a number for all sequences, a number for each, or a mass."""
    return data.draw(
        st.one_of(
            st.integers(1, min(candidates)).map(lambda k: {"k": k}),
            st.tuples(*(st.integers(1, n) for n in candidates)).map(lambda k: {"k": list(k)}),
            st.floats(1e-6, 1).map(lambda mass: {"mass": mass}),
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_packed_sequences_are_selected_independently(backend, data):
    lengths = st.one_of(st.integers(1, 9), st.integers(1, 300), st.sampled_from([31, 32, 33, 255, 256, 257]))
    candidates = data.draw(st.lists(lengths, min_size=1, max_size=4))
    prefix, heads = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 5))
    lengths = [prefix + n for n in candidates]
    attention = data.draw(importances((heads, sum(lengths))))
    grid = torch.randperm(sum(lengths)) - 5 if data.draw(st.booleans()) else None
    channels = data.draw(st.sampled_from([1, 3, 4, 8, 40, 72]))
    assert_picks_packed(attention, lengths, backend, prefix, channels, grid, **draw_amount(data, candidates))


@pytest.mark.cuda
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_gpu_selects_packed_sequences_independently(data):
    candidates = data.draw(st.lists(st.one_of(st.integers(1, 300), st.integers(1, 4096)), min_size=1, max_size=6))
    prefix, heads = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 16))
    lengths = [prefix + n for n in candidates]
    attention = data.draw(importances((heads, sum(lengths)))).cuda()
    channels = data.draw(st.sampled_from([1, 3, 4, 8, 40, 192, 200, 384, 768]))
    assert_picks_packed(attention, lengths, "triton", prefix, channels, **draw_amount(data, candidates))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_to_prefix_tokens_is_ignored(backend, device, seed):
    attention = torch.rand(2, 3 * 7, device=device)
    packed = {"cu_seqlens": cu_seqlens_of([7] * 3, device), "max_seqlen": 7}
    plain = [selected(attention, None, backend, 2, **packed, **how) for how in ({"k": 3}, {"mass": 0.6})]
    attention[:, [0, 1, 7, 8, 14, 15]] = torch.tensor([torch.nan, -1, torch.inf, 9, -torch.inf, 0], device=device)
    for how, before in zip(({"k": 3}, {"mass": 0.6}), plain, strict=True):
        assert torch.equal(selected(attention, None, backend, 2, **packed, **how).positions, before.positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{"k": 3}, {"k": [1, 2, 3]}, {"mass": 0.5}], ids=str)
def test_packed_equals_dense(backend, how, device, seed):
    attention, values = torch.rand(3, 2, 9, device=device), torch.randn(3, 10, 8, device=device)
    dense = selected(attention, values, backend, 1, **how)
    flat = torch.nn.functional.pad(attention, (1, 0), value=7.0).transpose(0, 1).flatten(1)
    packed = selected(
        flat, values.flatten(0, 1), backend, 1, cu_seqlens=cu_seqlens_of([10] * 3, device), max_seqlen=10, **how
    )
    for ours, theirs in zip(dense, packed, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("how", "launches"), [({"k": 3}, 1), ({"k": [1, 2]}, 1), ({"mass": 0.7}, 2)], ids=str)
def test_known_counts_take_one_launch_and_mass_two(how, launches, packed, device, monkeypatch):
    attention, values = torch.rand(2, 3, 5, device=device), torch.randn(2, 6, 4, device=device, requires_grad=True)
    layout = {}
    if packed:
        attention, values = torch.rand(3, 12, device=device), torch.randn(12, 4, device=device, requires_grad=True)
        layout = {"cu_seqlens": cu_seqlens_of([6, 6], device), "max_seqlen": 6}
    monkeypatch.setattr(selection, "INTERPRETED", False)  # interpreted kernels are checked by further operators
    with DeviceWork(selection) as work:
        result = select_tokens(attention, values, num_prefix_tokens=1, backend="triton", **layout, **how)
    assert work.launches == launches
    assert work.operators == [] or "mass" in how
    weight = torch.ones_like(result.values)
    with DeviceWork(selection) as work:
        torch.autograd.grad(result.values, values, weight)
    assert work.launches == 1
    assert work.operators == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("candidates", [1, 196, 4096])
def test_k_of_one_some_and_all(backend, candidates, device, seed):
    attention = (torch.randn(1, 2, candidates, device=device) * 64).round()  # negative ones too, and many ties
    for k in {1, candidates, max(1, candidates // 3)}:
        assert_picks(attention, backend, prefix=1, k=k)
    assert_picks(attention.abs() + 1, backend, mass=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_below_a_unit_does_not_count(backend, device):
    row = torch.tensor([1e-20, 1.0, 3e-20, 0.0, 0.5, 2e-20], device=device)  # below 2^-40 of the maximum
    assert_picks(row[None, None], backend, mass=1.0)
    assert selected(row[None], mass=1.0, backend=backend).positions.tolist() == [1, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_tie_and_infinities_are_ordered(backend, device):
    row = torch.tensor([-0.0, 0.0, -torch.inf, -0.0, -1e-45, 1e-45, torch.inf, 0.0], device=device)
    for k, expected in enumerate(([6], [5, 6], [0, 5, 6], [0, 1, 5, 6], [0, 1, 3, 5, 6], [0, 1, 3, 5, 6, 7]), 1):
        assert selected(row[None], k=k, backend=backend).positions.tolist() == expected
    zeros = torch.full((1, 3, 5), -0.0, device=device)
    assert selected(zeros, mass=0.5, backend=backend).positions.tolist() == [0]


def test_backends_agree_where_rounding_decides(device, seed):
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
def test_gradients_equal_those_of_indexing(backend, how, dtype, device, seed):
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
def test_positions_are_kept_for_any_strides(backend, device, seed):
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
    packed = select_tokens(
        torch.zeros(2, 0, device=device), torch.zeros(0, 3, device=device), num_prefix_tokens=1, backend=backend,
        cu_seqlens=cu_seqlens_of([], device), max_seqlen=0, **({"k": []} if "k" in how else how),
    )  # fmt: skip
    assert packed.values.shape == (0, 3)
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.max_seqlen == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bad", "how"),
    [(torch.nan, {"k": 1}), (torch.nan, {"mass": 0.5}), (-1.0, {"mass": 0.5}), (torch.inf, {"mass": 0.5})],
)
def test_invalid_importance_is_refused_by_row(backend, bad, how):
    attention = torch.rand(4, 2, 6)
    attention[2, 1, 3] = bad
    with pytest.raises(ValueError, match="row 2"):
        select_tokens(attention, backend=backend, **how)
    packed = {"cu_seqlens": cu_seqlens_of([6] * 4), "max_seqlen": 6}
    with pytest.raises(ValueError, match="row 2"):
        select_tokens(attention.transpose(0, 1).flatten(1), backend=backend, **packed, **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{"k": 3}, {"k": [2, 3, 4]}, {"mass": 0.5}], ids=str)
def test_too_few_candidates_are_refused_by_row(backend, how):
    lengths = [3, 1, 5] if "mass" in how else [4, 3, 5]
    with pytest.raises(ValueError, match="row 1"):
        select_tokens(
            torch.rand(sum(lengths)), torch.rand(sum(lengths), 2), num_prefix_tokens=1, backend=backend,
            cu_seqlens=cu_seqlens_of(lengths), max_seqlen=5, **how,
        )  # fmt: skip


PACKED = {"attention": torch.rand(12), "cu_seqlens": cu_seqlens_of([6, 6]), "max_seqlen": 6}


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
        ({"k": [3]}, "1 counts for 2 images"),
        ({"k": [3, 0]}, "k=0 is outside 1..6"),
        ({"k": [7, 3]}, "k=7 is outside 1..6"),
        ({"max_seqlen": 6}, "max_seqlen=6"),
        ({"cu_seqlens": cu_seqlens_of([6, 6])}, "max_seqlen=None"),
        ({**PACKED, "attention": torch.rand(2, 1, 6)}, r"\(2, 1, 6\), not \(\[heads"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 6, 12])}, "int64"),
        ({**PACKED, "max_seqlen": 4097}, "4097"),
        ({**PACKED, "k": 7}, "k=7 is outside 1..6"),
        ({**PACKED, "k": [3, 3, 3]}, "3 counts for 2 images"),
        ({**PACKED, "values": torch.rand(11, 3)}, r"\(11, 3\), not \(12, channels\)"),
        ({**PACKED, "positions": torch.zeros(10, dtype=torch.int32)}, r"\(10,\), not \(12,\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"attention": torch.rand(2, 1, 6), "k": 3, **changes}
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments)


def test_definition_passes_gradcheck(seed):
    attention, values = torch.rand(2, 1, 4), torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    packed = {"cu_seqlens": cu_seqlens_of([3, 7]), "max_seqlen": 7}
    for how in ({"k": 2}, {"mass": 0.6}, {"k": [1, 3]}):
        for a, v, layout in ((attention, values, {}), (torch.rand(1, 10), values.detach().flatten(0, 1), packed)):
            assert torch.autograd.gradcheck(
                lambda v, a=a, how=how, layout=layout: select_tokens(a, v, num_prefix_tokens=1, **layout, **how)[0],
                (v.requires_grad_(),),
            )


def test_operators_pass_opcheck(device, seed):
    attention = torch.rand(2, 2, 5, device=device)
    values = torch.randn(2, 6, 3, device=device, requires_grad=True)
    positions = torch.arange(10, device=device).view(2, 5)
    torch.library.opcheck(select_op, (attention, values, positions, None, None, None, 2, 1, 6, 6))
    torch.library.opcheck(select_op, (attention, None, None, None, None, None, 2, 0, 5, 4))
    torch.library.opcheck(count_mass_op, (attention, None, 0.7, 1, 6))
    counts, limits = count_mass_op(attention, None, 0.7, 1, 6)
    starts = counts.cumsum(0).int()
    torch.library.opcheck(select_op, (attention, values, None, None, starts, limits, 0, 1, 6, int(starts[-1])))
    slots = select_op(attention, values, None, None, None, None, 2, 1, 6, 6)[3]
    torch.library.opcheck(select_backward_op, (torch.randn(6, 3, device=device), slots))
    attention, cu_seqlens = torch.rand(2, 9, device=device), cu_seqlens_of([3, 6], device)
    values, starts = torch.randn(9, 3, device=device, requires_grad=True), cu_seqlens_of([2, 4], device)
    torch.library.opcheck(count_mass_op, (attention, cu_seqlens, 0.7, 1, 6))
    torch.library.opcheck(select_op, (attention, values, None, cu_seqlens, starts, None, 0, 1, 6, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [5, [5, 3]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_top_k_compiles_to_the_same_numbers(packed, k, backend, device, seed):
    attention = torch.rand(2, 2, 12, device=device)
    values = torch.randn(2, 13, 4, device=device)
    layout = {}
    if packed:
        attention, values = torch.rand(2, 26, device=device), values.flatten(0, 1)
        layout = {"cu_seqlens": cu_seqlens_of([10, 16], device), "max_seqlen": 16}
    values.requires_grad_()

    def function(a, v):
        values, positions, *_ = select_tokens(a * 2, v * 2, k=k, num_prefix_tokens=1, backend=backend, **layout)
        return values * 3, positions

    out, positions = torch.compile(function, fullgraph=True, backend="aot_eager")(attention, values)
    expected, expected_positions = function(attention, values)
    assert torch.equal(out, expected)
    assert torch.equal(positions, expected_positions)
    grad, expected_grad = (torch.autograd.grad(x.square().sum(), values)[0] for x in (out, expected))
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("how", [{"k": 40}, {"k": [7, 90, 1]}, {"mass": 0.8}], ids=str)
def test_repeats_have_the_same_bits(how, device, seed):
    attention = (torch.rand(3, 5, 100, device=device) * 50).round()
    values = torch.randn(3, 101, 24, device=device).bfloat16().requires_grad_()
    results = []
    for _ in range(3):
        result = selected(attention, values, "triton", 1, **how)
        weight = torch.arange(result.values.numel(), device=device).view_as(result.values).bfloat16()
        results.append((*result[:3], torch.autograd.grad(result.values, values, weight)[0]))
    for result in results[1:]:
        for first, again in zip(results[0], result, strict=True):
            assert torch.equal(first, again)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("candidates", [1, 2, 15, 16, 17, 49, 196, 197, 576, 1024, 1025, 4096])
def test_gpu_equals_cpu_and_repeats(candidates, dtype, device, seed):
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
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [46, [46, 1, 196, 7]], ids=str)
def test_gpu_selects_known_counts_without_synchronising(k, packed, device, seed):
    attention = torch.rand(4, 6, 196, device=device)
    values = torch.randn(4, 197, 64, device=device, requires_grad=True)
    layout = {}
    if packed:
        attention, values = torch.rand(6, 4 * 197, device=device), values.detach().flatten(0, 1).requires_grad_()
        layout = {"cu_seqlens": cu_seqlens_of([197] * 4, device), "max_seqlen": 197}
    for backend in BACKENDS:
        select_tokens(attention, values, k=k, num_prefix_tokens=1, backend=backend, **layout)
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_tokens(attention, values, k=k, num_prefix_tokens=1, backend=backend, **layout)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_selects_mass_with_one_synchronisation(backend, device, seed):
    attention, values = torch.rand(4, 6, 196, device=device), torch.randn(4, 197, 64, device=device)
    select_tokens(attention, values, mass=0.9, num_prefix_tokens=1, backend=backend)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            select_tokens(attention, values, mass=0.9, num_prefix_tokens=1, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("how", [{"k": 46}, {"k": [46, 1, 196, 7]}], ids=str)
def test_gpu_runs_one_kernel_for_known_counts(how, device, seed):
    attention, values = torch.rand(4, 6, 196, device=device), torch.randn(4, 197, 64, device=device)
    select_tokens(attention, values, num_prefix_tokens=1, backend="triton", **how)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        select_tokens(attention, values, num_prefix_tokens=1, backend="triton", **how)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in on_device if not name.startswith("Mem")]) == 1
