"""The processes that train together: they begin together or not at all, and their shares of a batch make up the whole
of it."""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from smi_fast.distillation import group as module
from smi_fast.distillation.group import Group
from smi_fast.runs.processes import Processes
from smi_fast.runs.signals import Signals, Stopped


@pytest.fixture
def make_group(monkeypatch):
    """A function that makes the group of a process, all of which share a store."""
    monkeypatch.setattr(module, "POLL", 0.001)
    store = dist.HashStore()

    def make(rank: int, size: int) -> Group:
        store.add(f"alive/{rank}", 1)
        run = SimpleNamespace(processes=Processes(store, rank, size), signals=Signals())
        group = Group(run, torch.device("cpu"))
        group._store = dist.PrefixStore("group", store)
        return group

    return make


@pytest.mark.parametrize("joined", [False, True])
def test_a_signal_ends_the_wait_for_a_process_that_does_not_come(make_group, joined, monkeypatch):
    group, polls = make_group(0, 2), []
    if joined:
        make_group(1, 2)

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            group.run.signals.asked = signal.SIGTERM

    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(Stopped) as stopped:
        group.__enter__()
    assert stopped.value.exit_code == 143
    assert len(polls) == 3


@pytest.mark.parametrize("when", [None, 0.0, 0.002, 0.005, 0.008])
def test_after_a_signal_to_one_process_all_begin_or_none(make_group, when):
    """If they begin, the next step tells them of the signal."""
    size, ends = 3, {}
    groups = [make_group(rank, size) for rank in range(size)]

    def meet(rank: int) -> None:
        threading.Event().wait(0.003 * rank)
        try:
            groups[rank]._meet()
            ends[rank] = "began"
        except Stopped as stopped:
            ends[rank] = stopped.exit_code

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    if when is not None:
        threading.Event().wait(when)
        groups[0].run.signals.asked = signal.SIGINT
    for thread in threads:
        thread.join(30)
    assert len(ends) == size
    assert set(ends.values()) in ([{"began"}] if when is None else [{"began"}, {130}])


def test_the_end_of_another_process_is_told_and_other_errors_are_not_hidden(make_group):
    group, alone = make_group(0, 2), Group(None, torch.device("cpu"))
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection reset by peer\n  more")
    with pytest.raises(ConnectionError, match=r"has ended: .*reset by peer$") as error, group.together():
        raise lost
    assert error.value.__suppress_context__
    with pytest.raises(ConnectionError, match="has ended"), group.together():
        raise dist.DistNetworkError("failed to recv, got 0 bytes")
    for error, where in ((torch.OutOfMemoryError("CUDA out of memory"), group), (lost, alone)):
        with pytest.raises(RuntimeError) as found, where.together():
            raise error
        assert found.value is error
    group._store.set("stopped", "15")
    with pytest.raises(Stopped, match="SIGTERM"), group.together():
        raise lost


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_of_the_weighted_shares_is_the_mean_of_the_batch(seed, count, size):
    """Also where shares differ in size, or where there are more processes than images."""
    losses, index = torch.rand(count, dtype=torch.float64), torch.randperm(count)
    of_processes, seen = [], []
    for rank in range(size):
        group = Group(None, torch.device("cpu"))
        group.rank, group.size = rank, size
        (mine, same), share = group.share((index, index))
        assert torch.equal(mine, same)
        assert len(mine) > 0
        of_processes.append(share * losses[mine].mean())
        seen += mine.tolist() if share else []
    torch.testing.assert_close(sum(of_processes) / size, losses.mean())
    assert sorted(seen) == list(range(count))
