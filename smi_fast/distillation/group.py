"""Group: the processes that train one student together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from datetime import timedelta
from traceback import clear_frames
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped

STOPPED = "distillation/stopped"  # the key under which a process tells the others by which signal it was stopped
TIMEOUT = timedelta(days=30)  # no process waits in vain: torchrun ends all of them if one dies


class Group:
    """The processes of a run as they train one student together, or this process alone. Used as a context manager.

    Each process computes the gradient of its share of a batch, and DistributedDataParallel averages them. Flags that
    all processes agree on travel by gloo, also where gradients travel by NCCL, so that no GPU is waited for.

    Args:
        run: the run, which is entered, or None.
        device: the device of the models.

    Raises:
        ValueError: on entering, torch.distributed has a process group already.
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
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = dist.PrefixStore("distillation", self.run.processes.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.size == 1:
            return
        if isinstance(error, Stopped):
            self.run.processes.tell(STOPPED, str(error.exit_code - 128))
        # Should DistributedDataParallel outlive the process group, it would end the group's threads while it holds
        # Python's lock, for which they may wait.
        clear_frames(trace)
        self._distributed = None
        gc.collect()
        dist.destroy_process_group()

    def pause(self, name: str, save: Callable[[], dict[str, Any]]) -> None:
        """Do what `Run.pause` does, in all processes after the same step. The first one saves the checkpoint.

        Raises:
            Stopped: a signal has asked one of the processes for an end, and the checkpoint is saved.
            ConnectionError: another process is gone.
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
        """Return the largest of the numbers of all processes, for which each waits.

        Raises:
            Stopped: another process was stopped by a signal.
            ConnectionError: another process is gone.
        """
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        try:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        except RuntimeError as error:
            store = self.run.processes.store
            if store.check([STOPPED]):
                raise Stopped(int(store.get(STOPPED))) from None
            raise ConnectionError(f"another process of the run is gone: {str(error).splitlines()[0]}") from None
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
