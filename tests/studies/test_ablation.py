"""The schedules of Tables 6 and 7 stop 77 % of the patches, at the paper's iterations."""

import pytest

from smi_fast.studies.ablation import scaled
from smi_fast.studies.paper import ITERATIONS, TABLE7


@pytest.mark.parametrize("stops", TABLE7)
def test_a_schedule_of_the_paper_stops_77_percent(stops):
    schedule = scaled(stops, ITERATIONS)
    assert tuple(schedule.stops.items()) == stops
    [*_, left] = schedule.patches(196).values()
    assert 0.76 <= 1 - left / 196 <= 0.775


def test_a_scaled_schedule_keeps_its_order():
    assert dict(scaled(((30, 0.3), (70, 0.3), (150, 0.3), (200, 0.3)), 100).stops) == {1: 0.3, 2: 0.3, 4: 0.3, 5: 0.3}
    assert list(scaled(((50, 0.4), (150, 0.6)), 20).stops) == [1, 2]
