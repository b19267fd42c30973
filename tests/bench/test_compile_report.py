"""The compiler report: it sees faults, counts what fits a multiprocessor, and keeps a table that can be read back."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
PLANTED = """
import json
from launches import launches
from resources import compiled

if __name__ == "__main__":
    half = {"up_to": 4096, "dtype": "half", "head_dim": 128, "form": "blocks"}
    spilling = {**half, "BM": 128, "BN": 128, "num_warps": 4, "num_stages": 1}
    large = {**half, "BM": 64, "BN": 128, "num_warps": 8, "num_stages": 5}
    without_wgmma = {**half, "BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}
    for row in spilling, large, without_wgmma:
        launch = launches("attention_forward", row, plainest=True)[0]
        print(json.dumps([compiled(launch, arch).faults() for arch in ("sm_80", "sm_90")]), flush=True)
"""


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def resources(bench):
    return bench("resources")


def test_planted_faults_are_caught():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", PLANTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilling, large, without_wgmma = map(json.loads, done.stdout.splitlines())
    for faults in spilling:
        assert any("bytes of stack" in fault for fault in faults)
    for faults in large:
        assert any("bytes of shared memory" in fault for fault in faults)
    assert without_wgmma[0] == []
    assert any("not wgmma" in fault for fault in without_wgmma[1])


KERNEL, CONFIG = "attention.tile_forward", "half BD=64 BN=64 num_warps=4"


def report(bench, resources, monkeypatch, uses, *options):
    """The exit status of the report, where the compiler finds these usages."""
    monkeypatch.setattr(resources, "configurations", lambda archs, kernels: {})
    monkeypatch.setattr(resources, "measured", lambda found, processes: uses)
    monkeypatch.setattr(sys, "argv", ["compile_report.py", *options])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return bench("compile_report").main()


def test_a_fault_is_printed_and_fails_the_report(bench, resources, monkeypatch, capsys):
    sound = resources.Usage(KERNEL, CONFIG, "sm_80", 80, 0, 1024, "mma.sync")
    assert report(bench, resources, monkeypatch, [sound]) == 0
    assert report(bench, resources, monkeypatch, [sound, sound._replace(stack_bytes=8)]) == 1
    assert "8 bytes of stack" in capsys.readouterr().out


def test_an_unknown_architecture_is_named(bench, resources, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        report(bench, resources, monkeypatch, [], "--arch", "sm_90,sm_42")
    assert "sm_42" in capsys.readouterr().err


def test_the_table_keeps_what_was_not_compiled_now(bench, resources, monkeypatch, tmp_path):
    path = tmp_path / "table.txt"
    before = [
        resources.Usage(KERNEL, CONFIG, arch, registers, 0, 24576, core)
        for arch, registers, core in (("sm_80", 80, "mma.sync"), ("sm_86", 80, "mma.sync"), ("sm_90", 78, "wgmma"))
    ]
    other = resources.Usage("patches.gather", "BT=8 BE=256 num_warps=4", "sm_90", 32, 0, 0, "none")
    resources.write_table(path, [other, *before])
    assert sorted(resources.read_table(path)) == sorted([*before, other])
    assert sum(KERNEL in line for line in path.read_text().splitlines()) == 2  # two architectures share a line

    now = before[2]._replace(registers=90)
    options = "--arch", "sm_90", "--kernels", "attention.", "--table", str(path)
    assert report(bench, resources, monkeypatch, [now], *options) == 0
    assert sorted(resources.read_table(path)) == sorted([*before[:2], now, other])
    monkeypatch.setattr(resources, "versions", lambda: "Triton of tomorrow")
    assert report(bench, resources, monkeypatch, [now], *options) == 0
    assert resources.read_table(path) == [now]


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_bytes", "expected"),
    [
        ("sm_90", 4, 32, 0, 1.0),  # 64 warps of 1024 registers are all that there are
        ("sm_90", 4, 64, 0, 0.5),
        ("sm_90", 4, 80, 0, 24 / 64),  # 6 programs of 4 warps of 2560 registers
        ("sm_80", 8, 168, 0, 8 / 64),
        ("sm_80", 4, 32, 40 * 1024, 4 * 4 / 64),  # 4 programs of 41 of 164 KiB
        ("sm_89", 4, 40, 0, 48 / 48),
        ("sm_86", 1, 32, 0, 16 / 48),  # 16 programs at most
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(arch, num_warps, registers, shared_bytes, expected, resources):
    use = resources.Usage(KERNEL, f"BN=32 num_warps={num_warps}", arch, registers, 0, shared_bytes, "none")
    assert use.occupancy == pytest.approx(expected)
