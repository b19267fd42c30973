"""Signals that end a long job: the first at its next iteration, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends before it takes a machine away
BURST = 1.0  # seconds in which torchrun passes on a signal that the terminal has sent to its processes already


def is_first() -> bool:
    """Return whether this is the first of the processes that share a run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Stopped(BaseException):
    """Raised where a job ends because of a signal. What it needs to go on is saved. Like KeyboardInterrupt, it is no
    `Exception`, so that no code takes it for an error of its own.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Signals:
    """A context manager in which Ctrl-C and SIGTERM only ask for an end. A second signal ends the process at once.

    Outside the main thread, where Python lets no signal be handled, it does nothing.

    Attributes:
        asked: the number of the first signal, or None.
    """

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has asked for an end."""
        if self.asked is not None:
            raise Stopped(self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader's worker, which its parent ends
        if self.asked is None:
            self.asked, self._when = number, time.monotonic()
            if is_first():
                with suppress(OSError):  # whoever reads may have been ended by the same Ctrl-C
                    os.write(2, b"stopping after this iteration; once more to stop at once\n")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._when > BURST:
            os._exit(128 + number)
