"""Processes: those that share a run, and how they divide its parts among each other."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from smi_fast.data.files import first_line

PREFIX, FREE = "smi-fast", "free"
TIMEOUT = "SMI_FAST_RANK_TIMEOUT"  # the environment's name for the seconds after which a silent process counts as dead
POLL = 0.2  # seconds
_joined = itertools.count()  # the runs of this process, which all processes begin in the same order


class Processes:
    """The processes of a run, each of which makes some of its parts.

    They talk through a store of torch.distributed, which torchrun or the first process holds. A process claims a part
    before it makes it. Each process says now and then that it is alive. If one has been silent for long, another one
    takes over what it had claimed. Should it be alive after all, both make the same part with the same bits, and the
    files of one replace those of the other.

    Args:
        store: the store. None: this process is alone.
        rank, size: the number of this process from 0, and of all processes.
        timeout: the seconds of silence after which a process counts as dead.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        rank: int = 0,
        size: int = 1,
        timeout: float = 60.0,
    ):
        self.store, self.rank, self.size, self.timeout = store or dist.HashStore(), rank, size, timeout
        self._heard: dict[int, tuple[int, float]] = {}  # how often a process has been heard of, and when last
        self._claimed: set[int] = set()
        self._left = threading.Event()
        self._pulse: threading.Thread | None = None

    @classmethod
    def of_environment(cls) -> Processes:
        """Join the processes that torchrun has started, or a scheduler that sets RANK, WORLD_SIZE, MASTER_ADDR and
        MASTER_PORT. Without RANK, this process is alone.

        Raises:
            ValueError: one of the other variables is missing or out of range.
            ConnectionError: the store cannot be reached.
        """
        if "RANK" not in os.environ:
            return cls()
        rank, size, port = (_integer(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        host, timeout = os.environ.get("MASTER_ADDR"), _seconds(os.environ.get(TIMEOUT, "60"))
        if host is None:
            raise ValueError("RANK is set, and so MASTER_ADDR has to be")
        if port >= 2**16:
            raise ValueError(f"MASTER_PORT must be below 65536, got {port}")
        holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        number = next(_joined)

        def connect(holds: bool) -> dist.Store:
            try:
                seconds = timedelta(seconds=timeout)
                store = dist.TCPStore(host, port, is_master=holds, timeout=seconds, wait_for_workers=False)
            except (RuntimeError, ValueError) as error:
                where, reason = f"{host}:{port}", first_line(error)
                raise ConnectionError(f"the store of the processes at {where} cannot be reached: {reason}") from None
            return dist.PrefixStore(f"{PREFIX}/{number}", store)

        store, pulse = connect(holds_store), connect(False)
        generation = uuid.uuid4().hex if rank == 0 else _welcomed(store, rank)
        processes = cls(dist.PrefixStore(generation, store), rank, size, timeout)
        processes._pulse = threading.Thread(target=processes._beat, args=(pulse, generation), daemon=True)
        processes._pulse.start()
        return processes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def parts(self, count: int, is_finished: Callable[[int], bool], wait: Callable[[], None]) -> Iterator[int]:
        """Yield the numbers of the parts that this process is to make, until all are finished, by whichever process.

        Args:
            count: the number of parts.
            is_finished: says whether a part is finished.
            wait: called now and then while other processes make the parts that are left.
        """
        left = range(count)
        while left := [number for number in left if not is_finished(number)]:
            claimed = next(filter(self._claim, left), None)
            if claimed is None:
                wait()
                time.sleep(POLL)
            elif not is_finished(claimed):
                yield claimed

    def release(self, number: int) -> None:
        """Let another process make a part that this one has claimed."""
        self._ask("compare_set", f"part/{number}", str(self.rank), FREE)

    def tell(self, key: str, value: str) -> None:
        """Let all processes read a value."""
        self._ask("set", key, value)

    def hear(self, key: str, wait: Callable[[], None]) -> str:
        """Wait for a value that the first process tells, and return it.

        Raises:
            ConnectionError: the first process was there, but has died.
        """
        while not self._ask("check", [key]):
            if self.count("alive/0", 0) and self._is_dead(0):
                raise ConnectionError("the first of the processes has died")
            wait()
            time.sleep(POLL)
        return self._ask("get", key).decode()

    def count(self, key: str, amount: int) -> int:
        """Add to a number that all processes share, and return it."""
        return self._ask("add", key, amount)

    def await_all(self, wait: Callable[[], None]) -> None:
        """Wait until all processes have joined.

        Raises:
            ConnectionError: one of them has not come in ten times the timeout.
        """
        since = time.monotonic()
        for rank in set(range(self.size)) - {self.rank}:
            while not self.count(f"alive/{rank}", 0):
                if time.monotonic() - since > 10 * self.timeout:
                    raise ConnectionError(f"process {rank} of {self.size} has not come in {10 * self.timeout:g} s")
                wait()
                time.sleep(POLL)

    def leave(self, wait: bool) -> None:
        """Give back what this process has claimed, and say that it needs the store no longer. The first process, which
        may hold the store, can wait until the others need it no longer either.

        Raises:
            ConnectionError: the store cannot be reached any more.
        """
        try:
            for number in self._claimed:
                self.release(number)
            self.tell(f"left/{self.rank}", "left")
            others = range(1, self.size) if self.is_first and wait else ()
            while any(not self._ask("check", [f"left/{rank}"]) and not self._is_dead(rank) for rank in others):
                time.sleep(POLL)
        finally:
            self._left.set()
            if self._pulse is not None:
                self._pulse.join()  # a process that ends while a thread asks the store is aborted

    def _claim(self, number: int) -> bool:
        """Return whether this process is the one to make a part."""
        key, mine = f"part/{number}", str(self.rank)
        owner = self._ask("compare_set", key, "", mine).decode()
        if owner not in (mine, FREE) and not self._is_dead(int(owner)):
            return False
        if owner != mine and self._ask("compare_set", key, owner, mine).decode() != mine:
            return False
        self._claimed.add(number)
        return True

    def _is_dead(self, rank: int) -> bool:
        if rank == self.rank:
            return False
        times, now = self.count(f"alive/{rank}", 0), time.monotonic()
        if times != self._heard.get(rank, (None, now))[0]:
            self._heard[rank] = times, now
        return now - self._heard[rank][1] > self.timeout

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the store."""
        try:
            return getattr(self.store, method)(*arguments)
        except RuntimeError as error:
            reason = first_line(error)
            raise ConnectionError(f"the store of the processes cannot be reached any more: {reason}") from None

    def _beat(self, desk: dist.Store, generation: str) -> None:
        """Say now and then that this process is alive. The first process also welcomes the others."""
        welcomed: dict[int, bytes] = {}
        try:
            while not self._left.is_set():
                dist.PrefixStore(generation, desk).add(f"alive/{self.rank}", 1)
                for rank in range(1, self.size) if self.is_first else ():
                    if desk.check([f"hello/{rank}"]) and (name := desk.get(f"hello/{rank}")) != welcomed.get(rank):
                        desk.set(f"welcome/{name.decode()}", generation)
                        welcomed[rank] = name
                waits = self.is_first and len(welcomed) < self.size - 1
                self._left.wait(POLL if waits else self.timeout / 10)
        except RuntimeError:
            return  # the store is gone, which the next question to it says


def _welcomed(store: dist.Store, rank: int) -> str:
    """Return the generation of processes that a process belongs to: torchrun starts all of them again after one has
    died, and its count of restarts may differ between machines."""
    name = uuid.uuid4().hex
    try:
        store.set(f"hello/{rank}", name)
        while not store.check([f"welcome/{name}"]):
            time.sleep(POLL)
        return store.get(f"welcome/{name}").decode()
    except RuntimeError as error:
        raise ConnectionError(f"the store of the processes cannot be reached any more: {first_line(error)}") from None


def device_of_process(device: torch.device) -> torch.device:
    """Return the GPU of this process, if several share a machine and none was named, or else the device itself.

    Raises:
        ValueError: there is no GPU for this process.
    """
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    number, count = _integer("LOCAL_RANK"), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"--device: process {number} of this machine has no GPU, because there are only {count}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _integer(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdecimal():
        raise ValueError(f"RANK is set, and so {name} has to be a number, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise ValueError(f"{TIMEOUT} must be a positive number of seconds, not {text!r}")
