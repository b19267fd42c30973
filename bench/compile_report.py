"""Reports what every kernel uses in every configuration that the dispatch table can choose. No GPU is needed.

    python bench/compile_report.py [--arch sm_80,sm_90] [--kernels attention.] [--processes N] [--table FILE]

It prints a line for each kernel, configuration and architecture, and exits with status 1 if any of them has a fault.
With --table it also writes the lines into a file such as tests/kernels/compiled.txt. The lines for other architectures
and kernels stay in the file if they were written with the same versions of Triton and its assemblers. The whole table
takes one core an hour or two:

    nice python bench/compile_report.py --processes 1 --table tests/kernels/compiled.txt
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from report import as_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help="architectures, separated by commas; by default all of the table")
    parser.add_argument("--kernels", default="", help="only kernels whose names begin with this, such as attention.")
    parser.add_argument("--processes", type=int, help="number of processes that compile; by default one for each CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write what was found into this file")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":  # Triton reads it when the kernels are first imported
        print("TRITON_INTERPRET=1 is ignored: the kernels are compiled here, not interpreted", file=sys.stderr)
    import resources

    archs = arguments.arch.split(",") if arguments.arch else list(resources.MULTIPROCESSORS)
    unknown = [arch for arch in archs if arch not in resources.MULTIPROCESSORS]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(resources.MULTIPROCESSORS)}")
    uses = resources.measured(resources.configurations(archs, arguments.kernels), arguments.processes)
    if arguments.table:
        there = arguments.table.exists() and resources.versions() in arguments.table.read_text()
        before = resources.read_table(arguments.table) if there else []
        others = [use for use in before if use.arch not in archs or not use.kernel.startswith(arguments.kernels)]
        resources.write_table(arguments.table, others + uses)
    head = (*resources.Usage._fields, "occupancy", "faults")
    rows = [(*map(str, use), f"{use.occupancy:.0%}", ", ".join(use.faults()) or "-") for use in uses]
    print(as_text([head, *rows], left=(0, 1, 2, 6, 8)))
    faulty = sum(bool(use.faults()) for use in uses)
    print(f"{len(uses)} configurations, {faulty} with a fault", file=sys.stderr)
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
