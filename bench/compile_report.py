"""What every kernel uses of a GPU, in every configuration that the dispatch table can choose, without one at hand.

python bench/compile_report.py [--arch sm_80,sm_90] [--json] [--processes N] [--record FILE]

A record spares compiling what is in it already: the tests have one, tests/kernels/compiled.txt, of sm_80 and sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from report import as_text

COLUMNS = ("kernel", "configuration", "arch", "registers", "stack", "shared", "tensor core", "occupancy", "faults")


def as_row(use) -> tuple[str, ...]:
    """A `Usage` as cells of COLUMNS."""
    config = " ".join(f"{name}={value}" for name, value in use.config.items() if value is not None)
    numbers = use.registers, use.stack_bytes, use.shared_bytes
    faults = ", ".join(use.faults()) or "-"
    return (use.kernel, config, use.arch, *map(str, numbers), use.tensor_core, f"{use.occupancy:.0%}", faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_80,sm_86,sm_89,sm_90,sm_100,sm_120", help="separated by commas")
    parser.add_argument("--json", action="store_true", help="print a list of objects in place of the table")
    parser.add_argument("--processes", type=int, help="to compile in; one a CPU")
    parser.add_argument("--record", type=Path, help="take from this file what was compiled before, and add the rest")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":  # read when the kernels are first imported
        print("TRITON_INTERPRET=1 is disregarded: kernels are compiled here, not interpreted", file=sys.stderr)
    from smi_fast.kernels.compile import MULTIPROCESSORS, key, read_record, table_jobs, table_usages, write_record

    archs = arguments.arch.split(",")
    unknown = [arch for arch in archs if arch not in MULTIPROCESSORS]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(MULTIPROCESSORS)}")
    record = read_record(arguments.record) if arguments.record else {}
    before = len(record)
    results = table_usages(archs, arguments.processes, record)
    if arguments.record:
        print(f"{len(record) - before} compiled, the others taken from {arguments.record}", file=sys.stderr)
        used = {key(*job) for job in table_jobs(archs)}
        write_record(arguments.record, {name: record[name] for name in used})
    if arguments.json:
        print(json.dumps([use._asdict() for use in results], indent=1))
    else:
        print(as_text([COLUMNS, *map(as_row, results)], left=(0, 1)))
    faulty = sum(bool(use.faults()) for use in results)
    print(f"{len(results)} configurations, {faulty} with a fault", file=sys.stderr)
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
