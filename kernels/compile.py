"""Compile the kernels as the operations launch them, for a GPU that need not be there, and see what they use of it.

`python -m smi_fast.kernels.compile` prints a line of JSON for each kernel, specialisation and architecture. A script
that uses this module calls it under `if __name__ == "__main__"`, and without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .attention import MAX_HEAD_DIM, launch_attention, launch_attention_backward, launch_class_attention
from .patches import launch_gather_patches, launch_gather_patches_backward
from .selection import launch_count_mass, launch_select, launch_select_backward

CAPABILITIES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """A kernel with the arguments and options that an operation gave it."""

    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]

    def source(self, capability: int) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton would compile for this launch, specialised to its arguments, and with which options."""
        backend = make_backend(GPUTarget("cuda", capability, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        packed = self.kernel._pack_args(backend, self.kwargs, *bind(*self.args, **self.kwargs))
        return ASTSource(self.kernel, *packed[1:]), packed[0].__dict__


class Usage(NamedTuple):
    """What one program of a compiled kernel uses. Registers that were spilled lie on the stack."""

    kernel: str
    capability: int
    constants: dict[str, Any]
    types: str
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int

    def faults(self) -> list[str]:
        """Why this configuration must not ship; empty where it may."""
        limit = SHARED_MEMORY[self.capability]
        faults = [f"{self.stack} bytes of stack"] if self.stack else []
        return faults + ([f"{self.shared} of {limit} bytes of shared memory"] if self.shared > limit else [])


def recorded(function: Callable, *args) -> list[Launch]:
    """The launches that `function(*args)` makes. None runs, so its tensors may be on the device "meta"."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        function(*args)
    return launches


def attention_launches(head_dims: Iterable[int], dtypes: Iterable[torch.dtype], heads: int = 6) -> Iterator[Launch]:
    """Every kernel of attention, with the tiles that it picks for these."""
    tokens, max_seqlen = 376, 47
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    statistics = torch.empty(2, heads, tokens, device="meta")
    for dtype in dtypes:
        for head_dim in head_dims:
            qkv = torch.empty(tokens, 3, heads, head_dim, dtype=dtype, device="meta")
            yield from recorded(launch_attention, qkv, cu_seqlens, max_seqlen, 0.125)
            yield from recorded(launch_class_attention, qkv, statistics, cu_seqlens, max_seqlen, 0.125)
            args = qkv[:, 0].contiguous(), qkv, qkv[:, 0], statistics, cu_seqlens, max_seqlen, 0.125
            yield from recorded(launch_attention_backward, *args)


def selection_launches(candidates: Iterable[int], dtypes: Iterable[torch.dtype]) -> Iterator[Launch]:
    """Every kernel of the selection, for this many candidates."""
    for dtype in dtypes:
        for n in candidates:
            attention = torch.empty(8, 6, n, dtype=dtype, device="meta")
            values = torch.empty(8, 1 + n, 384, dtype=dtype, device="meta")
            positions = torch.empty(8, n, dtype=torch.int32, device="meta")
            starts = torch.empty(9, dtype=torch.int32, device="meta")
            slots = torch.empty(8, 1 + n, dtype=torch.int32, device="meta")
            yield from recorded(launch_select, attention, values, None, None, 33, 0.0, 1, 272)
            yield from recorded(launch_select, attention, None, positions, None, 33, 0.0, 0, 264)
            yield from recorded(launch_count_mass, attention, 0.9, 1)
            yield from recorded(launch_select, attention, values, positions, starts, 0, 0.9, 1, 272)
            yield from recorded(launch_select_backward, values[0], slots)


def patches_launches(patch_sizes: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Launch]:
    """Every kernel of the patches, for 14 x 14 patches of these sizes, plain and seen through views."""
    positions = torch.empty(368, dtype=torch.int32, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    inverse = torch.empty(8, 14, 14, dtype=torch.int32, device="meta")
    views = [None] + [torch.empty(8, 3, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int64)]
    for ph, pw in patch_sizes:
        images = torch.empty(8, 3, 14 * ph, 14 * pw, device="meta")
        for dtype in dtypes:
            grad = torch.empty(368, 3 * ph * pw, dtype=dtype, device="meta")
            for view in views:
                yield from recorded(launch_gather_patches, images, positions, cu_seqlens, view, ph, pw, dtype)
                yield from recorded(launch_gather_patches_backward, grad, inverse, view, 3, ph, pw, torch.float32)


def usage(launch: Launch, capability: int) -> Usage:
    """Compile a launch for an architecture, such as 90 for sm_90, and read the resources off the machine code."""
    source, options = launch.source(capability)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.check_output([CUOBJDUMP, "-res-usage", cubin.name], text=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return Usage(
        kernel=launch.kernel.__name__,
        capability=capability,
        constants={launch.kernel.arg_names[path[0]]: value for path, value in source.constants.items()},
        types=",".join(type for type in source.signature.values() if type.startswith("*")),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
    )


def usages(
    launches: Iterable[Launch], capabilities: Iterable[int] = CAPABILITIES, processes: int = 2
) -> Iterator[Usage]:
    """The resources of each distinct specialisation among the launches, on each architecture."""
    distinct = {}
    for capability in capabilities:
        for launch in launches:
            distinct.setdefault((launch.source(capability)[0].hash(), str(launch.kwargs), capability), launch)
    context = multiprocessing.get_context("fork")  # the launches are handed over as they lie in memory
    with ProcessPoolExecutor(processes, context, _receive, ([(v, k[-1]) for k, v in distinct.items()],)) as pool:
        yield from pool.map(_usage_of, range(len(distinct)))


def _receive(jobs: list[tuple[Launch, int]]) -> None:
    global _jobs
    _jobs = jobs


def _usage_of(index: int) -> Usage:
    return usage(*_jobs[index])


def all_launches() -> list[Launch]:
    """Every kernel in every tile configuration that the operations can pick; the half precisions compile alike."""
    return [
        *attention_launches(range(8, MAX_HEAD_DIM + 1, 8), [torch.float32, torch.bfloat16]),
        *attention_launches([64], [torch.float16]),
        *attention_launches([80], [torch.float32], heads=16),  # sizes and strides are specialised to multiples of 16
        *attention_launches([64], [torch.bfloat16], heads=16),
        *selection_launches((1, 196, 1024, 2048, 4096), [torch.float32]),
        *selection_launches([196], [torch.bfloat16]),
        *patches_launches([(16, 16), (14, 14)], [torch.float32]),
        *patches_launches([(16, 16)], [torch.bfloat16]),
    ]


if __name__ == "__main__":
    for result in usages(all_launches()):
        print(json.dumps(result._asdict()), flush=True)
