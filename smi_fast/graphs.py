"""CUDA graphs of a function that is called over and over: captured once, then replayed without launches from Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

Pool = tuple[int, int]
_FAILED: list[torch.cuda.CUDAGraph] = []


def graph_pool(device: torch.device) -> Pool | None:
    """Memory that graphs share which run one after the other; None where there are no CUDA graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Replayed:
    """Calls of `function(number)`: for each number two run as they are, the third is captured and all are replayed.

    What the function does must be the same in every call with the same number: it may read and write device memory that
    stays where it is, and must neither wait for the device nor decide by what the host knows. A function that cannot be
    captured runs as it is, which a warning says; one that waits for the device must do so before it changes anything,
    because it is called again then.

    Args:
        function: of one integer; what it returns is dropped.
        pool: of `graph_pool`.
    """

    def __init__(self, function: Callable[[int], object], pool: Pool):
        self.function, self.pool, self.stream = function, pool, torch.cuda.Stream()
        self.calls: dict[int, int] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.works = True

    def __call__(self, number: int) -> None:
        calls = self.calls[number] = self.calls.get(number, 0) + 1
        if self.works and calls == 2 and self._tries(lambda: rehearse(lambda: self.function(number), self.stream)):
            return
        if self.works and calls == 3:
            self._tries(lambda: self._capture(number))
        if number in self.graphs and self.works:
            self.graphs[number].replay()
        else:
            self.function(number)

    def _capture(self, number: int) -> None:
        self.graphs[number] = capture(lambda: self.function(number), self.pool, self.stream)

    def _tries(self, attempt: Callable[[], None]) -> bool:
        try:
            attempt()
        except RuntimeError as error:
            self.works = False
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"iterations run without a CUDA graph: one cannot be captured, {reason}", stacklevel=5)
        return self.works


def rehearse(function: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Call a function on the stream that is to capture it, which sets up what libraries keep for each stream.

    Raises:
        RuntimeError: it waits for the device; found here, since a capture that fails leaves more behind.
    """
    with _on(stream), waiting_is_an_error():
        function()


def capture(function: Callable[[], object], pool: Pool, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """What a function launches, as a graph; none of it runs.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with _on(stream):
        try:
            # Of this thread alone: the backward pass runs in another.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError:
            # A capture that ends in an error is not taken off the allocators, which then go on asking its graph.
            _FAILED.append(graph)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch.cuda.synchronize()
            raise
    return graph


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it, what waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """On another stream, behind and before what the current one does."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)
