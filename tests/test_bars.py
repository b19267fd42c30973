"""Progress is a bar on a terminal and whole lines elsewhere, few enough for the log of a job of days."""

import ast
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
import tqdm.std

from smi_fast.bars import ProgressBar

PACKAGE = Path(__file__).parents[1] / "smi_fast"
LINE = r"job: +(\d+)% (\d+)/200 \[(\d\d):(\d\d)<(\d\d):(\d\d), +([\d.]+)it/s, loss=(\d+)\]"


@pytest.fixture
def clock(monkeypatch):
    """A clock [seconds] that only the test advances."""
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def lines(clock, refresh: bool = False) -> list[str]:
    """The lines of 200 iterations of half a second each, with a postfix that is set after each iteration."""
    with ProgressBar(total=200, desc="job", file=io.StringIO()) as bar:
        for iteration in range(200):
            clock[0] += 0.5
            bar.set_postfix(loss=iteration, refresh=refresh)
            bar.update()
    text = bar.fp.getvalue()
    assert not {"\r", "\x1b"} & set(text)
    assert text.endswith("\n")
    return text.splitlines()


def test_lines_come_every_30_seconds_and_at_the_end_with_count_rate_and_remaining_time(clock):
    for line, seconds in zip(lines(clock), (30, 60, 90, 100), strict=True):
        percent, count, *times, rate, loss = map(float, re.fullmatch(LINE, line).groups())
        assert (percent, count, loss) == (seconds, 2 * seconds, 2 * seconds - 1)
        assert times == [seconds // 60, seconds % 60, (100 - seconds) // 60, (100 - seconds) % 60]
        assert rate == 2


def test_a_new_postfix_or_description_is_no_reason_for_another_line(clock):
    assert len(lines(clock, refresh=True)) == 4


@pytest.mark.parametrize(("interval", "count"), [("10", 10 + 1), ("0.5", 200 + 1), ("0", 200 + 1)])
def test_tqdms_variable_makes_lines_more_frequent(clock, monkeypatch, interval, count):
    monkeypatch.setenv("TQDM_MININTERVAL", interval)
    assert len(lines(clock)) == count


def test_a_job_that_hardly_takes_time_is_one_line(clock):
    bar = ProgressBar(range(7), "job", file=io.StringIO(), unit="batch")
    assert list(bar) == [*range(7)]
    assert re.fullmatch(r"job: 100% 7/7 \[00:00<\S+ +\S+batch/s\]\n", bar.fp.getvalue())


def test_a_job_of_unknown_length_is_lines_too(clock):
    bar = ProgressBar(iter(range(7)), "job", file=io.StringIO())
    assert list(bar) == [*range(7)]
    assert re.fullmatch(r"job: 7it \[00:00, +\S+it/s\]\n", bar.fp.getvalue())


def test_on_a_terminal_it_is_a_bar_in_one_line(monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(writer, "w") as terminal, os.fdopen(reader, "rb") as screen:
        with ProgressBar(total=4, desc="job", file=terminal) as bar:
            for _ in range(4):
                bar.update()
        print("end", file=terminal, flush=True)
        text = ""
        while not text.endswith("end\r\n"):
            text += screen.readline().decode()
    text, end, _ = text.replace("\r\n", "\n").split("\n")
    assert end == "end"
    assert text.count("\r") >= 5
    assert re.search(r"\rjob:  50%\|█+ +\| 2/4 \[", text)
    assert 70 < max(map(len, text.strip().split("\r"))) <= 80


def test_what_is_not_shown_needs_no_output(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBar(range(3), "job", shown=False) as bar:
        assert list(bar) == [0, 1, 2]


def test_the_position_may_be_what_several_processes_have_done(clock):
    with ProgressBar(total=1000, initial=400, desc="job", file=io.StringIO()) as bar:
        for done in (450, 600, 600, 900):
            clock[0] += 10
            bar.to(done)
            assert bar.n == done
    early, end = bar.fp.getvalue().splitlines()
    assert early.startswith("job:  60% 600/1000 [00:30<01:00,  6.67it/s")  # 200 in 30 seconds
    assert end.startswith("job:  90% 900/1000 [00:40<00:08, 12.50it/s")  # 500 in 40 seconds


def test_every_bar_of_the_package_is_of_this_class():
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and "tqdm" in {getattr(node, "module", None), *(alias.name for alias in node.names)}
    }
    assert importing == {"bars.py"}
