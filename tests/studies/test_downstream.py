"""Table 5 counts what it takes to reach the dense run's best accuracy."""

from dataclasses import replace
from types import SimpleNamespace

from smi_fast.studies.downstream import table5
from smi_fast.studies.page import Section


def test_table_5_counts_to_the_dense_best(tiny):
    curves = {
        "dense inversion": [[10.0, 30.0, 20.0], [50.0, 40.0, 45.0]],
        "sparse inversion, 4 rounds": [[30.0, 5.0, 99.0, 0.0], [1.0] * 4],
    }
    speeds = {"dense": 2.0, "sparse": 8.0}
    run = SimpleNamespace(
        settings=replace(tiny, rounds=3, more_rounds=4, samples=10, inversion=replace(tiny.inversion, iterations=40)),
        section=lambda name, make: Section("", "", {}, [], curves=curves),
        inverted=lambda variant, *_: SimpleNamespace(metadata={"iterations_per_second": speeds[variant.name]}),
        dense=SimpleNamespace(name="dense"),
        sparse=SimpleNamespace(name="sparse"),
    )
    assert table5(run).rows == [
        ["dense", [20, 10], [80, 40], [40.0, 20.0]],
        ["sparse", [10, None], [40, None], [5.0, None]],
    ]
