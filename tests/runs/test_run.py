"""The folder of a run: one job at a time, the same settings, checkpoints in time, and nothing of others touched."""

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from smi_fast.data.manifest import MANIFEST, read_manifest
from smi_fast.data.states import load_state
from smi_fast.runs.processes import Processes
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped

SETTINGS = {"iterations": 10, "seed": 0}


def opened(folder, settings=SETTINGS, **options) -> Run:
    return Run(folder, "inversion", settings, {"versions": {"torch": "1"}, "threads": 1}, **options)


def in_child(do) -> int:
    """Run a function in a process of its own, and return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(do() or 0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_job_at_a_time_has_the_folder(tmp_path):
    def try_it() -> int:
        try:
            with opened(tmp_path):
                return 1
        except ValueError as error:
            return 0 if f"{tmp_path} is in use by another process" in str(error) else 2

    with opened(tmp_path):
        assert in_child(try_it) == 0
        with pytest.raises(ValueError, match="in use by another run of this process"), opened(tmp_path / "." / ""):
            pass
    assert in_child(try_it) == 1


def test_the_lock_of_a_killed_job_is_free_although_its_child_lives(tmp_path):
    reads, writes = os.pipe()

    def hold() -> None:
        with opened(tmp_path):
            if os.fork() == 0:
                os.write(writes, b"child")
                time.sleep(60)
                os._exit(0)
            time.sleep(60)

    owner = os.fork()
    if owner == 0:
        os.setsid()
        hold()
    assert os.read(reads, 5) == b"child"
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with opened(tmp_path):
        pass
    os.killpg(owner, signal.SIGKILL)


def test_settings_that_differ_are_all_named_and_nothing_changes(tmp_path):
    with opened(tmp_path):
        pass
    before = (tmp_path / MANIFEST).read_bytes()
    different = "iterations is 10, not 11, seed is 0, not None, lr is None, not 0.1; --overwrite"
    with pytest.raises(ValueError, match=different), opened(tmp_path, {"iterations": 11, "lr": 0.1}):
        pass
    with pytest.raises(ValueError, match="kind inversion, not other"), Run(tmp_path, "other", SETTINGS):
        pass
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_another_version_is_a_warning_and_threads_are_set_again(tmp_path):
    with opened(tmp_path):
        pass
    torch.set_num_threads(2)
    changed = Run(tmp_path, "inversion", SETTINGS, {"versions": {"torch": "2"}, "threads": 2})
    different = r"begun with versions \{'torch': '1'\} and goes on with \{'torch': '2'\}"
    with pytest.warns(UserWarning, match=different), changed:
        assert torch.get_num_threads() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened(tmp_path):
            pass


def test_files_of_others_are_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run; --overwrite"), opened(tmp_path):
        pass
    (tmp_path / "grid.png").write_text("old")
    with opened(tmp_path, overwrite=True, files=["grid.png"]):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine.txt", MANIFEST]
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_overwriting_removes_the_run_before(tmp_path):
    with opened(tmp_path) as run:
        run.save("a", {"x": 1})
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "00000.safetensors").write_text("old")
    with opened(tmp_path, {"iterations": 11}, overwrite=True) as run:
        assert run.checkpoint("a") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", MANIFEST]
    assert read_manifest(tmp_path)["settings"] == {"iterations": 11}


def test_what_killed_writers_left_is_removed(tmp_path):
    with opened(tmp_path) as run:
        run.save("a", {"x": 1})
    litter = ".0123456789abcdef0123456789abcdef.partial"
    (tmp_path / litter).write_text("half")
    (tmp_path / "checkpoints" / litter).write_text("half")
    with opened(tmp_path) as run:
        assert run.checkpoint("a") == {"x": 1}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_is_saved_whenever_the_interval_is_over(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the clock on the wall may jump"))
    saved = []
    with opened(tmp_path, checkpoint_every=2) as run:
        for iteration in range(20):
            now += 30
            run.pause("a", lambda i=iteration: saved.append(i) or {"iteration": i})
            if saved:
                assert load_state(tmp_path / "checkpoints" / "a.state")["iteration"] == saved[-1]
    assert saved == [3, 7, 11, 15, 19]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_job_with_a_checkpoint(number, code, tmp_path, capfd):
    before = signal.getsignal(number)

    def job() -> None:
        with opened(tmp_path) as run:
            for iteration in range(9):
                if iteration == 5:
                    os.kill(os.getpid(), number)
                run.pause("a", lambda i=iteration: {"iteration": i})

    with pytest.raises(Stopped) as stopped:
        job()
    assert stopped.value.exit_code == code
    assert "stopping after this iteration" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    with opened(tmp_path) as run:
        assert run.checkpoint("a") == {"iteration": 5}
        run.discard("a")
        assert run.checkpoint("a") is None


def test_the_second_signal_ends_the_process_at_once(tmp_path):
    def ignore_the_first() -> None:
        with opened(tmp_path):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(ignore_the_first) == 143


def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path):
    with opened(tmp_path) as run:
        run.save("a", {"x": torch.ones(3)})
        file = tmp_path / "checkpoints" / "a.state"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.warns(UserWarning, match=r"a\.state: .*; what it held is computed again"):
            assert run.checkpoint("a") is None


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_between_checkpoints_is_refused(minutes, tmp_path):
    with pytest.raises(ValueError, match=f"must be more than 0, got {minutes}"):
        opened(tmp_path / "new", checkpoint_every=minutes)
    assert not (tmp_path / "new").exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match="file"), opened(tmp_path / place):
            pass
    damaged = tmp_path / "a" / "b"
    with pytest.raises(TypeError), Run(damaged, "inversion", {"x": object()}):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_process_with_other_settings_is_refused_too(tmp_path):
    store = dist.HashStore()
    with opened(tmp_path, processes=Processes(store, 0, 2)):
        with (
            pytest.raises(ValueError, match="seed is 0, not 1"),
            opened(tmp_path, SETTINGS | {"seed": 1}, processes=Processes(store, 1, 2)),
        ):
            pass
        with opened(tmp_path, processes=Processes(store, 1, 2)) as second:
            assert second.checkpoint("a") is None


def test_a_process_whose_first_was_refused_is_refused_too(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    store = dist.HashStore()
    for rank, message in ((0, "is not empty"), (1, f"the first of the processes was refused the folder {tmp_path}")):
        with pytest.raises(ValueError, match=message), opened(tmp_path, processes=Processes(store, rank, 2)):
            pass


def test_a_refused_process_leaves_the_lock_of_another(tmp_path, monkeypatch):
    """Both have found that there was no folder."""
    folder, lock = tmp_path / "new", Run._lock

    def late(run, stack) -> None:
        monkeypatch.setattr(Run, "_lock", lock)
        with opened(folder):
            lock(run, stack)

    monkeypatch.setattr(Run, "_lock", late)
    with pytest.raises(ValueError, match="in use"), opened(folder):
        pass
    assert (folder / ".lock").exists()


def test_the_number_of_threads_is_the_callers_again(tmp_path):
    with opened(tmp_path):
        pass
    torch.set_num_threads(2)
    with opened(tmp_path):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
