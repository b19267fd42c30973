"""Two processes in one folder: the second is refused, and the end of the first, however it comes, lets others in."""

import os
import signal
import time

import pytest
from fault_cases import Process, check_same, contents


def everything(folder):
    """Each file of a folder with its bytes and the time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["the same", "overwrite"])
def test_a_second_process_in_a_folder_is_refused_and_changes_nothing(command, folder, whole, more, tmp_path):
    first = Process.start(command.arguments(folder), tmp_path / "logs")
    first.wait_for("saved")
    os.kill(first.process.pid, signal.SIGSTOP)
    before = everything(folder)
    second = Process.start(command.arguments(folder, *more), tmp_path / "logs")
    second.wait()
    assert second.refusal == f"smi-fast: error: {folder} is in use by another process"
    assert everything(folder) == before
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait() == 0, first.text
    check_same(contents(folder), whole.contents)


def with_a_child(folder, note) -> None:
    """Start a process that lives on, such as a worker of a DataLoader, once the run holds its lock."""
    from smi_fast.runs.run import Run

    pause = Run.pause

    def pause_with_a_child(run, *arguments) -> None:
        Run.pause = pause
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        note("child", str(child))
        pause(run, *arguments)

    Run.pause = pause_with_a_child


def test_the_lock_is_free_at_once_after_a_kill_though_a_child_of_the_process_lives(command, folder, tmp_path):
    first = Process.start(command.arguments(folder), tmp_path / "logs", with_a_child)
    first.wait_for("child")
    child = next(int(name) for event, name, _ in first.events if event == "child")
    first.process.kill()
    first.wait()
    try:
        os.kill(child, 0)  # it lives
        second = Process.start(command.arguments(folder), tmp_path / "logs")
        assert second.wait() == 0, second.text
    finally:
        os.kill(child, signal.SIGKILL)
