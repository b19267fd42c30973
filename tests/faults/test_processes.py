"""Processes that share a run and die: the others, or those that torchrun starts again, finish it with the same bits."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_cases import EVERYTHING, INVERT, LIMIT, Process, Whole, check_same, contents, litter, shards_of

from smi_fast.models import MODEL_INSIDE, cifar10_vit
from smi_fast.models.loading import INSIDE
from smi_fast.runs.run import Run

OPTIONS = "--classes all --images-per-class 1 --batch-size 2 --iterations 60 --device cpu --quiet"
every_moment = pytest.mark.skipif(not EVERYTHING, reason="make faults runs it")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"there is no {what}"
        time.sleep(0.01)


class WaitsAfter:
    """A hook by which a process waits after so many iterations until a file is there, and says that it lives."""

    def __init__(self, iterations: int, file: Path):
        self.iterations, self.file = iterations, file

    def __call__(self, folder, note) -> None:
        pause, done = Run.pause, itertools.count(1)

        def pause_and_wait(run, name, save) -> None:
            pause(run, name, save)
            if next(done) == self.iterations:
                while not self.file.exists():
                    time.sleep(0.01)

        Run.pause = pause_and_wait


def test_a_process_takes_over_what_a_killed_one_had_claimed(tmp_path):
    """The second one is killed in the middle of a batch, for whose beginning the first one has waited."""
    folder, killed, never = tmp_path / "run", tmp_path / "killed", tmp_path / "never"
    whole = Whole.make(INVERT.arguments(folder), folder)
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "SMI_FAST_RANK_TIMEOUT": "2"}
    ranks = [
        Process.start(
            INVERT.arguments(folder), tmp_path / "logs", WaitsAfter(*hook), RANK=str(rank), WORLD_SIZE="2", **store
        )
        for rank, hook in enumerate(((1, killed), (5, never)))
    ]
    ranks[1].wait_for("iteration", 5)
    ranks[1].process.kill()
    killed.touch()
    assert ranks[0].wait() == 0, ranks[0].text
    check_same(contents(folder), whole.contents)
    claimed = {name for event, name, _ in ranks[1].events if event == "iteration"}
    assert len(claimed) == 1
    assert claimed <= {name for event, name, _ in ranks[0].events if event in ("began", "went on")}


def with_weights(folder, note) -> None:
    """Use the model that comes with the package, as a user does."""
    INSIDE[MODEL_INSIDE] = cifar10_vit


def torchrun(folder: Path, *how: str) -> subprocess.Popen:
    """Start two processes that share a run."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *how]
    command = [*start, "-m", "smi_fast", "invert", *OPTIONS.split(), "--out", str(folder), "--checkpoint-every", "1e-9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SMI_FAST_RANK_TIMEOUT": "10"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(agent: subprocess.Popen) -> dict[int, int]:
    """The numbers of torchrun's processes, by their rank."""
    found = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        variables = dict(
            text.split("=", 1) for text in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in text
        )
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(child)
    return found


@pytest.fixture
def alone(tmp_path):
    """The run of one process with one thread."""
    folder = tmp_path / "run"
    return Whole.make(
        ["invert", *OPTIONS.split(), "--out", str(folder), "--checkpoint-every", "1e-9"], folder, with_weights
    )


@every_moment
@pytest.mark.parametrize("how", [("--standalone",), ("--master-port", str(free_port()))], ids=["c10d", "static"])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_killed_process_again_and_the_images_are_those_of_one_process(how, rank, tmp_path, alone):
    folder = tmp_path / "run"
    agent = torchrun(folder, "--max-restarts", "3", *how)
    wait_for(lambda: len(shards_of(folder)) >= 2, "finished batch")
    os.kill(ranks_of(agent)[rank], signal.SIGKILL)
    text, _ = agent.communicate(timeout=LIMIT)
    assert agent.returncode == 0, text
    check_same(contents(folder), alone.contents)
    assert litter(folder) == []


@every_moment
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_both_batches_in_progress(number, tmp_path, alone):
    folder = tmp_path / "run"
    agent = torchrun(folder, "--standalone")
    wait_for(lambda: len(shards_of(folder)) >= 1, "finished batch")
    os.kill(agent.pid, number)
    agent.communicate(timeout=LIMIT)
    assert agent.returncode != 0
    assert len(list((folder / "checkpoints").iterdir())) == 2
    agent = torchrun(folder, "--standalone")
    text, _ = agent.communicate(timeout=LIMIT)
    assert agent.returncode == 0, text
    check_same(contents(folder), alone.contents)
