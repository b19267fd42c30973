"""Processes divide the parts of a run: each is made once, and what a dead process had claimed is made by another."""

import itertools
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from smi_fast.runs import processes
from smi_fast.runs.processes import Processes, device_of_process


class Clock:
    """A monotonic clock that only moves while somebody waits."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_process_that_is_alone_makes_all_parts_that_are_left():
    made = {2}
    for number in Processes().parts(5, lambda n: n in made, lambda: pytest.fail("nobody else is there")):
        made.add(number)
    assert made == {0, 1, 2, 3, 4}


def test_each_part_is_made_by_one_process():
    store, made, lock = dist.HashStore(), [], threading.Lock()

    def make(rank: int) -> None:
        for number in Processes(store, rank, 3).parts(40, lambda n: n in made, lambda: None):
            time.sleep(0.002)
            with lock:
                made.append(number)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(40))


def test_what_a_silent_process_has_claimed_is_taken_over_by_one(monkeypatch):
    store, clock, made = dist.HashStore(), Clock(monkeypatch), set()
    dead, first, second = (Processes(store, rank, 3, timeout=30) for rank in (2, 0, 1))
    assert next(dead.parts(1, made.__contains__, lambda: None)) == 0
    store.add("alive/2", 1)
    waits = []
    taken = next(first.parts(1, made.__contains__, lambda: waits.append(clock.now)))
    assert taken == 0
    assert 30 <= clock.now < 31
    assert len(waits) > 100
    store.add("alive/0", 1)  # the new owner lives, and so it is not taken over in turn

    def alive() -> None:
        store.add("alive/0", 1)
        if clock.now > 100:
            made.add(0)

    assert list(second.parts(1, made.__contains__, alive)) == []
    assert clock.now > 100


def test_a_part_that_is_given_back_is_free_at_once():
    store = dist.HashStore()
    first, second = Processes(store, 0, 2), Processes(store, 1, 2)
    assert next(first.parts(1, lambda n: False, lambda: None)) == 0
    first.release(0)
    assert next(second.parts(1, lambda n: False, lambda: pytest.fail("it is free"))) == 0


def test_a_part_that_was_finished_meanwhile_is_not_made_again(monkeypatch):
    """Its owner has died after the shard was written, but before others have seen it."""
    store, clock, made = dist.HashStore(), Clock(monkeypatch), set()
    dead, alive = Processes(store, 1, 2, timeout=10), Processes(store, 0, 2, timeout=10)
    assert next(dead.parts(1, made.__contains__, lambda: None)) == 0

    def late(number: int) -> bool:
        return clock.now > 10.1

    assert list(alive.parts(1, late, lambda: None)) == []


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def set_(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_processes_of_an_environment_share_a_store(environment, monkeypatch):
    monkeypatch.setattr(processes, "_joined", iter([0, 0]))  # two processes, of which each begins its first run
    environment(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=2, RANK=0, SMI_FAST_RANK_TIMEOUT=5)
    first = Processes.of_environment()
    environment(RANK=1)
    second = Processes.of_environment()
    first.tell("x", "shared")
    assert second.hear("x", lambda: None) == "shared"
    assert [first.count("n", 2), second.count("n", 3)] == [2, 5]
    assert (second.rank, second.size, second.is_first) == (1, 2, False)
    second.leave(wait=True)
    first.leave(wait=True)


def test_without_an_environment_a_process_is_alone(environment):
    assert Processes.of_environment().size == 1


def test_a_restarted_process_belongs_to_the_generation_of_the_first(environment, monkeypatch):
    """Whatever torchrun counts on each machine."""
    monkeypatch.setattr(processes, "_joined", itertools.repeat(0))
    environment(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=2, RANK=0, SMI_FAST_RANK_TIMEOUT=2)
    first = Processes.of_environment()
    first.tell("x", "of the first generation")
    for count in (0, 3):
        environment(RANK=1, TORCHELASTIC_RESTART_COUNT=count)
        assert Processes.of_environment().hear("x", lambda: None) == "of the first generation"


def test_a_process_that_never_comes_is_named(monkeypatch):
    clock, waits = Clock(monkeypatch), []
    alone = Processes(dist.HashStore(), 0, 3, timeout=2)
    alone.count("alive/1", 1)
    with pytest.raises(ConnectionError, match="process 2 of 3 has not come in 20 s"):
        alone.await_all(lambda: waits.append(clock.now))
    assert len(waits) > 50
    alone.count("alive/2", 1)
    alone.await_all(pytest.fail)


def test_a_store_that_is_gone_is_one_sentence():
    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer\nStack trace ...")

    alone = Processes(Gone(), 0, 2)
    for ask in (lambda: alone.count("n", 1), lambda: alone.tell("x", "y"), lambda: alone.leave(True)):
        with pytest.raises(ConnectionError, match=r"cannot be reached any more: Connection reset by peer$"):
            ask()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": 1}, "RANK is set, and so WORLD_SIZE has to be a number, not None"),
        ({"RANK": "x"}, "RANK has to be a number, not 'x'"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 99999, "MASTER_ADDR": "x"}, "MASTER_PORT must be below 65536"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 1}, "RANK is set, and so MASTER_ADDR has to be"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 1, "SMI_FAST_RANK_TIMEOUT": "long"}, "SMI_FAST_RANK_TIMEOUT"),
    ],
)
def test_an_incomplete_environment_is_named(values, message, environment):
    environment(**values)
    with pytest.raises(ValueError, match=message):
        Processes.of_environment()


def test_a_store_that_cannot_be_reached_is_named(environment):
    port = free_port()
    environment(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=2, RANK=1, SMI_FAST_RANK_TIMEOUT=0.5)
    with pytest.raises(ConnectionError, match=f"the store of the processes at localhost:{port} cannot be reached"):
        Processes.of_environment()


def test_each_process_of_a_machine_has_a_gpu_of_its_own(environment, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device_of_process(torch.device("cuda")) == torch.device("cuda")
    environment(LOCAL_RANK=1)
    assert device_of_process(torch.device("cuda")) == torch.device("cuda", 1)
    assert device_of_process(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert device_of_process(torch.device("cpu")) == torch.device("cpu")
    assert chosen == [1]
    environment(LOCAL_RANK=2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, because there are only 2"):
        device_of_process(torch.device("cuda"))
