"""compiled.txt says what each configuration of the dispatch table uses of a GPU. None of them has a fault."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from smi_fast.kernels.dispatch import choose, padded_head_dim, table

BENCH = Path(__file__).parents[2] / "bench"
TABLE = Path(__file__).with_name("compiled.txt")
MODULES = [
    "attention",
    "class_attention",
    "cross_entropy",
    "embedding",
    "mlp",
    "norm",
    "patch_entropy",
    "patches",
    "pixels",
    "selection",
]
ARCHITECTURES = ("sm_80", "sm_90")  # the others are compiled in samples; bench/compile_report.py compiles all
SAMPLE = """
import json, random, sys
from pathlib import Path
from resources import MULTIPROCESSORS, configurations, measured, read_table

if __name__ == "__main__":
    random.seed(int(sys.argv[2]))
    written = {row[:3]: row for row in read_table(Path(sys.argv[1]))}
    there = configurations(MULTIPROCESSORS)
    for key in random.sample(sorted(written), 2) + random.sample(sorted(there.keys() - written.keys()), 2):
        (use,) = measured({key: there[key]})
        print(json.dumps([written.get(key, use), use, use.faults()]))
"""


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("resources")


def test_the_table_has_every_kernel_and_configuration(resources):
    """Those that the dispatch table can choose, and no others, on the architectures that have lines of their own."""
    rows = resources.read_table(TABLE)
    assert {row[:3] for row in rows} == set(resources.configurations(ARCHITECTURES))
    assert len({row[:3] for row in rows}) == len(rows)
    kernels = {
        f"{module}.{name[1:].removesuffix('_kernel')}"
        for module in MODULES
        for name in vars(sys.modules[f"smi_fast.kernels.{module}"])
        if name.endswith("_kernel")
    }
    assert {row.kernel for row in rows} == kernels


def test_no_configuration_spills_or_exceeds_the_shared_memory(resources):
    """And half precision runs on tensor cores, on sm_90 by wgmma."""
    rows = resources.read_table(TABLE)
    faults = [f"{row}: {', '.join(row.faults())}" for row in rows if row.faults()]
    assert not faults, "\n".join(faults)
    half = [row for row in rows if row.kernel.startswith("attention.") and row.config.startswith("half")]
    assert half
    assert [row for row in half if "none" in row.tensor_core] == []


def test_the_table_says_what_the_compiler_says(resources, seed):
    """A fresh sample, compiled in all that its kernels are specialised to; half of it on other architectures."""
    if resources.versions() not in TABLE.read_text():
        pytest.skip(f"{resources.versions()} are not the versions that the table was written with")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", SAMPLE, str(TABLE), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(pairs) == 4
    for written, compiled, faults in pairs:
        assert written == compiled
        assert not faults


@pytest.mark.parametrize("dtype", ["half", "float32"])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 64, 128])
def test_every_architecture_dtype_head_dim_and_length_has_a_row(dtype, head_dim, monkeypatch):
    from smi_fast.kernels import dispatch

    for arch, operations in table().items():
        assert operations["source"]
        monkeypatch.setattr(dispatch, "architecture", lambda device, arch=arch: arch)
        for operation in [name for name in operations if "attention" in name]:
            for size in (0, 1, 47, 197, 4096):
                _, constants = choose(operation, None, size, dtype=dtype, head_dim=padded_head_dim(head_dim))
                assert constants
