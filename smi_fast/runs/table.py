"""Table: the log of a run as a CSV file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from smi_fast.data.files import atomic_write, naming

HEADER = "batch,iteration,seconds"  # the first columns, before those of the values


class Table(AbstractContextManager):
    """A CSV file with the columns batch, iteration, seconds and those of the values that are logged first.

    A line is in the file when `write` returns. A line that a kill has cut is removed when the file is opened again. If
    a batch goes on from an earlier iteration than its last line tells of, its lines from there on are replaced, so that
    each iteration is there once and in order. Seconds count the time for which the log was open, in earlier processes
    too.

    Args:
        path: the file, which is made by the first `write`.

    Raises:
        ValueError: the file is no such table, or is damaged.
        OSError: now or later, the file cannot be read or written. The message names it.
    """

    takes_pictures = False

    def __init__(self, path: Path):
        self.path = path
        self.columns, *rows = self._read() or [[]]
        self.last = {int(row[0]): int(row[1]) for row in rows}  # the last iteration of each batch
        self.begun = time.perf_counter() - (float(rows[-1][2]) if rows else 0)

    def _read(self) -> list[list[str]]:
        """Return the fields of all lines, the first of which has the names of the columns. Remove a cut line."""
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        *lines, cut = (line.split(",") for line in text.split("\n"))
        try:
            if not HEADER.startswith(text[: len(HEADER)]):
                raise ValueError("it has other columns")
            for row in lines[1:]:
                _ = int(row[0]), int(row[1]), [float(value) for _, value in zip(lines[0], row, strict=True)]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.path} is no log of a run, or damaged: {error}") from None
        if cut != [""]:
            self._replace(lines)
        return lines

    def _replace(self, lines: Iterable[list[str]]) -> None:
        with atomic_write(self.path) as partial:
            partial.write_text("".join(",".join(line) + "\n" for line in lines))

    def write(self, number: int, iteration: int, values: Mapping[str, float]) -> None:
        """Add a line about batch `number`, `iteration` of whose iterations are done."""
        if iteration <= self.last.get(number, -1):
            kept = [row for row in self._read()[1:] if int(row[0]) != number or int(row[1]) < iteration]
            self._replace([self.columns, *kept])
        header = "" if self.columns else ",".join([HEADER, *values]) + "\n"
        self.columns = self.columns or [*HEADER.split(","), *values]
        fields = [f"{values.get(name, math.nan):.6g}" for name in self.columns[3:]]
        line = ",".join([str(number), str(iteration), f"{time.perf_counter() - self.begun:.1f}", *fields])
        with naming(self.path), self.path.open("a") as file:
            file.write(f"{header}{line}\n")
        self.last[number] = iteration

    def picture(self, number: int, iteration: int, images: Tensor) -> None:
        """A table has no pictures."""

    def __exit__(self, *error: Any) -> None:
        """Every line is in the file already."""
