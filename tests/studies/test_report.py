"""Tables of stages: their numbers, and how they are written."""

import pytest

from smi_fast.inversion.inverter import Stage
from smi_fast.inversion.meter import StageCost
from smi_fast.studies.report import as_text, stage_records, stage_table

COSTS = [
    StageCost(Stage(0, 8, 64, 65), 8, 1.6, 5.0, peak_memory=3 * 2**20, flops=4 * 10**9, flops_paper=7 * 10**9),
    StageCost(Stage(8, 100, 14, 15), 92, 4.6, 20.0, peak_memory=2**20, flops=10**9, flops_paper=2 * 10**9),
]


def test_a_record_has_the_stages_costs():
    dense, sparse = stage_records(COSTS)
    assert dense == {
        "start": 0, "end": 8, "patches": 64, "tokens": 65, "pooling": 1, "iterations_per_second": pytest.approx(5),
        "speedup_over_dense": 1, "gflop_per_iteration": 4, "gflop_paper": 7, "peak_memory_bytes": 3 * 2**20,
    }  # fmt: skip
    assert sparse["iterations_per_second"] == pytest.approx(20)
    assert sparse["speedup_over_dense"] == pytest.approx(4)


def test_a_table_has_a_line_for_each_stage():
    _, dense, sparse = (line.split() for line in stage_table(COSTS).splitlines())
    assert dense == ["0-7", "64", "65", "5.0", "4.00", "7.00", "3", "MiB", "1.00x"]
    assert sparse == ["8-99", "14", "15", "20.0", "1.00", "2.00", "1", "MiB", "4.00x"]


def test_cells_are_aligned_to_the_right():
    assert as_text([("a", "bb"), ("ccc", "d")]) == "  a  bb\nccc   d"
