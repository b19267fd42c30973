"""How long a process waits for its first attention: compiled when it is called, taken from Triton's cache on disk, or
compiled ahead of time.

python examples/cpp/cold_start.py --program build/examples/cpp/cold_start

Needs a GPU. Times count from when the GPU's context is there, and leave out Python's imports; each is of a process of
its own, the median of --repeat."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# The same call as in cold_start.cpp: 8 sequences of 47 tokens, 3 heads of 64 channels, bfloat16.
PYTHON = """
import json, time, torch
from smi_fast import kernels

cu_seqlens = torch.arange(9, dtype=torch.int32, device="cuda") * 47
qkv = torch.zeros(376, 3, 3, 64, dtype=torch.bfloat16, device="cuda")
milliseconds = []
for _ in range(2):
    torch.cuda.synchronize()
    before = time.perf_counter()
    kernels.attention(qkv, cu_seqlens, 47, scale=0.125)
    torch.cuda.synchronize()
    milliseconds.append(1e3 * (time.perf_counter() - before))
print(json.dumps(dict(first_ms=milliseconds[0], next_ms=milliseconds[1], gpu=torch.cuda.get_device_name())))
"""


def measured(command: list[str], cache: Path) -> dict:
    output = subprocess.check_output(command, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, text=True)
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", type=Path, required=True, help="what cold_start.cpp was built into")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    runs = {"compiled at the call": [], "from Triton's cache": [], "ahead of time": []}
    python = [sys.executable, "-c", PYTHON]
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as cache:
            runs["compiled at the call"].append(measured(python, Path(cache)))
            runs["from Triton's cache"].append(measured(python, Path(cache)))
        runs["ahead of time"].append(measured([str(arguments.program.resolve())], Path(tempfile.gettempdir())))
    print(runs["compiled at the call"][0]["gpu"])
    for name, results in runs.items():
        first, following = (statistics.median(result[key] for result in results) for key in ("first_ms", "next_ms"))
        print(f"{name:22} first call {first:9.3f} ms, next {following:7.3f} ms")


if __name__ == "__main__":
    main()
