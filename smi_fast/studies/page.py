"""A page of results in Markdown: sections with a text, a table and plots."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from smi_fast.data.files import atomic_write
from smi_fast.studies.plots import save_panels

Value = float | str | list[float | None]


@dataclass
class Section:
    """The contents of a section. Its JSON file holds the result of `dataclasses.asdict`.

    Args:
        title: the heading.
        text: what the table shows.
        columns: maps a heading to the format of its numbers, such as ".2f", or to "" for text.
        rows: a value for each column: a text, a number, or a list with a number, or None, for each seed.
        notes: sentences below the table.
        panels: plots side by side, as `save_panels` takes them.
        picture: the file name of a PNG in the page's folder.
        curves: numbers that other sections read, which map a name to a list for each seed.
        seconds: how long it took to make the section.
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
    """Write the Markdown file, and beside it each section's plots under its name, if matplotlib is installed."""
    blocks = [f"# {title}", introduction]
    for name, section in sections.items():
        blocks += [f"## {section.title}", section.text, table(section.columns, section.rows)]
        if section.notes:
            blocks.append("\n".join(f"- {note}" for note in section.notes))
        if section.panels and save_panels(section.panels, path.parent / f"{name}.png"):
            blocks.append(f"![{section.title}]({name}.png)")
        if section.picture:
            blocks.append(f"![Images of {section.title}]({section.picture})")
    with atomic_write(path) as partial:
        partial.write_text("\n\n".join(blocks) + "\n")


def table(columns: dict[str, str], rows: list[list[Value]]) -> str:
    """Return a table in Markdown. `Section` describes columns and rows."""
    lines = [list(columns), ["---:" if form else ":---" for form in columns.values()]]
    lines += [[cell(value, form) for value, form in zip(row, columns.values(), strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Value, form: str) -> str:
    """Return the text of a cell. A list becomes the mean ± standard deviation of its numbers. None is left out."""
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
    """Return the mean and the standard deviation of each list."""
    return [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
