"""CUDA graphs of a function that is called over and over: captured once, then replayed without launches from Python."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import torch

_FAILED: list[torch.cuda.CUDAGraph] = []


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Queue work on the device's side stream while this context lasts. It runs after the work that is already queued on
    the current stream, and the current stream then waits for it.

    Graphs cannot be captured on the default stream. All runs on a device share one side stream, because the caching
    allocator and cuBLAS keep memory for each stream that they have seen. Threads take turns on it, because a capture
    records what any of them queues. On devices other than GPUs, this context does nothing.
    """
    if not has_graphs(device):
        yield
        return
    current = torch.cuda.current_stream(device)
    stream, turn = _side_stream(current.device_index)
    with turn:
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)


@lru_cache
def _side_stream(index: int) -> tuple[torch.cuda.Stream, threading.RLock]:
    return torch.cuda.Stream(index), threading.RLock()  # a callback may start a run of its own


def has_graphs(device: torch.device) -> bool:
    """Return whether CUDA graphs can be captured on a device."""
    return device.type == "cuda"


def free_memory(device: torch.device) -> None:
    """Give unused memory that the caching allocator holds back to the device."""
    if has_graphs(device):
        torch.cuda.empty_cache()


class Replayed:
    """Calls `function(number)`. The first call with each number runs without a graph, the second one is captured as a
    CUDA graph, and from then on the graph is replayed.

    The function must do the same in every call with the same number. It may read and write device memory that stays
    where it is. It must not wait for the device, and values that change on the host must not decide what it does. If
    the function cannot be captured, it runs without a graph and a warning says so. A capture runs nothing, so each call
    still takes effect once. Call it on a `side_stream`.

    Args:
        function: takes one integer. Its result is dropped.
    """

    def __init__(self, function: Callable[[int], object]):
        self.function = function
        self.pool = torch.cuda.graph_pool_handle()  # the graphs run one after the other and share their memory
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.seen: set[int] = set()
        self.works = True

    def __call__(self, number: int) -> None:
        if self.works and number in self.seen and number not in self.graphs:
            self._capture(number)
        self.seen.add(number)
        if number in self.graphs:
            self.graphs[number].replay()
        else:
            self.function(number)

    def _capture(self, number: int) -> None:
        try:
            self.graphs[number] = capture(lambda: self.function(number), self.pool)
        except RuntimeError as error:
            self.works = False
            self.graphs.clear()
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"iterations run without a CUDA graph: one cannot be captured, {reason}", stacklevel=5)


def capture(function: Callable[[], object], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """Record what a function launches on the current stream as a graph, without running it.

    Raises:
        RuntimeError: the function cannot be captured. The pool must then not be used again.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own, and can take what earlier calls used
    # Only this thread's calls can break the capture: the backward pass runs in another thread.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        function()
    except BaseException:
        with suppress(RuntimeError):
            _end(graph, pool)
        raise
    _end(graph, pool)
    return graph


def _end(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture. If that fails, tell the allocator, which would otherwise go on giving memory to the capture, and
    the generator of random numbers, which would otherwise go on refusing to be used."""
    try:
        graph.capture_end()
    except RuntimeError:
        _FAILED.append(graph)  # the allocator of pinned memory still asks this graph, and cannot be told
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize()
        raise
