"""A wall clock that jumps changes nothing."""

import itertools
import os
import time

from fault_cases import EVERY, Process, check_same, contents, lost_work

YEAR = 365 * 24 * 3600


class JumpingClock:
    """A hook by which the wall clock goes back and forward by a year, again and again."""

    def __call__(self, folder, note) -> None:
        now, jumps = time.time, itertools.cycle((YEAR, -YEAR, 0, -2 * YEAR))
        time.time = lambda: now() + next(jumps)
        time.time_ns = lambda: int(time.time() * 1e9)
        replace = os.replace

        def replace_at_some_time(partial, path) -> None:
            moment = time.time()
            os.utime(partial, (moment, moment))
            replace(partial, path)

        os.replace = replace_at_some_time


def test_a_run_is_the_same_though_the_wall_clock_jumps(command, folder, whole, tmp_path):
    first = Process.start(command.arguments(folder), tmp_path / "logs", JumpingClock())
    first.wait_for("iteration", whole.iterations.total() // 3)
    first.process.kill()
    first.wait()
    lost_work(first, folder, EVERY)
    second = Process.start(command.arguments(folder), tmp_path / "logs", JumpingClock())
    assert second.wait() == 0, second.text
    check_same(contents(folder), whole.contents)
