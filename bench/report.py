"""Tables and plots of what was measured: python bench/report.py RESULTS.json ... [--markdown] [--targets] [--plots DIR]

Several results are those of one machine on one day; what they say of it is taken from the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import floors
from floors import OURS
from journal import write_whole

Entries = dict[str, dict]  # of a group, by contestant


def groups_of(results: dict) -> dict[str, Entries]:
    """The entries of each group, by contestant. Those that were measured come first. An entry of a contestant that
    failed has a reason instead of statistics."""
    groups: dict[str, Entries] = defaultdict(dict)
    for entry in results["benchmarks"] + results.get("failed", []):
        groups[entry["group"]][entry["extra_info"]["contestant"]] = entry
    return groups


def reason(entry: dict) -> str:
    """Why a contestant has no times; empty if it has."""
    return entry.get("wrong") or entry.get("absent") or ""


def measured(groups: dict[str, Entries]) -> dict[str, Entries]:
    """The entries with times of those groups in which smi-fast has some."""
    timed = {group: {name: e for name, e in entries.items() if not reason(e)} for group, entries in groups.items()}
    return {group: entries for group, entries in timed.items() if OURS in entries}


def median(entry: dict) -> float:
    return entry["stats"]["median"]


def floor(entry: dict, results: dict) -> float | None:
    """The least seconds that the GPU can take: the bytes that must move at the bandwidth of a large copy, or the
    operations at the rate of a large matrix product, whichever takes longer. None if either is unknown."""
    ceilings = results["machine_info"].get("ceilings") or {}
    least = floors.floor(entry["extra_info"], ceilings) if "bytes_per_second" in ceilings else None
    return least and least.seconds


def share_of_ceiling(entry: dict, results: dict) -> float | None:
    """On a CPU, the time that the group's operations take at the rate of a large matrix product of its dtype, measured
    in the same run, as a share of the time taken. None on a GPU, and for a group without products."""
    ceilings, facts = results["machine_info"].get("ceilings") or {}, entry["extra_info"]
    if not ceilings or "bytes_per_second" in ceilings or not facts.get("floor_flops"):
        return None
    least = floors.floor({**facts, "floor_bytes": 0}, ceilings)
    return least and least.seconds / median(entry)


def tables(results: dict) -> dict[str, list[tuple[str, ...]]]:
    """A table for each group: the head, then a row for each contestant. Ratios are to smi-fast and to a known floor. A
    contestant that failed has a row that says why."""
    return {group: _table(entries, results) for group, entries in groups_of(results).items()}


def _table(entries: Entries, results: dict) -> list[tuple[str, ...]]:
    timed = {name: entry for name, entry in entries.items() if not reason(entry)}
    ours = timed.get(OURS)
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda entry: entry["extra_info"]["contestant"],
        "median ms": lambda entry: f"{median(entry) * 1e3:.4g}",
        "IQR ms": lambda entry: f"{entry['stats']['iqr'] * 1e3:.2g}",
    }
    if any(entry["extra_info"].get("warm_ms") for entry in timed.values()):
        columns["warm ms"] = lambda entry: floors.number(entry["extra_info"].get("warm_ms"))
    if ours:
        columns[f"x {OURS}"] = lambda entry: f"{median(entry) / median(ours):.2f}"
        if floor(ours, results) is not None:
            columns["x floor"] = lambda entry: f"{median(entry) / floor(entry, results):.2f}"
        if share_of_ceiling(ours, results) is not None:
            columns["of the product ceiling"] = lambda entry: f"{share_of_ceiling(entry, results):.0%}"
    columns["rounds"] = lambda entry: str(entry["stats"]["rounds"])
    if any(entry["extra_info"].get("graph") is not None for entry in timed.values()):
        columns["graph"] = lambda entry: "yes" if entry["extra_info"]["graph"] else "no"
    if any(entry["extra_info"].get("nodes") for entry in timed.values()):
        columns["nodes"] = lambda entry: floors.number(entry["extra_info"].get("nodes"))
    columns["peak MiB"] = lambda entry: _mebibytes(entry["extra_info"]["peak_bytes"])
    rows = [tuple(cell(entry) for cell in columns.values()) for entry in timed.values()]
    failed = [entry for entry in entries.values() if reason(entry)]
    if not failed:
        return [tuple(columns), *rows]
    unmeasured = ("-",) * (len(columns) - 1)
    rows = [(*row, "") for row in rows]
    rows += [(entry["extra_info"]["contestant"], *unmeasured, reason(entry)) for entry in failed]
    return [(*columns, "not measured because"), *rows]


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


class Target(NamedTuple):
    """A figure that every group of a title should reach, where it applies.

    `ratio` takes the group's entries and smi-fast's floor and returns what is compared with `limit`, None where a group
    has no such figure; `least` tells a ratio that has to be at least the limit from one that may be at most that.
    """

    figure: str
    title: str
    limit: float
    least: bool
    ratio: Callable[[Entries, float | None], float | None]
    applies: Callable[[dict], bool] = lambda facts: True


def _of_fastest_peer(entries: Entries, _: float | None) -> float | None:
    peers = [median(entry) for name, entry in entries.items() if not name.startswith(OURS)]
    return min(peers) / median(entries[OURS]) if peers else None


def _of(name: str, *, inverse: bool = False) -> Callable[[Entries, float | None], float | None]:
    def ratio(entries: Entries, _: float | None) -> float | None:
        if name not in entries:
            return None
        ratio = median(entries[name]) / median(entries[OURS])
        return 1 / ratio if inverse else ratio

    return ratio


def _of_floor(entries: Entries, floor: float | None) -> float | None:
    return None if floor is None else median(entries[OURS]) / floor


def _of_rate(per_second: float) -> Callable[[Entries, float | None], float | None]:
    return lambda entries, _: 1 / median(entries[OURS]) / per_second


def _of_memory(entries: Entries, _: float | None) -> float | None:
    ours, theirs = (entries.get(name, {"extra_info": {}})["extra_info"].get("peak_bytes") for name in (OURS, PUBLISHED))
    return ours / theirs if ours and theirs else None


def _of_operations(entries: Entries, _: float | None) -> float | None:
    """The gain over a dense forward pass, as a share of the gain in operations."""
    name, facts = "timm dense, torch.compile", entries[OURS]["extra_info"]
    promised = facts["dense_flops"] / facts["floor_flops"]
    return median(entries[name]) / median(entries[OURS]) / promised if name in entries else None


def _stage(model: str) -> Callable[[dict], bool]:
    return lambda facts: facts["model"].startswith(model) and facts["kept"] == "46"


def _large(facts: dict) -> bool:
    return int(facts["batch"]) >= 128


ATTENTION, CLASS_ROW, QUERY, PATCHES = (
    [f"{title}, {passes}" for passes in ("forward", "forward and backward")]
    for title in ("attention", "attention with the class row", "attention of one query", "patches through a view")
)
SELECTION = ["selection", "selection by mass"]
ITERATION, GAIN = "inversion, one iteration", "sparse forward beside dense"
PLAIN, PUBLISHED = "plain PyTorch, compiled", "published SMI"
FLOOR = "time over the floor, batch >= 128"
TARGETS = [
    Target("fastest peer over smi-fast", ATTENTION[1], 1.3, True, _of_fastest_peer),
    Target("the same at 47 tokens", ATTENTION[1], 1.6, True, _of_fastest_peer, lambda facts: facts["tokens"] == "47"),
    *(Target("with the row over without", title, 1.05, False, _of(f"{OURS}, no row", inverse=True))
      for title in CLASS_ROW),
    *(Target(f"{peer} over smi-fast", title, limit, True, _of(peer))
      for title in SELECTION for peer, limit in (("torch", 4), ("torch.compile", 2))),
    Target(FLOOR, SELECTION[0], 1.5, False, _of_floor, _large),
    *(Target("torch over smi-fast", title, 5, True, _of("torch")) for title in PATCHES),
    *(Target(FLOOR, title, 1.5, False, _of_floor, _large) for title in PATCHES),
    Target("published code over smi-fast, deit_base", ITERATION, 15, True, _of(PUBLISHED), _stage("deit_base")),
    Target("plain loop over smi-fast, deit_base", ITERATION, 1.5, True, _of(PLAIN), _stage("deit_base")),
    Target("plain loop over smi-fast, deit_tiny", ITERATION, 2, True, _of(PLAIN), _stage("deit_tiny")),
    Target("time over the floor, deit_base", ITERATION, 1 / 0.6, False, _of_floor, _stage("deit_base")),
    Target("iterations/s over 1500, deit_tiny", ITERATION, 1, True, _of_rate(1500), _stage("deit_tiny")),
    Target("peak memory over the published code's", ITERATION, 0.25, False, _of_memory),
    Target("dense compiled timm over smi-fast", GAIN, 4, True, _of("timm dense, torch.compile")),
    Target("the same over the ratio of operations", GAIN, 0.9, True, _of_operations),
]  # fmt: skip


def targets(results: dict) -> list[tuple[str, ...]]:
    """A table of the figures to reach on an NVIDIA H200: a head, then a row for each figure. A row has its limit, the
    worst and the median ratio, in how many groups it was reached, where it was worst, and whether it is met. It is not
    met if smi-fast failed in any group of the kernel."""
    rows = [("figure", "kernel", "limit", "worst", "median", "reached in", "worst at", "met")]
    groups = groups_of(results)
    ours_failed = {e[OURS]["extra_info"]["title"] for e in groups.values() if OURS in e and e[OURS].get("wrong")}
    for target in TARGETS:
        ratios = {}
        for group, entries in measured(groups).items():
            facts = entries[OURS]["extra_info"]
            if facts.get("title") == target.title and target.applies(facts):
                ratio = target.ratio(entries, floor(entries[OURS], results))
                if ratio is not None:
                    ratios[group] = ratio
        limit = f"{'>=' if target.least else '<='} {target.limit:g}"
        if not ratios:
            rows.append((target.figure, target.title, limit, "-", "-", "-", "-", "not measured"))
            continue
        worst = (min if target.least else max)(ratios, key=ratios.get)
        reached = [ratio >= target.limit if target.least else ratio <= target.limit for ratio in ratios.values()]
        rows.append(
            (
                target.figure, target.title, limit, f"{ratios[worst]:.3g}", f"{statistics.median(ratios.values()):.3g}",
                f"{sum(reached)} of {len(ratios)}", worst.removeprefix(f"{target.title}: "),
                "yes" if all(reached) and target.title not in ours_failed else "no",
            )
        )  # fmt: skip
    return rows


class Figure(NamedTuple):
    """A picture: two of the facts give its rows and columns of panels, and each panel shows time against `axis`."""

    file: str
    titles: list[str]
    row: str
    column: str
    axis: str


FIGURES = [
    Figure("attention-forward", ATTENTION[:1], "batch", "heads", "tokens in a sequence"),
    Figure("attention-forward-backward", ATTENTION[1:], "batch", "heads", "tokens in a sequence"),
    Figure("class-query", QUERY, "title", "heads", "tokens in a sequence"),
    Figure("selection", SELECTION[:1], "batch", "width", "patches to choose from"),
    Figure("patches", PATCHES, "title", "batch", "kept patches"),
]
COLORS = {
    OURS: "#d62728",
    "SDPA math": "#8c8c8c", "SDPA flash": "#1f77b4", "SDPA efficient": "#17becf", "SDPA cuDNN": "#2ca02c",
    "varlen": "#9467bd", "FlexAttention": "#ff7f0e", "xFormers": "#8c564b", "flash-attn": "#bcbd22",
    "torch": "#1f77b4", "torch, reshaped": "#17becf", "torch.compile": "#ff7f0e",
}  # fmt: skip
BEYOND = 40  # times smi-fast: a contestant that is slower all along would flatten the others, and is left out


def plots(results: dict, directory: Path) -> list[Path]:
    """Draw each of FIGURES that has measurements, as a PNG in the directory. Returns the files.

    A line is a contestant at equal lengths; a hollow mark is a ragged mix, at its mean length.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths, entered = [], measured(groups_of(results)).values()
    for figure in FIGURES:
        groups = [entries for entries in entered if entries[OURS]["extra_info"].get("title") in figure.titles]
        if groups:
            paths.append(directory / f"{figure.file}.png")
            _draw(figure, groups, results, paths[-1])
    return paths


def _draw(figure: Figure, groups: list[Entries], results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def panel(entries: Entries) -> tuple[str, str]:
        facts = entries[OURS]["extra_info"]
        return facts[figure.row], facts[figure.column]

    rows, columns = (sorted({panel(entries)[side] for entries in groups}, key=_numerically) for side in (0, 1))
    shape = len(rows), len(columns)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    picture, axes = plt.subplots(
        *shape, figsize=(1.6 + 3.2 * shape[1], 1.3 + 2.5 * shape[0]), squeeze=False, sharex=True, layout="constrained"
    )
    handles = {}
    for row, row_axes in zip(rows, axes, strict=True):
        for column, axis in zip(columns, row_axes, strict=True):
            inside = [entries for entries in groups if panel(entries) == (row, column)]
            handles |= _draw_panel(axis, inside, results)
            said = f"{row}\n" if figure.row == "title" else f"{figure.row} {row}, "
            axis.set_title(f"{said}{figure.column} {column}", fontsize=9)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            lengths = {entries[OURS]["extra_info"]["length"] for entries in inside if not _ragged(entries)}
            if lengths:
                axis.set_xticks(sorted(lengths), [f"{length:g}" for length in sorted(lengths)])
    for axis in axes[-1]:
        axis.set_xlabel(figure.axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("time in µs")
    order = sorted(handles, key=[*COLORS, "floor"].index)
    picture.legend(
        [handles[name] for name in order], order, loc="outside lower center", ncols=min(len(order), 6), frameon=False
    )
    heading = [figure.titles[0]] if figure.row != "title" else []  # else each panel says it
    heading.append(machine(results))
    if any(map(_ragged, groups)):
        heading.append("hollow: a ragged mix, at its mean length")
    picture.suptitle("\n".join(heading), fontsize=9, color="#555555")
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _draw_panel(axis, groups: list[Entries], results: dict) -> dict[str, object]:
    """Draw the lines of a panel. Returns a handle for each name."""
    series: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    for entries in groups:
        length, ragged = entries[OURS]["extra_info"]["length"], _ragged(entries)
        for name, entry in entries.items():
            series[name].append((length, median(entry) * 1e6, ragged))
        least = floor(entries[OURS], results)
        if least is not None:
            series["floor"].append((length, least * 1e6, ragged))
    own = {length: time for length, time, _ in series[OURS]}
    handles = {}
    for name, points in series.items():
        if name != "floor" and (name not in COLORS or all(time > BEYOND * own[length] for length, time, _ in points)):
            continue
        is_floor = name == "floor"
        style = {"color": COLORS.get(name, "black"), "zorder": 3 if name == OURS else 2}
        lines, mixed = ([(x, y) for x, y, ragged in sorted(points) if ragged is kind] for kind in (False, True))
        (handles[name],) = axis.plot(
            [x for x, _ in lines], [y for _, y in lines], linestyle="--" if is_floor else "-",
            linewidth=2.2 if name == OURS else 1.1, marker="" if is_floor else "o", markersize=3, **style,
        )  # fmt: skip
        axis.plot(
            [x for x, _ in mixed], [y for _, y in mixed], linestyle="", marker="_" if is_floor else "o", markersize=5.5,
            markerfacecolor="white", **style,
        )  # fmt: skip
    return handles


def _ragged(entries: Entries) -> bool:
    return entries[OURS]["extra_info"]["ragged"]


def _numerically(text: str) -> tuple[float, str]:
    return (float(text), "") if text.isdigit() else (0.0, text)


def machine(results: dict) -> str:
    """A line that says where, with what and when the results were measured."""
    info = results["machine_info"]
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    where = [info["gpu"]] if info.get("gpu") else []
    where.append(f"{info['cpu'].get('brand_raw') or info['machine']}, {threads}")
    commit = results["commit_info"]
    changed = " with changes" if commit.get("dirty") else ""
    commit = f"commit {str(commit['id'])[:8]}{changed}"
    return f"{', '.join(where)}; torch {info['torch']}; {results['datetime'][:10]}; {commit}"


def measured_ceilings(results: dict) -> str:
    """A line that gives the ceilings that were measured in the same run. Empty if there are none."""
    ceilings = results["machine_info"].get("ceilings")
    if ceilings is None:
        return ""
    rates = (f"{rate / 1e9:,.0f} in {dtype}" for dtype, rate in ceilings["flops_per_second"].items())
    line = f"ceilings: {' and '.join(rates)} GFLOP/s, of a large matrix product"
    if "bytes_per_second" in ceilings:
        line += f"; {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, of a large copy"
    return line


def floors_section(results: dict) -> tuple[str, list[tuple[str, ...]]] | None:
    """A title, and the table of bytes, operations and floors: on a GPU with published peaks at these, otherwise at the
    ceilings that were measured. None if no group has a floor."""
    info = results["machine_info"]
    peaks = floors.published(info["gpu"]) if info.get("gpu") else None
    groups = {group: entries[OURS]["extra_info"] for group, entries in measured(groups_of(results)).items()}
    rows = floors.table(groups, peaks or info.get("ceilings"))
    if len(rows) == 1:
        return None
    rates = f"the published peaks of {info['gpu']}" if peaks else "the measured ceilings"
    return f"{OURS}: bytes and operations" + (f", and floors at {rates}" if "floor us" in rows[0] else ""), rows


def as_text(rows: list[tuple[str, ...]], *, left: tuple[int, ...] = (0,)) -> str:
    """A table as lines of text. Columns in `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if n in left else cell.rjust(width) for n, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(lines)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def report(results: dict, *, markdown: bool = False, with_targets: bool = False) -> str:
    """All tables, under a line that names the machine. A ratio above 1 means a contestant slower than smi-fast."""
    title, table = ("### {}", as_markdown) if markdown else ("{}", as_text)
    parts = [line for line in (machine(results), measured_ceilings(results)) if line]
    if with_targets:
        parts += [title.format("figures to reach on an NVIDIA H200"), table(targets(results))]
    section = floors_section(results)
    if section:
        parts += [title.format(section[0]), table(section[1])]
    for group, rows in tables(results).items():
        parts += [title.format(group), table(rows)]
    return ("\n\n" if markdown else "\n").join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--targets", action="store_true", help="begin with the figures to reach, and whether they are")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw time against length, as PNGs in there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables there")
    arguments = parser.parse_args()
    there = [path for path in arguments.results if path.exists()]
    for path in set(arguments.results).difference(there):
        print(f"there is no {path}", file=sys.stderr)
    if not there:
        sys.exit(2)
    results, *others = (json.loads(path.read_text()) for path in there)
    for other in others:
        for name in ("benchmarks", "failed"):
            results[name] = results.get(name, []) + other.get(name, [])
    text = report(results, markdown=arguments.markdown, with_targets=arguments.targets)
    if arguments.output:
        write_whole(arguments.output, text)
    else:
        print(text, end="")
    if arguments.plots:
        plots(results, arguments.plots)


if __name__ == "__main__":
    main()
