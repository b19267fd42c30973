"""Every kernel compiles without a fault in every configuration that the dispatch table can choose, without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from smi_fast.kernels import compile as compiling
from smi_fast.kernels.compile import MULTIPROCESSORS, Usage, occupancy
from smi_fast.kernels.dispatch import table

REPORT = Path(__file__).parents[2] / "bench" / "compile_report.py"
# What was compiled before, of which all 2,200 take ten minutes: bench/compile_report.py --record writes it. What is not
# in it is compiled, whatever it takes.
RECORD = Path(__file__).with_name("compiled.txt")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
KEYS = {"kernel", "config", "arch", "registers", "stack_bytes", "shared_bytes", "tensor_core", "occupancy"}

PLANTED = """
import json
from smi_fast.kernels.compile import *

if __name__ == "__main__":
    half = {"up_to": 4096, "dtype": "half", "head_dim": 128, "form": "blocks"}
    spilling = {**half, "BM": 128, "BN": 128, "num_warps": 4, "num_stages": 1}
    large = {**half, "BM": 64, "BN": 128, "num_warps": 8, "num_stages": 5}
    without_wgmma = {**half, "BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1}
    for row in spilling, large, without_wgmma:
        launch = launches("attention_forward", row, plainest=True)[0]
        print(json.dumps([usage(launch, arch).faults() for arch in ("sm_80", "sm_90")]), flush=True)
"""


def output_of(*arguments):
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


SAMPLE = """
import random, sys
from pathlib import Path
from smi_fast.kernels.compile import *

if __name__ == "__main__":
    jobs = random.Random(int(sys.argv[1])).sample(table_jobs(["sm_80", "sm_90"]), 40)
    record, fresh = read_record(Path(sys.argv[2])), {}
    usages(jobs, record=fresh)
    for name, resources in fresh.items():
        print(name, resources == record.get(name), resources, record.get(name))
"""


def test_what_the_record_says_is_what_the_compiler_says(seed):
    """Of a fresh sample."""
    status, output, errors = output_of("-c", SAMPLE, str(seed), str(RECORD))
    assert status == 0, errors
    lines = output.splitlines()
    assert len(lines) > 20
    assert all(line.split()[1] == "True" for line in lines), output


KEYED = """
from smi_fast.kernels.compile import *
from smi_fast.kernels.compile import _code

if __name__ == "__main__":
    rows = table()["sm_90"]["attention_forward"][:2] + table()["sm_90"]["attention_forward"][-2:]
    jobs = [launch for row in rows for launch in launches("attention_forward", row)]
    code = _code(jobs[0].kernel.__module__)
    assert "tl.dot" in code and '\\"\\"\\"' not in code and "#" not in code
    keys = {key(launch, "sm_90") for launch in jobs}
    assert len(keys) == len({(launch.source("sm_90")[0].hash(), str(launch.kwargs)) for launch in jobs}) > 10
    assert keys.isdisjoint(key(launch, "sm_80") for launch in jobs)
"""


def test_the_record_is_by_what_the_machine_code_depends_on():
    """As Triton's own cache, but for line numbers and comments."""
    status, _, errors = output_of("-c", KEYED)
    assert status == 0, errors


def test_no_configuration_of_the_table_has_a_fault(tmp_path):
    """No stack, no more shared memory than there is, and wgmma on sm_90 wherever it can be."""
    record = shutil.copy(RECORD, tmp_path)
    status, output, errors = output_of(str(REPORT), "--arch", "sm_80,sm_90", "--json", "--record", record)
    objects = json.loads(output)
    assert all(set(entry) == KEYS for entry in objects)
    usages = [Usage(**entry) for entry in objects]
    kernels = {
        f"{module}.{name[1:].removesuffix('_kernel')}"
        for module in ("attention", "class_attention", "selection", "patches", "pixels")
        for name in vars(sys.modules[f"smi_fast.kernels.{module}"])
        if name.endswith("_kernel")
    }
    assert {use.kernel for use in usages if use.arch == "sm_90"} == kernels
    faults = [f"{use}: {', '.join(use.faults())}" for use in usages if use.faults()]
    assert not faults, "\n".join(faults)
    assert status == 0, errors
    half = [u for u in usages if u.kernel.startswith("attention.") and u.config["dtype"] in ("bf16", "fp16")]
    assert {(u.arch, u.tensor_core) for u in half} == {("sm_80", "mma.sync"), ("sm_90", "wgmma")}


def test_planted_configurations_that_spill_are_too_large_or_miss_wgmma_are_caught():
    status, output, errors = output_of("-c", PLANTED)
    assert status == 0, errors
    spilling, large, without_wgmma = map(json.loads, output.splitlines())
    for faults in spilling:
        assert any("bytes of stack" in fault for fault in faults)
    for faults in large:
        assert any("bytes of shared memory" in fault for fault in faults)
    assert without_wgmma[0] == []
    assert any("not wgmma" in fault for fault in without_wgmma[1])


def test_the_report_fails_where_the_table_holds_a_faulty_row(tmp_path):
    bad = {arch: dict(rows) for arch, rows in table().items() if arch == "sm_90"}
    bad["sm_90"] = {
        "source": "planted",
        "attention_forward": [
            {"up_to": 4096, "dtype": "half", "head_dim": 128, "form": "blocks", "BM": 128, "BN": 128, "num_warps": 4}
        ],
    }
    (tmp_path / "dispatch.json").write_text(json.dumps(bad))
    program = (
        "import sys, pathlib; from smi_fast.kernels import dispatch;"
        f"dispatch.TABLE = pathlib.Path({str(tmp_path / 'dispatch.json')!r});"
        f"sys.path.insert(0, {str(REPORT.parent)!r}); sys.argv = ['compile_report.py', '--arch', 'sm_90'];"
        "import compile_report; sys.exit(compile_report.main())"
    )
    status, output, _ = output_of("-c", program)
    assert status == 1
    assert "bytes of stack" in output


def test_the_report_names_an_architecture_that_it_does_not_know():
    status, _, errors = output_of(str(REPORT), "--arch", "sm_90,sm_42")
    assert status == 2
    assert "sm_42" in errors


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
def test_occupancy_is_what_the_scarcest_resource_allows(arch, num_warps, registers, shared_bytes, expected):
    assert occupancy(arch, num_warps, registers, shared_bytes) == pytest.approx(expected)


def test_the_table_has_rows_for_every_architecture_dtype_head_dim_and_length():
    from smi_fast.kernels.dispatch import _choose

    assert set(table()) == set(MULTIPROCESSORS)
    assert set(next(iter(table().values()))) - {"source"} == set(compiling.LAUNCHES)
    for arch, operations in table().items():
        assert operations["source"]
        for operation in ("attention_forward", "attention_backward", "class_attention_forward"):
            for dtype in ("half", "float32"):
                for head_dim in (16, 32, 64, 128):
                    for size in (0, 1, 47, 197, 4096):
                        kind = (("dtype", dtype), ("head_dim", head_dim))
                        _, constants = _choose(operation, arch, size, kind)
                        assert constants
