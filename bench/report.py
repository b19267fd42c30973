"""Tables of what was measured: python bench/report.py RESULTS.json [--markdown]"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from duel import OURS

COLUMNS = ("", "median ms", "IQR ms", f"x {OURS}", "rounds", "peak MiB")


def tables(results: dict) -> dict[str, list[tuple[str, ...]]]:
    """A table a group: a row a contestant, of the columns COLUMNS.

    Args:
        results: what pytest-benchmark wrote with --benchmark-json.

    Raises:
        ValueError: a group without smi-fast, so that there is nothing to divide by.
    """
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for entry in results["benchmarks"]:
        groups[entry["group"]][entry["extra_info"]["contestant"]] = entry
    return {group: _rows(group, entries) for group, entries in groups.items()}


def _rows(group: str, entries: dict[str, dict]) -> list[tuple[str, ...]]:
    if OURS not in entries:
        raise ValueError(f"{group}: no entry of {OURS}, so there is no ratio")
    ours = entries[OURS]["stats"]["median"]
    return [
        (
            name,
            f"{entry['stats']['median'] * 1e3:.4g}",
            f"{entry['stats']['iqr'] * 1e3:.2g}",
            f"{entry['stats']['median'] / ours:.2f}",
            str(entry["stats"]["rounds"]),
            "-" if entry["extra_info"]["peak_bytes"] is None else f"{entry['extra_info']['peak_bytes'] / 2**20:.1f}",
        )
        for name, entry in entries.items()
    ]


def machine(results: dict) -> str:
    """One line: where, with what and when it was measured."""
    info = results["machine_info"]
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    where = [info["gpu"]] if info.get("gpu") else []
    where.append(f"{info['cpu'].get('brand_raw') or info['machine']}, {threads}")
    commit = results["commit_info"]
    changed = " with changes" if commit.get("dirty") else ""
    commit = f"commit {str(commit['id'])[:8]}{changed}"
    return f"{', '.join(where)}; torch {info['torch']}; {results['datetime'][:10]}; {commit}"


def as_text(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(lines)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def report(results: dict, *, markdown: bool = False) -> str:
    """All tables, under a line that names the machine. A ratio above 1 is a contestant slower than smi-fast."""
    title, table = ("### {}", as_markdown) if markdown else ("{}", as_text)
    parts = [machine(results)]
    for group, rows in tables(results).items():
        parts += [title.format(group), table([COLUMNS, *rows])]
    return ("\n\n" if markdown else "\n").join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    print(report(json.loads(arguments.results.read_text()), markdown=arguments.markdown), end="")


if __name__ == "__main__":
    main()
