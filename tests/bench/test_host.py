"""The command that times the host compares passes that launch kernels, on a runtime that computes nothing."""

import re
import subprocess
import sys
from pathlib import Path

from fakecuda_cases import fake_cuda, needs_fake_cuda

HOST = Path(__file__).parents[2] / "bench" / "host.py"


@needs_fake_cuda
def test_every_pass_is_timed(tmp_path):
    command = [sys.executable, str(HOST), "--model", "test_vit", "--rounds", "1"]
    done = subprocess.run(command, env=fake_cuda(tmp_path), capture_output=True, text=True)
    # torch's threads may be torn down in the wrong order at the end of a process whose runtime computes nothing
    assert done.returncode == 0 or done.stderr == "terminate called without an active exception\n", done.stderr[-3000:]
    rows = [
        re.fullmatch(r"(.{27}) (.{14}) +([0-9.]+) ms +([0-9.]+) of timm's", line) for line in done.stdout.splitlines()
    ]
    assert all(rows)
    passes = {(row[1].strip(), row[2].strip()) for row in rows}
    for way in ("forward", "forward and backward"):
        assert {(f"dense {way}", name) for name in ("timm", "ours", "ours, cast")} <= passes
        assert {(f"kept {way}", name) for name in ("timm's blocks", "ours", "ours, cast")} <= passes
    assert all(float(row[3]) > 0 for row in rows)
