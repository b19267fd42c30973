"""A page of results: sections of text, a table and plots, as Markdown and PNG."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from smi_fast.data.files import atomic_write

Value = float | str | list[float | None]


@dataclass
class Section:
    """What a section shows; `dataclasses.asdict` of it is what its JSON file holds.

    Args:
        columns: heading -> how its numbers are formatted, such as ".2f"; "" for text.
        rows: a value for each column: text, a number, or a list of numbers, one a seed, None where there is none.
        notes: sentences below the table.
        panels: plots side by side: {"x": label, "y": label, "lines": {name: (x, mean, standard deviation)}}.
        picture: file name of a PNG that lies in the page's folder.
        curves: numbers that other sections read: name -> one list a seed.
        seconds: that it took.
    """

    title: str
    text: str
    columns: dict[str, str]
    rows: list[list[Value]]
    notes: list[str] = field(default_factory=list)
    panels: list[dict] = field(default_factory=list)
    picture: str | None = None
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: float = 0.0


def write_page(path: Path, title: str, introduction: str, sections: dict[str, Section]) -> None:
    """Write the Markdown, and beside it the plots of each section under its name, if matplotlib (the extra `viz`) is
    there."""
    blocks = [f"# {title}", introduction]
    for name, section in sections.items():
        blocks += [f"## {section.title}", section.text, table(section.columns, section.rows)]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
        if section.panels and save_panels(section.panels, path.parent / f"{name}.png"):
            blocks.append(f"![{section.title}]({name}.png)")
        if section.picture:
            blocks.append(f"![Images of: {section.title}]({section.picture})")
    with atomic_write(path) as partial:
        partial.write_text("\n\n".join(blocks) + "\n")


def table(columns: dict[str, str], rows: list[list[Value]]) -> str:
    lines = [list(columns), ["---:" if form else ":---" for form in columns.values()]]
    lines += [[cell(value, form) for value, form in zip(row, columns.values(), strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Value, form: str) -> str:
    """Text as it is, a number formatted, a list as mean ± standard deviation of the numbers that there are."""
    if isinstance(value, str):
        return value
    values = value if isinstance(value, list) else [value]
    reached = [v for v in values if v is not None]
    if not reached:
        return "not reached"
    text = format(statistics.mean(reached) if len(reached) > 1 else reached[0], form)
    if len(reached) > 1:
        text += f" ± {statistics.stdev(reached):{form}}"
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)} seeds)"


def spread(values: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each list."""
    return [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]


def save_panels(panels: list[dict], path: Path) -> bool:
    """Whether it was written: False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, (x, mean, deviation) in panel["lines"].items():
            axes.errorbar(x, mean, deviation, label=label, marker="o", markersize=3, linewidth=1.2, capsize=2)
        axes.set_xlabel(panel["x"])
        axes.set_ylabel(panel["y"])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel["lines"]) > 1:
            axes.legend(frameon=False, fontsize="small")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True
