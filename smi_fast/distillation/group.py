"""Group: the processes that train one student together."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from traceback import clear_frames
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smi_fast.data.files import first_line
from smi_fast.runs.processes import POLL
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped

# The keys under which the first process to decide tells all others whether they begin or by which signal they are
# stopped, and under which a process tells them by which signal it was stopped later.
MEETING, STOPPED = "meeting", "stopped"
BEGIN = "begin"
TIMEOUT = timedelta(days=30)  # between two collective operations: the first process measures the student in between
LOST = ("gloo", "ncclRemoteError")  # what the errors of torch's backends say if another process has ended
_begun = itertools.count()  # the groups of this process, which all processes begin in the same order


class Group:
    """The processes of a run as they train one student together, or this process alone. Used as a context manager.

    Each process computes the gradient of its share of a batch, and DistributedDataParallel averages them. Flags that
    all processes agree on travel by gloo, also where gradients travel by NCCL, so that no GPU is waited for.

    Args:
        run: the run, which is entered, or None.
        device: the device of the models.

    Raises:
        ValueError: on entering, torch.distributed has a process group already.
        Stopped: on entering, a signal has asked one of the processes for an end.
        ConnectionError: on entering, another process has not come or has ended.
    """

    def __init__(self, run: Run | None, device: torch.device):
        self.run, self.device = run, device
        self.rank, self.size = (0, 1) if run is None else (run.processes.rank, run.processes.size)
        self._distributed: DistributedDataParallel | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Group:
        if self.size > 1:
            self._store = dist.PrefixStore(f"distillation/{next(_begun)}", self.run.processes.store)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            with self.together():
                self._meet()
                dist.init_process_group(
                    backend, store=self._store, rank=self.rank, world_size=self.size, timeout=TIMEOUT
                )  # fmt: skip
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size == 1:
            return
        if isinstance(error, Stopped):
            with suppress(RuntimeError):  # the store may be gone
                self._store.set(STOPPED, str(error.exit_code - 128))
        # Should DistributedDataParallel outlive the process group, it would end the group's threads while it holds
        # Python's lock, for which they may wait.
        clear_frames(trace)
        self._distributed = None
        gc.collect()
        dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell in the `with` block that another process has ended, which torch tells in many ways.

        Raises:
            Stopped: the other process was stopped by a signal.
            ConnectionError: the other process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistNetworkError) or any(x in str(error) for x in LOST)):
                raise
            clear_frames(error.__traceback__)  # for the reason that `__exit__` gives
            with suppress(RuntimeError):  # the store may be gone
                if self._store.check([STOPPED]):
                    raise Stopped(int(self._store.get(STOPPED))) from None
            raise ConnectionError(f"a process that shares the run has ended: {first_line(error)}") from None

    def _meet(self) -> None:
        """Wait for the other processes, so that all begin or, after a signal to one of them, none: while torch makes
        a process group, it waits for all processes, and no signal can end that."""
        self.run.processes.await_all(self._stop_if_asked)
        self._store.set(f"here/{self.rank}", "")
        while not self._store.check([f"here/{rank}" for rank in range(self.size)]):
            self._stop_if_asked()
            time.sleep(POLL)
        self._decide(BEGIN)

    def _stop_if_asked(self) -> None:
        self._decide(str(self.run.signals.asked or ""))

    def _decide(self, wish: str) -> None:
        """Raise `Stopped` if that is what the first process with a wish has decided."""
        decided = self._store.compare_set(MEETING, "", wish).decode()
        if decided not in ("", BEGIN):
            raise Stopped(int(decided))

    def pause(self, name: str, save: Callable[[], dict[str, Any]]) -> None:
        """Do what `Run.pause` does, in all processes after the same step. The first one saves the checkpoint.

        Raises:
            Stopped: a signal has asked one of the processes for an end, and the checkpoint is saved.
        """
        if self.run is None:
            return
        stop = self.agree(self.run.signals.asked or 0)
        if self.is_first and (stop or self.run.is_due):
            self.run.save(name, save())
        if stop:
            self.agree(0)  # until the checkpoint is saved: torchrun ends all processes as soon as one has ended
            raise Stopped(stop)

    def agree(self, number: int) -> int:
        """Return the largest of the numbers of all processes, for which each waits."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def share(self, batch: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Return this process's share of the rows of a batch, and the factor of the mean loss over it. The mean over
        the processes of the weighted losses is the mean loss over the batch, however large the shares are."""
        if self.size == 1:
            return list(batch), 1.0
        mine = [part[self.rank :: self.size] for part in batch]
        if not len(mine[0]):  # there are more processes than rows, and each has to take part in the backward pass
            return [part[:1] for part in batch], 0.0
        return mine, len(mine[0]) * self.size / len(batch[0])

    def call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Call a module, the same one each time, so that its gradients become means over all processes. It begins with
        the weights of the first process."""
        if self.size == 1:
            return module(*inputs)
        if self._distributed is None:
            self._distributed = DistributedDataParallel(module)
        return self._distributed(*inputs)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of the values of all processes."""
        if self.size == 1:
            return value
        dist.all_reduce(value)
        return value / self.size

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's buffers, such as the running statistics of BatchNorm."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
