"""Compile the kernels as the operations launch them, for a GPU that need not be there, and see what they use of it.

A script that uses this module does so under `if __name__ == "__main__"`, and without TRITON_INTERPRET in the
environment: bench/compile_report.py prints all of it.
"""

from __future__ import annotations

import ast
import hashlib
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .attention import MAX_HEAD_DIM, launch_attention, launch_attention_backward
from .class_attention import launch_class_attention, launch_class_attention_backward
from .dispatch import choice_of, override, padded_head_dim, table
from .patches import launch_gather_patches, launch_gather_patches_backward
from .pixels import launch_pixel_step
from .selection import launch_count_mass, launch_select, launch_select_backward

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORES = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}  # in PTX
REGISTERS, REGISTER_UNIT, LEAST_SHARED = (
    65536,
    256,
    1024,
)  # of a multiprocessor; a warp's share of it; a program's share


class Multiprocessor(NamedTuple):
    """What limits how many programs run on one at a time (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
}


class Launch(NamedTuple):
    """A kernel with the arguments and options that an operation gave it."""

    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as "attention.tile_forward", after the file and the function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__[1:].removesuffix('_kernel')}"

    def source(self, arch: str) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton would compile for this launch, specialised to its arguments, and with which options."""
        backend = make_backend(target(arch))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        packed = self.kernel._pack_args(backend, self.kwargs, *bind(*self.args, **self.kwargs))
        return ASTSource(self.kernel, *packed[1:]), packed[0].__dict__


class Usage(NamedTuple):
    """What one program of a compiled kernel uses. Registers that were spilled lie on the stack."""

    kernel: str
    config: dict[str, Any]
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core: str
    occupancy: float

    def faults(self) -> list[str]:
        """Why this configuration must not ship; empty where it may."""
        limit, faults = MULTIPROCESSORS[self.arch].shared_bytes_per_program, []
        if self.stack_bytes:
            faults.append(f"{self.stack_bytes} bytes of stack")
        if self.shared_bytes > limit:
            faults.append(f"{self.shared_bytes} of {limit} bytes of shared memory")
        # Only half precision has tensor cores that are exact enough: float32 is never rounded to TF32.
        half = self.config["dtype"] in ("bf16", "fp16")
        if self.arch == "sm_90" and half and self.kernel.startswith("attention.") and self.tensor_core != "wgmma":
            faults.append(f"matrix products by {self.tensor_core}, not wgmma")
        return faults


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that can be resident, as the programs' needs allow."""
    limits = MULTIPROCESSORS[arch]
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        REGISTERS // per_warp // num_warps,
        limits.shared_bytes // (shared_bytes + LEAST_SHARED),
    )
    return programs * num_warps / limits.warps


def recorded(function: Callable, *args) -> list[Launch]:
    """The launches that `function(*args)` makes. None runs, so its tensors may be on the device "meta"."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        function(*args)
    return launches


def launches(operation: str, row: dict[str, Any], *, plainest: bool = False) -> list[Launch]:
    """The kernels that a row of the dispatch table can launch, specialised in all ways that make a difference; or only
    in the plainest way."""
    with override({operation: choice_of(row)}):
        cases = LAUNCHES[operation](row)
        return next(cases) if plainest else [launch for case in cases for launch in case]


def _attention_cases(row: dict[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """qkv of every dtype and head dim that the row is for, and whether that is the plainest case of them: the first."""
    dtypes = [torch.float32] if row["dtype"] == "float32" else [torch.bfloat16, torch.float16]
    for head_dim in range(MAX_HEAD_DIM, 0, -8):
        if padded_head_dim(head_dim) == row["head_dim"]:
            plain = head_dim == row["head_dim"]
            for dtype in dtypes if plain else dtypes[:1]:  # the half precisions compile alike
                for heads in (3, 16) if plain else (3,):  # integers are specialised to multiples of 16
                    qkv = torch.empty(8 * row["up_to"], 3, heads, head_dim, dtype=dtype, device="meta")
                    yield qkv, plain and heads == 3 and dtype == dtypes[0]


def _cu_seqlens() -> torch.Tensor:
    return torch.empty(9, dtype=torch.int32, device="meta")


def _attention_forward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for qkv, plain in _attention_cases(row):
        for backward in ("blocks", "tile"):  # which decides whether the forward pass stores its statistics
            for with_class in (True, False):
                if plain or (with_class and backward == "blocks"):
                    with override({"attention_backward": (backward, {})}):
                        yield recorded(launch_attention, qkv, _cu_seqlens(), row["up_to"], 0.125, with_class)


def _attention_backward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for qkv, _ in _attention_cases(row):
        out = torch.empty_like(qkv[:, 0].contiguous())
        statistics = torch.empty(2, qkv.shape[2], len(qkv), device="meta")
        args = out, qkv, out, statistics, _cu_seqlens(), row["up_to"], 0.125
        yield recorded(launch_attention_backward, *args)


def _class_attention_forward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for qkv, _ in _attention_cases(row):
        q, kv = torch.empty_like(qkv[:8, 0].contiguous()), torch.empty_like(qkv[:, 1:].contiguous())
        yield recorded(launch_class_attention, q, kv, _cu_seqlens(), row["up_to"], 0.125)


def _class_attention_backward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for qkv, _ in _attention_cases(row):
        q, kv = torch.empty_like(qkv[:8, 0].contiguous()), torch.empty_like(qkv[:, 1:].contiguous())
        statistics = torch.empty(*q.shape[:2], 2, device="meta")
        args = q, q, kv, statistics, _cu_seqlens(), row["up_to"], 0.125
        yield recorded(launch_class_attention_backward, *args)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return _empty(*shape, dtype=dtype)


def _select_tokens(row: dict[str, Any]) -> Iterator[list[Launch]]:
    """Batches dense and packed, counts and mass, with and without values, whose rows can be read 16 bytes at a time or
    not."""
    n = row["up_to"]
    for heads, dtype, channels in ((1, torch.bfloat16, 384), (12, torch.float32, 192), (3, torch.bfloat16, 33)):
        attention, values = _empty(8, heads, n, dtype=dtype), _empty(8, 1 + n, channels, dtype=dtype)
        packed_attention, packed_values = _empty(heads, 8 * (1 + n), dtype=dtype), values.flatten(0, 1)
        starts, limits, positions = _integers(9), _integers(8, 2), _integers(8, n)
        known, counted = (7, 1, 1 + n, 64), (0, 1, 1 + n, 270)
        yield recorded(launch_select, attention, values, None, None, None, None, *known)
        yield recorded(launch_select, attention, None, positions, None, None, None, 7, 0, n, 56)
        yield recorded(launch_count_mass, attention, None, 0.9, 1, 1 + n)
        yield recorded(launch_select, attention, values, positions, None, starts, limits, *counted)
        yield recorded(launch_count_mass, packed_attention, starts, 0.9, 1, 1 + n)
        yield recorded(launch_select, packed_attention, packed_values, None, starts, starts, limits, *counted)
        yield recorded(launch_select, packed_attention, packed_values, None, starts, starts, None, *counted)


def _select_tokens_backward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for dtype, channels in ((torch.bfloat16, 384), (torch.float32, 192), (torch.bfloat16, 33)):
        yield recorded(launch_select_backward, _empty(270, channels, dtype=dtype), _integers(8, 197))


def _patch_cases(row: dict[str, Any]) -> Iterator[tuple[int, int, int, torch.dtype, torch.Tensor | None]]:
    """Channels, size, dtype and view of patches that the row is for."""
    sizes = ((3, 8, 8), (1, 16, 16), (3, 14, 14), (3, 16, 16), (3, 32, 32))
    size = max((size for size in sizes if math.prod(size) <= row["up_to"]), key=math.prod)
    for dtype in (torch.bfloat16, torch.float32):
        for view in (None, _integers(3), _integers(8, 3)):
            yield *size, dtype, view


def _gather_patches(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for channels, ph, pw, dtype, view in _patch_cases(row):
        images = _empty(8, channels, 14 * ph, 14 * pw)
        yield recorded(launch_gather_patches, images, _integers(368), _integers(9), view, ph, pw, dtype)


def _gather_patches_backward(row: dict[str, Any]) -> Iterator[list[Launch]]:
    for channels, ph, pw, dtype, view in _patch_cases(row):
        grad, inverse = _empty(368, channels * ph * pw, dtype=dtype), _integers(8, 14, 14)
        args = grad, inverse, view, channels, ph, pw, torch.float32
        yield recorded(launch_gather_patches_backward, *args)


def _pixel_step(row: dict[str, Any]) -> Iterator[list[Launch]]:
    """Both kernels of a step, with every kind of view, prior, norm and gradient, and for patches of other sizes."""
    sizes = ((3, 16, 16), (3, 8, 8), (1, 16, 16), (3, 14, 14), (3, 32, 32))
    for channels, ph, pw in sizes:
        images, moments = _empty(8, channels, 14 * ph, 14 * pw), _empty(368, channels * ph * pw)
        state = images, moments, moments, _integers(8, dtype=torch.int64), images
        bounds = _integers(368, 4), _empty(channels), _empty(channels)
        usual = (channels, ph, pw) == sizes[0]
        for view in (_integers(3), _integers(8, 3), None) if usual else (_integers(3),):
            inverse = None if view is None else _integers(8, 14, 14)
            for dtype in (torch.bfloat16, torch.float32):
                terms = (1e-4, 0.0), (1e-4, 1e-5), (0.0, 1e-5), (0.0, 0.0)
                every = usual and dtype == torch.bfloat16
                for tv_l2, l2 in terms if every else terms[:1]:
                    args = *state, moments.to(dtype), *bounds, inverse, view, ph, pw, 0.25, 0.5, 0.99, 1e-8, tv_l2, l2
                    yield recorded(launch_pixel_step, *args)
                    if every and l2:
                        yield recorded(launch_pixel_step, *args, moments, "batch")
                        yield recorded(launch_pixel_step, *args, moments, "image")
                        yield recorded(launch_pixel_step, *args, None, "image")


def _only(kernel: str, cases: Callable[[dict], Iterator[list[Launch]]]) -> Callable[[dict], Iterator[list[Launch]]]:
    """One of the kernels that an operation launches."""
    return lambda row: ([launch for launch in case if launch.name == kernel] for case in cases(row))


LAUNCHES = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "class_attention_forward": _class_attention_forward,
    "class_attention_backward": _class_attention_backward,
    "select_tokens": _select_tokens,
    "select_tokens_backward": _select_tokens_backward,
    "gather_patches": _gather_patches,
    "gather_patches_backward": _gather_patches_backward,
    "prior_sums": _only("pixels.prior_sums", _pixel_step),
    "pixel_step": _only("pixels.pixel_step", _pixel_step),
}


class Resources(NamedTuple):
    """What is read off a compiled kernel."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core: str


Record = dict[str, Resources]  # by `key`, of what was compiled before


def compiled(launch: Launch, arch: str) -> Resources:
    """Compile a launch for an architecture, such as "sm_90", and read the resources off the machine code."""
    source, options = launch.source(arch)
    compiled = triton.compile(source, target=target(arch), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.check_output([CUOBJDUMP, "-res-usage", cubin.name], text=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    instructions = (name for name, pattern in TENSOR_CORES.items() if re.search(pattern, compiled.asm["ptx"]))
    return Resources(registers, stack, compiled.metadata.shared, next(instructions, "none"))


def usage(launch: Launch, arch: str, resources: Resources | None = None) -> Usage:
    """The resources of a launch on an architecture, compiled for it unless they are known."""
    registers, stack, shared, tensor_core = resources or compiled(launch, arch)
    source, options = launch.source(arch)
    constants = {launch.kernel.arg_names[path[0]]: value for path, value in source.constants.items()}
    dtypes = {type.lstrip("*") for type in source.signature.values() if re.match(r"\*(bf16|fp16|fp32)", type)}
    dtype = next((name for name in ("bf16", "fp16", "fp32") if name in dtypes), "")
    num_warps, num_stages = options["num_warps"], options["num_stages"]
    return Usage(
        kernel=launch.name,
        config={"dtype": dtype, **constants, "num_warps": num_warps, "num_stages": num_stages},
        arch=arch,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_core=tensor_core,
        occupancy=occupancy(arch, num_warps, registers, shared),
    )


def key(launch: Launch, arch: str) -> str:
    """What the machine code of a launch depends on, as a hash: Triton's version, the code of the kernel's module but
    for comments and docstrings, types, constants, what the arguments are specialised to, and options."""
    source, _ = launch.source(arch)
    parts = [triton.__version__, arch, launch.name, _code(launch.kernel.__module__)]
    parts += [sorted(map(str, part.items())) for part in (source.signature, source.constants, source.attrs)]
    parts.append({name: launch.kwargs[name] for name in ("num_warps", "num_stages") if name in launch.kwargs})
    return hashlib.sha256(str(parts).encode()).hexdigest()[:16]


@lru_cache
def _code(module: str) -> str:
    """The Triton functions and constants of a module, and those that it imports."""
    code = []
    for name, value in sorted(vars(sys.modules[module]).items()):
        if isinstance(value, JITFunction):
            function = ast.parse(value.src).body[0]
            if ast.get_docstring(function) is not None:
                function.body = function.body[1:] or [ast.Pass()]
            code.append(ast.unparse(function))
        elif isinstance(value, tl.constexpr):
            code.append(f"{name} = {value}")
    return "\n".join(code)


def usages(
    jobs: Iterable[tuple[Launch, str]], processes: int | None = None, record: Record | None = None
) -> list[Usage]:
    """The resources of each launch on the architecture beside it; what compiles alike is compiled once.

    Args:
        processes: to compile in; None: one a CPU.
        record: what need not be compiled again; what is compiled is put in.
    """
    jobs, record = list(jobs), {} if record is None else record
    keys = [key(*job) for job in jobs]
    missing = {name: job for name, job in zip(keys, jobs, strict=True) if name not in record}
    context = multiprocessing.get_context("fork")  # the launches are handed over as they lie in memory
    with ProcessPoolExecutor(processes, context, _receive, (list(missing.values()),)) as pool:
        record.update(zip(missing, pool.map(_compiled, range(len(missing))), strict=True))
    return [usage(*job, record[name]) for name, job in zip(keys, jobs, strict=True)]


def _receive(jobs: list[tuple[Launch, str]]) -> None:
    global _jobs
    _jobs = jobs


def _compiled(index: int) -> Resources:
    return compiled(*_jobs[index])


def table_jobs(archs: Iterable[str]) -> list[tuple[Launch, str]]:
    """Every kernel in every configuration that the dispatch table can choose on these architectures."""
    return [
        (launch, arch)
        for arch in archs
        for operation, rows in table()[arch].items()
        if operation != "source"
        for row in rows
        for launch in launches(operation, row)
    ]


def table_usages(archs: Iterable[str], processes: int | None = None, record: Record | None = None) -> list[Usage]:
    """The resources of `table_jobs`, each configuration once."""
    distinct = {str(use): use for use in usages(table_jobs(archs), processes, record)}
    return list(distinct.values())


def read_record(path: Path) -> Record:
    """What `write_record` wrote; empty where there is no such file."""
    if not path.exists():
        return {}
    fields = (line.split() for line in path.read_text().splitlines())
    return {name: Resources(*map(int, numbers), tensor_core) for name, *numbers, tensor_core in fields}


def write_record(path: Path, record: Record) -> None:
    """A line for each: key, registers, bytes of stack and of shared memory, tensor core."""
    path.write_text("".join(f"{name} {' '.join(map(str, record[name]))}\n" for name in sorted(record)))
