"""The progress of a long job: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's progress bar. Where the output is not a terminal, it is plain lines instead: at most one every 30 seconds,
    and one at the end.

    tqdm's environment variable TQDM_MININTERVAL sets another number of seconds between two lines, or between two
    updates of the bar.

    Args:
        items: what to iterate over, or None if `update` or `to` counts.
        desc: the name of the job, which the bar begins with.
        shown: whether anything is shown.
        file: where to write to. None: sys.stderr.
        options: further arguments of tqdm, such as `total`, `initial` and `unit`.
    """

    last_print_t = math.inf  # while tqdm sets up the bar, which it would show with nothing done

    def __init__(
        self,
        items: Iterable | None = None,
        desc: str | None = None,
        *,
        shown: bool = True,
        file: TextIO | None = None,
        **options: Any,
    ):
        self._is_bar = shown and (file or sys.stderr).isatty()
        interval = float(os.environ.get("TQDM_MININTERVAL", 0.5 if self._is_bar else 30))
        options |= {"dynamic_ncols": True} if self._is_bar else {"ncols": 0}  # 0 columns: numbers without a bar
        super().__init__(
            items, desc, disable=not shown, file=file, mininterval=interval, maxinterval=max(10, interval), **options
        )

    def to(self, n: int) -> None:
        """Set the position, for example to what several processes have done together."""
        self.update(n - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Show the bar, or write a line if it is time for one."""
        if self._is_bar:
            return super().display(msg, pos)
        if self.disable:  # `close` displays a last time, and ends the line
            self._write(str(self))
        elif self._time() - self.last_print_t >= self.mininterval:
            self.last_print_t, self.last_print_n = self._time(), self.n
            self._write(f"{self}\n")
        return True

    def _write(self, text: str) -> None:
        with suppress(BrokenPipeError):  # nobody reads it any more, which is no reason to end the job
            self.fp.write(text)
            self.fp.flush()
