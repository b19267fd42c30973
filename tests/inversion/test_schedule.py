"""When patches stop: schedules, and the texts that they are read from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smi_fast import StoppingSchedule


def test_the_papers_schedule_keeps_the_published_counts():
    assert list(StoppingSchedule.paper().patches(196).items()) == [(50, 137), (100, 95), (200, 66), (300, 46)]


def test_a_scaled_schedule_stops_at_the_same_shares():
    assert StoppingSchedule.paper(8000) == StoppingSchedule({100: 0.3, 200: 0.3, 400: 0.3, 600: 0.3})
    assert StoppingSchedule.paper(4000) == StoppingSchedule.paper()


@given(st.integers(1, 200))
def test_a_schedule_scales_to_any_number_of_iterations(iterations):
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
def test_text_that_is_no_schedule_is_refused_by_its_part(text):
    with pytest.raises(ValueError, match="cannot read"):
        StoppingSchedule.parse(text)


def test_a_schedule_that_leaves_no_patch_is_refused():
    with pytest.raises(ValueError, match="leaves no patch: at iteration 2"):
        StoppingSchedule({1: 0.5, 2: 0.6}).patches(4)
