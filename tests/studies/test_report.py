"""Tables of stages: their numbers, and how they are written."""

import pytest
import torch

from smi_fast import InvertedDataset
from smi_fast.inversion.inverter import Stage
from smi_fast.inversion.meter import StageCost
from smi_fast.studies.report import as_text, stage_records, stage_table, what_was_done

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


@pytest.mark.parametrize(
    ("keep", "patch", "report", "there", "not_there"),
    [
        ([[0], [3]], 4, {"iterations": [9, 9]}, ["9 iterations", "least important", "1 of 4", "75%"], ["up to"]),
        ([[0], [3]], 4, {"iterations": [5, 9]}, ["up to 9 iterations"], []),
        ([[0, 1], [2, 3]], 4, {"stopping": "5:release=2"}, ["most important patches left", "50%"], ["least"]),
        (None, 4, {}, ["4 patches of 4x4 pixels"], ["important", "sparsity"]),
        (None, 8, {}, ["1 iteration so"], ["patch"]),
    ],
    ids=["sparse", "until", "rebirth", "dense", "CNN"],
)
def test_a_text_says_what_was_done(keep, patch, report, there, not_there):
    keep = None if keep is None else torch.tensor(keep)
    dataset = InvertedDataset.from_images(torch.rand(2, 3, 8, 8), keep, torch.tensor([0, 7]), (patch, patch))
    images = {"iterations": report.get("iterations", [1, 1])}
    text = " ".join(what_was_done({"model": "mine"} | report | {"images": images}, dataset))
    assert "2 images of 2 classes, made from the weights of mine alone" in text
    assert [part for part in there if part not in text] == []
    assert [part for part in not_there if part in text] == []
