"""Compile what the benchmarks launch, in parallel processes, before anything is timed: python bench/ahead.py [--arch A]

These are all launches that the dispatch table can lead to with heads of 64 channels in half precision. Triton keeps
what was compiled in its cache on disk, where the benchmarks find it.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are first imported

import torch
from launches import launches
from resources import usages
from smi_fast.kernels import dispatch
from smi_fast.kernels.backend import Launch

KIND = {"dtype": "half", "head_dim": 64}


def benchmarked(arch: str, operation: str = "") -> list[Launch]:
    """The launches of the benchmarks on an architecture, of the operations whose names begin so."""
    found = []
    for name, rows in dispatch.table()[arch].items():
        if name != "source" and name.startswith(operation):
            rows = [row for row in rows if all(row.get(field, value) == value for field, value in KIND.items())]
            found += [launch for row in rows for launch in launches(name, row)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help="such as sm_90; by default that of this machine's GPU")
    parser.add_argument("--only", default="", help="compile only the operations whose names begin so")
    parser.add_argument("--processes", type=int, help="how many compile at a time; one for each CPU")
    arguments = parser.parse_args()
    arch = arguments.arch or dispatch.nearest(*torch.cuda.get_device_capability())
    started = time.monotonic()
    uses = usages([(launch, arch) for launch in benchmarked(arch, arguments.only)], arguments.processes)
    print(f"{len(set(uses))} kernels of {len(uses)} launches for {arch} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
