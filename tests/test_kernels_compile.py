"""Every kernel compiles for sm_80 and sm_90, without a GPU, spills nothing and fits into shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

PLANTED = """
from smi_fast.kernels.compile import *

if __name__ == "__main__":
    spilling = (120, torch.float32), {"BM": 32, "BN": 32, "num_warps": 4}
    large = (128, torch.bfloat16), {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 5}
    for (head_dim, dtype), tile in spilling, large:
        forward = next(attention_launches([head_dim], [dtype]))
        planted = forward._replace(kwargs={**forward.kwargs, **tile})
        for capability in CAPABILITIES:
            print(json.dumps(usage(planted, capability).faults()), flush=True)
"""


def lines_of(*arguments):
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_without_spills_and_fits_into_shared_memory():
    from smi_fast.kernels.compile import Usage

    usages = [Usage(**line) for line in lines_of("-m", "smi_fast.kernels.compile")]
    kernels = {
        name
        for module in ("attention", "selection", "patches")
        for name in vars(sys.modules[f"smi_fast.kernels.{module}"])
        if name.endswith("_kernel")
    }
    assert {(u.kernel, u.capability) for u in usages} == {(name, sm) for name in kernels for sm in (80, 90)}
    faults = [f"{u}: {', '.join(u.faults())}" for u in usages if u.faults()]
    assert not faults, "\n".join(faults)


def test_a_configuration_that_spills_and_one_that_is_too_large_are_caught():
    spills, spills_too, large, large_too = lines_of("-c", PLANTED)
    for faults in (spills, spills_too):
        assert any("bytes of stack" in fault for fault in faults)
    for faults in (large, large_too):
        assert any("bytes of shared memory" in fault for fault in faults)
