"""The benchmarks' own arithmetic: contestants in turn, tables that say what was measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
CPU = torch.device("cpu")

TINY_BENCHMARK = """
from dataclasses import dataclass
from functools import partial
import pytest, torch
from duel import OURS

@dataclass(frozen=True)
class Case:
    size: int
    def __str__(self):
        return f"{self.size} x {self.size}"

@pytest.mark.contest(contestants=[OURS, "twice", "absent"], cpu=[Case(8), Case(64)], cuda=[])
def test_product(case, device, enter):
    def contestants():
        x = torch.rand(case.size, case.size, device=device)
        def twice():
            x @ x
            return x @ x
        return {OURS: lambda: x @ x, "twice": twice, "absent": "not installed"}
    enter("product", contestants, tolerance=1e-6, rounds=5)
"""


@pytest.fixture
def duel(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("duel")


def test_contestants_take_turns_and_each_has_its_own_times(duel):
    calls = []

    def measured(call):
        return [call() or {"smi-fast": 1.0, "peer": 3.0}[calls[-1]]]

    contestants = {name: lambda name=name: calls.append(name) for name in ("smi-fast", "peer")}
    outcomes = duel.duel(contestants, device=CPU, rounds=4, memory=False, measure=measured)
    assert outcomes["smi-fast"].seconds == (1.0,) * 4
    assert outcomes["peer"].median == 3.0
    in_turn = calls[2:]  # behind the check
    assert in_turn == ["smi-fast", "peer", "peer", "smi-fast"] * 2


def test_a_contestant_that_computes_something_else_is_refused(duel):
    ones = torch.ones(3)
    with pytest.raises(AssertionError, match="peer: output 0 is off by"):
        duel.duel({"smi-fast": lambda: ones, "peer": lambda: ones + 1e-2}, device=CPU, tolerance=1e-3, rounds=1)


def test_a_peer_that_cannot_run_is_absent_with_its_reason(duel):
    def fails():
        raise RuntimeError("no such kernel\nlong story")

    outcomes = duel.duel({"smi-fast": lambda: None, "peer": fails, "other": "not installed"}, device=CPU, rounds=1)
    assert outcomes["peer"].absent == "RuntimeError: no such kernel"
    assert outcomes["other"].absent == "not installed"
    assert not outcomes["peer"].seconds
    with pytest.raises(RuntimeError, match="no such kernel"):
        duel.duel({"smi-fast": fails}, device=CPU, rounds=1)


def test_peak_counts_what_is_held_at_once_not_what_passes_through(duel):
    def call():
        for _ in range(3):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(1 << 20, dtype=torch.uint8)
            del first, second

    assert 2 << 20 <= duel.peak_bytes(call, CPU) < 3 << 20


def test_tables_hold_the_medians_and_ratios_of_the_benchmark_json(tmp_path):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    for name in ("conftest.py", "duel.py"):
        (tmp_path / name).write_text((BENCH / name).read_text())
    (tmp_path / "bench_tiny.py").write_text(TINY_BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    run = [sys.executable, "-m", "pytest", "-q", "--bench-device=cpu", "--benchmark-json=results.json", "--threads=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine_info"]["threads"] == 1
    assert "node" not in results["machine_info"]
    assert len(results["benchmarks"]) == 4

    report = subprocess.run(
        [sys.executable, str(BENCH / "report.py"), "results.json", "--markdown"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "1 thread;" in report.splitlines()[0]
    for size in ("8 x 8", "64 x 64"):
        entries = {
            entry["extra_info"]["contestant"]: entry
            for entry in results["benchmarks"]
            if entry["group"] == f"product: {size}"
        }
        assert list(entries) == ["smi-fast", "twice"]
        table = report.split(f"### product: {size}\n")[1].split("###")[0]
        rows = {cells[1]: cells[2:] for cells in ([c.strip() for c in r.split("|")] for r in table.splitlines() if r)}
        for name, entry in entries.items():
            stats, data = entry["stats"], sorted(entry["stats"]["data"])
            assert stats["rounds"] == 5
            assert stats["median"] == data[2]
            ratio = data[2] / sorted(entries["smi-fast"]["stats"]["data"])[2]
            assert entry["extra_info"]["ratio"] == pytest.approx(ratio)
            assert entry["extra_info"]["median_ms"] == pytest.approx(data[2] * 1e3)
            assert float(rows[name][0]) == pytest.approx(data[2] * 1e3, rel=1e-3)
            assert float(rows[name][2]) == pytest.approx(ratio, abs=0.006)
