"""StoppingSchedule and select_patches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fast import StoppingSchedule, kernels, select_patches, stopping
from smi_fast.packed import pack_keep


def test_the_papers_schedule_keeps_the_published_numbers_of_patches():
    assert list(StoppingSchedule.paper().patches(196).items()) == [(50, 137), (100, 95), (200, 66), (300, 46)]


def test_the_scaled_schedule_stops_at_the_same_share_of_the_iterations():
    assert StoppingSchedule.paper(8000) == StoppingSchedule({100: 0.3, 200: 0.3, 400: 0.3, 600: 0.3})
    assert StoppingSchedule.paper(4000) == StoppingSchedule.paper()


@given(st.integers(1, 200))
def test_a_scaled_schedule_is_valid_for_any_number_of_iterations(iterations):
    assert all(1 <= stop < iterations for stop in StoppingSchedule.paper(iterations).stops)


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0.01, 0.99), max_size=5))
def test_a_schedule_is_read_as_it_is_printed(stops):
    schedule = StoppingSchedule(sorted((k, round(v, 3)) for k, v in stops.items()))
    assert StoppingSchedule.parse(str(schedule)) == schedule
    assert StoppingSchedule.parse("paper") == StoppingSchedule.paper()
    assert StoppingSchedule.parse(" paper ", 600) == StoppingSchedule({8: 0.3, 15: 0.3, 30: 0.3, 45: 0.3})


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ({100: 0.3, 50: 0.3}, "50 after 100"),
        ([(50, 0.3), (50, 0.3)], "50 after 50"),
        ({50: 0.0}, "got 0.0"),
        ({50: 1.0}, "got 1.0"),
        ({50: float("nan")}, "got nan"),
        ({0: 0.3}, "iteration 0"),
        ({-3: 0.3}, "iteration -3"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_value(stops, message):
    with pytest.raises(ValueError, match=message):
        StoppingSchedule(stops)


def test_an_iteration_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match=r"2\.5"):
        StoppingSchedule({2.5: 0.3})


@pytest.mark.parametrize("text", ["50", "50:x", "a:0.3", "", "50:0.3,", "50=0.3"])
def test_text_that_is_no_schedule_is_refused_with_the_part_that_is_wrong(text):
    with pytest.raises(ValueError, match="cannot read"):
        StoppingSchedule.parse(text)


def test_a_schedule_that_leaves_no_patch_is_refused():
    with pytest.raises(ValueError, match="leaves no patch: at iteration 2"):
        StoppingSchedule({1: 0.5, 2: 0.6}).patches(4)


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
def test_images_that_keep_different_numbers_are_selected_one_by_one(lengths, options):
    attention, keep = torch.rand(sum(lengths)), [torch.randperm(50)[:n] for n in lengths]
    for part, row, kept in zip(attention.split(lengths), keep, select_patches(attention, keep, **options), strict=True):
        alone = select_patches(part[None], row[None], **options)[0]
        assert torch.equal(kept, alone)
        assert set(kept.tolist()) <= set(row.tolist())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([{"fraction": 0.4}, {"mass": 0.6}]))
def test_a_packed_keep_is_taken_as_the_list_that_it_was_made_of(lengths, options):
    attention, keep = torch.rand(sum(lengths)), [torch.randperm(50)[:n] for n in lengths]
    packed = pack_keep(keep, len(lengths), 50, torch.device("cpu"))
    for ours, theirs in zip(
        select_patches(attention, packed, **options), select_patches(attention, keep, **options), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"fraction": 0.4}, {"mass": 0.6}])
def test_images_that_keep_different_numbers_take_one_selection(options, monkeypatch):
    calls = []
    monkeypatch.setattr(stopping, "select_tokens", lambda *args, **kwargs: calls.append(1) or select(*args, **kwargs))
    select = kernels.select_tokens
    assert len(select_patches(torch.rand(9), [torch.arange(2), torch.arange(7)], **options)) == 2
    assert len(calls) == 1


def test_no_images_are_selected_from_as_an_empty_list():
    assert select_patches(torch.rand(0), [], fraction=0.5) == []


def test_a_list_of_equally_many_patches_is_selected_as_the_batch_it_is():
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
def test_gpu_stops_a_fraction_of_ragged_images_without_synchronising(packed, device):
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
    with pytest.raises(ValueError, match=r"fraction|mass"):
        select_patches(torch.rand(2, 5), **options)


def test_a_keep_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        select_patches(torch.rand(2, 5), torch.zeros(2, 4, dtype=torch.long), fraction=0.5)
