"""Counts the nodes of CUDA graphs as they are captured: the kernels, copies and fills that a replay launches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_COUNTS: list[int] = []


class CountedGraph(torch.cuda.CUDAGraph):
    """A CUDA graph that enters its number of nodes in the list of `counted` when its capture ends."""

    def __new__(cls):
        return super().__new__(cls, keep_graph=True)

    def __init__(self):
        super().__init__(keep_graph=True)  # else nothing of it can be asked for

    def capture_end(self) -> None:
        super().capture_end()
        count = ctypes.c_size_t()
        runtime = ctypes.CDLL(None)  # torch has loaded CUDA's runtime for all of the process
        if runtime.cudaGraphGetNodes(ctypes.c_void_p(self.raw_cuda_graph()), None, ctypes.byref(count)) == 0:
            _COUNTS.append(count.value)
        self.instantiate()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yield a list that gets the number of nodes of each CUDA graph that is captured within the context. With a torch
    that does not keep graphs (before 2.8) the list stays empty."""
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        yield []
        return
    before, plain = len(_COUNTS), torch.cuda.CUDAGraph
    found: list[int] = []
    torch.cuda.CUDAGraph = CountedGraph
    try:
        yield found
    finally:
        torch.cuda.CUDAGraph = plain
        found += _COUNTS[before:]
        del _COUNTS[before:]
