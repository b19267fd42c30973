"""Which patches go on: the highest scores, by fraction or by mass, whatever the scores are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inversion_cases import small_model

from smi_fast import Inverter, Mass, select_patches
from smi_fast.packed import pack_keep


def kept_after(model, seed, select, stop=0.5):
    """The patches that go on at the only stopping, and the importance that the iteration before has measured."""
    states = {}
    inverter = Inverter(model, stopping={2: stop}, select=select, iterations=4, progress=False)
    result = inverter.run([0, 1, 2], seed, lambda step: states.setdefault(step.iteration, step.state_dict()))
    return result.keep, states[1]["importance"].view(3, 16)


def test_attention_keeps_the_highest_and_lowest_the_least(seed):
    model = small_model()
    for select, descending in (("attention", True), ("lowest", False)):
        keep, importance = kept_after(model, seed, select)
        expected = importance.sort(dim=1, descending=descending, stable=True).indices[:, :8].sort(1).values
        assert torch.equal(keep, expected)


def test_random_patches_follow_from_the_seed_alone(seed):
    model, other = small_model(), small_model()
    keep, importance = kept_after(model, seed, "random")
    assert torch.equal(keep, kept_after(other, seed, "random")[0])
    assert not torch.equal(keep, kept_after(model, seed + 1, "random")[0])
    assert not torch.equal(keep, importance.argsort(1, descending=True)[:, :8].sort(1).values)


def test_a_function_of_the_users_decides(seed):
    def leftmost(importance, keep):
        assert importance.shape == keep.positions.shape
        return -(keep.positions % 4).float()

    keep, _ = kept_after(small_model(), seed, leftmost)
    assert keep.tolist() == [[0, 1, 4, 5, 8, 9, 12, 13]] * 3
    few, _ = kept_after(small_model(), seed, lambda importance, keep: (keep.positions < 5).float(), Mass(1.0))
    assert [row.tolist() for row in few] == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(
    ("select", "stop", "message"),
    [
        ("highest", 0.5, "'highest'"),
        (5, 0.5, "5"),
        ("lowest", Mass(0.5), "lowest"),
        (lambda importance, keep: importance[1:], 0.5, r"\(47,\).*\(48,\)"),
        (lambda importance, keep: 3, 0.5, "a int"),
        (lambda importance, keep: importance * float("nan"), 0.5, "NaN"),
        (lambda importance, keep: importance - 1, Mass(0.5), "negative"),
    ],
    ids=["unknown", "number", "lowest of mass", "short", "no tensor", "nan", "negative mass"],
)
def test_a_wrong_selection_is_refused_with_its_value(seed, select, stop, message):
    with pytest.raises(ValueError, match=message):
        kept_after(small_model(), seed, select, stop)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1), st.booleans())
def test_the_highest_are_kept_and_a_tie_goes_to_the_first(count, fraction, seed, ties):
    attention = torch.rand(3, count, generator=torch.Generator().manual_seed(seed))
    attention = (attention * 4).floor() if ties else attention
    keep = torch.stack([torch.randperm(200)[:count] for _ in range(3)])
    kept = select_patches(attention, keep, fraction=fraction)
    number = max(1, int(count * (1 - fraction)))
    for row in range(3):
        best = sorted(range(count), key=lambda i: (-attention[row, i].item(), i))[:number]
        assert kept[row].tolist() == [int(keep[row, i]) for i in sorted(best)]


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 2**32 - 1))
def test_mass_keeps_the_fewest_patches_that_reach_it(count, mass, seed):
    attention = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).softmax(1)
    for row, kept in enumerate(select_patches(attention, mass=mass)):
        ordered = attention[row].double().sort(descending=True).values
        reach = ordered.cumsum(0) / ordered.sum()
        near = 1e-6  # rounding may decide only where the sum is this close
        assert reach[len(kept) - 1] >= mass - near
        assert len(kept) == 1 or reach[len(kept) - 2] < mass + near
        assert set(attention[row][kept].tolist()) == set(ordered[: len(kept)].float().tolist())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([{"fraction": 0.4}, {"mass": 0.6}]))
def test_ragged_images_are_selected_one_by_one(lengths, options):
    attention, keep = torch.rand(sum(lengths)), [torch.randperm(50)[:n] for n in lengths]
    for part, row, kept in zip(attention.split(lengths), keep, select_patches(attention, keep, **options), strict=True):
        alone = select_patches(part[None], row[None], **options)[0]
        assert torch.equal(kept, alone)
        assert set(kept.tolist()) <= set(row.tolist())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([{"fraction": 0.4}, {"mass": 0.6}]))
def test_a_packed_keep_equals_its_list(lengths, options):
    attention, keep = torch.rand(sum(lengths)), [torch.randperm(50)[:n] for n in lengths]
    packed = pack_keep(keep, len(lengths), 50, torch.device("cpu"))
    for ours, theirs in zip(
        select_patches(attention, packed, **options), select_patches(attention, keep, **options), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_no_images_are_selected_from_as_an_empty_list():
    assert select_patches(torch.rand(0), [], fraction=0.5) == []


def test_a_list_of_equal_lengths_equals_its_batch():
    attention, keep = torch.rand(3, 6), torch.stack([torch.randperm(50)[:6] for _ in range(3)])
    assert torch.equal(
        select_patches(attention, list(keep), fraction=0.5), select_patches(attention, keep, fraction=0.5)
    )


def test_packed_attention_needs_the_list_that_it_is_packed_by():
    with pytest.raises(ValueError, match="as a list"):
        select_patches(torch.rand(5), fraction=0.5)
    with pytest.raises(ValueError, match="4 patches, attention is of 5"):
        select_patches(torch.rand(5), [torch.arange(2), torch.arange(2)], fraction=0.5)
    with pytest.raises(ValueError, match="no patch in row 1"):
        select_patches(torch.rand(2), [torch.arange(2), torch.arange(0)], fraction=0.5)


def test_nan_importance_is_an_error():
    attention = torch.rand(2, 5)
    attention[1, 3] = float("nan")
    with pytest.raises(ValueError, match="1"):
        select_patches(attention, fraction=0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_selects_a_fraction_without_synchronising(packed, device):
    attention, keep = torch.rand(9, device=device), [torch.arange(n, device=device) for n in (2, 7)]
    if packed:
        attention, keep = attention[:8], pack_keep(torch.arange(8, device=device).view(2, 4), 2, 8, device)
    select_patches(attention, keep, fraction=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_patches(attention, keep, fraction=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.3, "mass": 0.5}, {"fraction": 0.0}, {"fraction": 1.0}, {"mass": 1.5}]
)
def test_wrong_amounts_are_refused(options):
    with pytest.raises(ValueError, match=r"fraction|share"):
        select_patches(torch.rand(2, 5), **options)


def test_a_keep_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        select_patches(torch.rand(2, 5), torch.zeros(2, 4, dtype=torch.long), fraction=0.5)


@pytest.mark.parametrize("wrong", [torch.bool, torch.float32, list])
def test_a_keep_that_holds_no_indices_is_refused(wrong):
    rows = [[0, 1, 1], [1, 0, 1]] if wrong is list else torch.tensor([[0, 1, 1], [1, 0, 1]]).to(wrong)
    for keep in (list(rows), *([] if wrong is list else [rows])):
        with pytest.raises(ValueError, match=str(wrong.__name__ if wrong is list else wrong)):
            select_patches(torch.rand(2, 3), keep, fraction=0.5)


def test_images_without_patches_are_refused():
    with pytest.raises(ValueError, match="0 patches"):
        select_patches(torch.rand(2, 0), fraction=0.5)
